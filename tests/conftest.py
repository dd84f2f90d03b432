"""Small real data sets and small stock configs that the tests train on.

Data are real files in COCO and Cityscapes layout, written once a session; models are stock mmdet and mmseg models,
narrowed by overrides.
"""

import copy
import functools
import gc
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmengine.config.config
import mmengine.config.utils
import mmengine.dataset.base_dataset
import mmengine.model.base_module
import mmengine.model.weight_init
import mmengine.runner.loops
import mmengine.runner.runner
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope


def once_for_installed(read):
    """A reader of config files that reads those in the environment once."""
    read_once = functools.lru_cache(maxsize=None)(read)

    def read_or_copy(filename, *args, **options):
        if not os.path.isabs(filename) or 'site-packages' not in Path(filename).parts:
            return read(filename, *args, **options)
        return copy.deepcopy(read_once(str(filename), *args, **options))

    return read_or_copy


# The models are tiny: threads cost more than they give. More of them add in another order: no test may depend on that.
torch.set_num_threads(int(os.environ.get('KD_MM_TEST_THREADS', '1')))
# mmengine formats every config it logs, for seconds; the text means the same unformatted.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)
# A base named ``mmdet::...`` is looked up in the host's index, which is read from a hundred files each time.
mmengine.config.utils.load = functools.lru_cache(maxsize=None)(mmengine.config.utils.load)
# What else the hosts' configs inherit is read, parsed and run once: they do not change, and each has its own copy.
mmengine.config.Config._file2dict = staticmethod(once_for_installed(mmengine.config.Config._file2dict))
# What is installed is written into the log of every Runner, after asking the compiler and git again.
mmengine.runner.runner.collect_env = functools.lru_cache(maxsize=None)(mmengine.runner.runner.collect_env)
# For the log, mmengine notes the mean of every parameter after each of its initialisers: a fifth of a model's set-up.
mmengine.model.base_module.update_init_info = mmengine.model.weight_init.update_init_info = lambda *_, **__: None
mmengine.model.base_module.BaseModule._dump_init_info = lambda self: None
# At the end of its data the loop over iterations waits 2 s for the processes that load them; here there are none.
mmengine.runner.loops.time = SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
# Each data set collects garbage when it is made: among the objects of all modules and tests that takes 0.2 s.
mmengine.dataset.base_dataset.gc = SimpleNamespace(collect=lambda: None)
CLASSES = ('square', 'disc')
#: What depends on the hosts most, by path below this folder: `make test STACK=onedl` runs it on the maintained forks.
ON_FORKS = (
    'engine/test_data.py', 'engine/test_heads.py', 'engine/test_promises.py', 'engine/test_queries.py',
    'engine/test_training.py', 'hosts/heads', 'hosts/test_checkpoint.py', 'hosts/test_forward.py',
    'hosts/test_packages.py', 'hosts/test_places.py', 'hosts/test_predictions.py', 'hosts/test_samples.py',
    'hosts/test_synthetic.py', 'hosts/test_table.py', 'hosts/test_taps.py', 'hosts/test_versions.py',
    'lab/commands/test_doctor.py', 'lab/test_export_files.py', 'test_golden.py', 'test_host_facts.py')
# Their asserts show values too, as those of test files do.
pytest.register_assert_rewrite('tensors', 'stock')


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Mark what is tested on the maintained forks."""
    tests = Path(__file__).resolve().parent
    paths = [tests / name for name in ON_FORKS]
    for item in items:
        if any(path == item.path or path in item.path.parents for path in paths):
            item.add_marker('onedl')


def pytest_collection_finish():
    """What is there by now, a million objects, stays: no collection has to look at it again."""
    gc.collect()
    gc.freeze()


def write_coco(root: Path, images: int = 8, size=(64, 64), seed: int = 0, empty: int = 1) -> Path:
    """A COCO data set of squares and discs; the last ``empty`` images have no box."""
    draw = np.random.default_rng(seed)
    (root / 'images').mkdir(parents=True, exist_ok=True)
    content = dict(info={}, licenses=[], images=[], annotations=[],
                   categories=[dict(id=i + 1, name=n) for i, n in enumerate(CLASSES)])
    for index in range(images):
        picture = draw.integers(0, 90, (*size, 3)).astype(np.uint8)
        for _ in range(0 if index >= images - empty else 2):
            side = int(draw.integers(16, 30))
            x, y = (int(draw.integers(0, edge - side)) for edge in (size[1], size[0]))
            kind = int(draw.integers(0, 2))
            color = tuple(int(value) for value in draw.integers(150, 255, 3))
            if kind == 0:
                cv2.rectangle(picture, (x, y), (x + side, y + side), color, -1)
            else:
                cv2.circle(picture, (x + side // 2, y + side // 2), side // 2, color, -1)
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=index, category_id=kind + 1, bbox=[x, y, side, side],
                area=side * side, iscrowd=0, segmentation=[[x, y, x + side, y, x + side, y + side, x, y + side]]))
        name = f'{index:04d}.png'
        cv2.imwrite(str(root / 'images' / name), picture)
        content['images'].append(dict(id=index, file_name=name, height=size[0], width=size[1]))
    (root / 'annotations.json').write_text(json.dumps(content))
    return root


def write_cityscapes(root: Path, images: int = 8, size=(64, 64), seed: int = 0) -> Path:
    """A data set in Cityscapes layout: two classes and a border of ignored pixels."""
    draw = np.random.default_rng(seed)
    for kind in ('leftImg8bit', 'gtFine'):
        (root / kind / 'train' / 'town').mkdir(parents=True, exist_ok=True)
    for index in range(images):
        labels = np.zeros(size, np.uint8)
        edge = int(draw.integers(16, 48))
        labels[edge:] = 1
        labels[:2] = 255
        picture = (labels[..., None] * 120 + draw.integers(0, 60, (*size, 3))).clip(0, 255).astype(np.uint8)
        stem = f'town_{index:06d}_000019'
        cv2.imwrite(str(root / 'leftImg8bit' / 'train' / 'town' / f'{stem}_leftImg8bit.png'), picture)
        cv2.imwrite(str(root / 'gtFine' / 'train' / 'town' / f'{stem}_gtFine_labelTrainIds.png'), labels)
    return root


@pytest.fixture(autouse=True)
def no_scope():
    """A test starts as a process does: the scope that a Runner set for the whole process is not its successor's."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('coco'))


@pytest.fixture(scope='session')
def cityscapes_root(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp('cityscapes'))


@pytest.fixture
def said(monkeypatch):
    """Every line of the log."""
    lines = []
    monkeypatch.setattr(MMLogger, 'log', lambda self, level, message, *args, **kwargs: lines.append(str(message)))
    return lines
