"""The configs of classes that grow: the second step learns from the first, on the files that ``kd-mm split`` writes."""

import math
from pathlib import Path

import pytest
from mmengine.config import Config
from shipped import ROUNDING, train_one_step
from stock import distill_hook

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs' / 'growing'
CONFIGS = sorted(FOLDER.glob('*.py'))
LATER = [path for path in CONFIGS if 'custom_hooks = ' in path.read_text()]


def test_the_card_names_every_config():
    card = (FOLDER / 'README.md').read_text()
    assert len(LATER) == 4 and len(CONFIGS) == 8
    assert not [path.name for path in CONFIGS if f'`{path.name}`' not in card]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_heads_and_names_have_as_many_classes(path):
    cfg = Config.fromfile(str(path))
    heads = [cfg.model[name] for name in ('bbox_head', 'decode_head', 'auxiliary_head') if name in cfg.model]
    datasets = [cfg[f'{phase}_dataloader'].dataset for phase in ('train', 'val', 'test')]
    counts = {head.num_classes for head in heads} | {len(dataset.metainfo.classes) for dataset in datasets}
    assert len(counts) == 1
    for dataset in datasets:  # what the command on the card writes, from where the host looks
        place = (Path(dataset.data_root) / dataset.ann_file).as_posix()
        step = 1 if counts & {40, 101} else 2
        assert f'_{"40_40" if "coco" in path.name else "100_50"}/step{step}/' in place and '../' in place


@pytest.mark.parametrize('path', LATER, ids=lambda path: path.stem)
def test_a_step_of_the_second_step(path, tmp_path):
    cfg = Config.fromfile(str(path))
    teacher = Config.fromfile(cfg.custom_hooks[0].teacher)
    own, theirs = (list(config.train_dataloader.dataset.metainfo.classes) for config in (cfg, teacher))
    assert own[:len(theirs)] == theirs and len(own) > len(theirs)
    # Of smaller pictures of a random teacher no cell is sure enough to be a label.
    runner, look, names = train_one_step(cfg, tmp_path, gradients=False, shape=(64, 128))
    assert all(math.isfinite(value) for value in look.losses.values())
    # A copy of its teacher differs by rounding, which has no sign; its gradient does say that it learns.
    assert all(look.losses[name] > -ROUNDING for name in names)
    distiller = distill_hook(runner).distiller
    assert distiller.grown and {name for _, name in distiller.watch.proven} == set(names)
