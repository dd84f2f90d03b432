"""Hosts from outside the package, and scopes that build on a host without an entry."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign import FISH, HEIR, JOINTS, Foreign
from mmengine.config import Config
from stock import detector, hook, retinanet_model, teacher_of, train, wide
from torch import nn

import kd_mm.hosts.known
from kd_mm.hosts.models import build_model, task_of
from kd_mm.hosts.places import find, meaning_at
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.table import Host, host_of, host_of_config, hosts, register, scopes
from kd_mm.hosts.versions import mend
from kd_mm.hosts.zoo import zoo_config, zoo_weights
from kd_mm.lab.check import check
from kd_mm.lab.configs import read_config
from kd_mm.lab.data import look_at_data, training_samples
from kd_mm.lab.models import scope_of
from kd_mm.lab.onnx_run import compare_with


@pytest.fixture
def foreign(tmp_path):
    packages = Foreign(tmp_path / 'site')
    yield packages
    packages.forget()


def fish_config(data, work_dir, entry):
    """The stock RetinaNet of the tests with head, detector and batches of the foreign package."""
    cfg = detector(data, work_dir)
    cfg.default_scope = 'mmfish'
    for part in ('backbone', 'neck'):
        cfg.model[part].type = f'mmdet.{cfg.model[part].type}'
    cfg.model.type, cfg.model.bbox_head.type = 'FishDetector', 'FishHead'
    cfg.model.data_preprocessor.type = 'FishPreprocessor'
    for part in ('anchor_generator', 'bbox_coder', 'loss_cls', 'loss_bbox'):
        cfg.model.bbox_head[part].type = f'mmdet.{cfg.model.bbox_head[part].type}'
    for part in ('assigner', 'sampler'):
        cfg.model.train_cfg[part].type = f'mmdet.{cfg.model.train_cfg[part].type}'
    cfg.visualizer.type = 'mmdet.DetLocalVisualizer'
    dataset = cfg.train_dataloader.dataset
    dataset.type = f'mmdet.{dataset.type}'
    for step in dataset.pipeline:
        if step.type != 'LoadImageFromFile':
            step.type = f'mmdet.{step.type}'
    file = Path(work_dir) / 'fish.py'
    file.parent.mkdir(parents=True, exist_ok=True)
    imports = ['mmfish.kd'] if entry else ['mmfish.models']
    file.write_text(f'custom_imports = dict(imports={imports!r})\n{Config(cfg.to_dict()).pretty_text}')
    return file


def test_a_host_from_outside_by_custom_imports(foreign, coco_root, tmp_path):
    foreign.write('mmfish', FISH)
    cfg = read_config(str(fish_config(coco_root, tmp_path / 'work', True)))
    assert 'mmfish' in scopes() and host_of_config(cfg).note is None
    model = build_model(cfg, None)
    host = host_of(model)
    assert (host.scope, host.task, task_of(model)) == ('mmfish', 'detection', 'detection')
    assert find(model, '@logits').paths == ('bbox_head.scales', )
    assert meaning_at(model, 'bbox_head.scales').kind == 'class'
    assert meaning_at(model, 'bbox_head.retina_reg').kind == 'box'  # by the line of the host above
    data = synthetic_batch(model, 2, (64, 64), training=True)
    assert isinstance(data['inputs'], torch.Tensor) and list(data['data_samples']) == ['fish']
    assert len(synthetic_batch(model, 2, (64, 64))['data_samples']) == 2
    _, recorder = train(cfg, [hook(teacher_of(cfg, **retinanet_model(base=12)), dict(
        loss_logits=dict(type='SigmoidKDLoss', at='@logits'),
        loss_crosskd=dict(type='CrossKDLoss', at='bbox_head')))])
    for losses in recorder.losses:
        assert losses['loss_logits'] > 0 and losses['loss_crosskd'] > 0


def test_its_configs_weights_and_versions(foreign):
    foreign.write('mmfish', FISH)
    __import__('mmfish.kd')
    path = zoo_config('mmfish::one.py')
    assert path.name == 'one.py' and zoo_weights(str(path)) == 'https://fish.example/one.pth'
    with pytest.raises(FileNotFoundError, match='no such config in the installed mmfish. Closest: one.py'):
        zoo_config('mmfish::two.py')
    assert mend('mmfish', '0.9').endswith('pip install "openmm-fish>=1.0"') and mend('mmfish', '1.2') is None


def test_a_host_from_outside_by_an_entry_point(foreign, tmp_path):
    """What is installed is there without a config that names it, and one that is broken keeps nobody else out."""
    foreign.write('mmfish', FISH)
    for name, value in (('fish', 'mmfish.kd:HOST'), ('broken', 'mmfish.nowhere')):
        info = tmp_path / 'site' / f'{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text(f'[kd_mm.hosts]\n{name} = {value}\n')
    code = (f'import sys; sys.path.insert(0, {str(tmp_path / "site")!r})\n'
            'from kd_mm.hosts.table import scopes\nprint("scopes", *scopes())\n'
            'assert not {"mmdet", "mmseg"} & set(sys.modules)')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    said = found.stdout + found.stderr
    assert found.returncode == 0, said
    assert re.search(r'^scopes mmdet mmseg .*mmfish', found.stdout, re.MULTILINE)
    assert "the host 'broken' (mmfish.nowhere, an entry point of kd_mm.hosts) cannot be added" in said


def test_a_scope_below_a_host_needs_no_entry(foreign, coco_root, tmp_path, capfd):
    foreign.write('mmheir', HEIR)
    cfg = detector(coco_root, tmp_path / 'work')
    cfg.default_scope, cfg.log_level = 'mmheir', 'INFO'
    cfg.visualizer.type = 'mmdet.DetLocalVisualizer'
    cfg.train_dataloader.dataset.type = 'mmdet.CocoDataset'
    for step in cfg.train_dataloader.dataset.pipeline[1:]:
        step.type = f'mmdet.{step.type}'
    file = tmp_path / 'heir.py'
    file.write_text(Config(cfg.to_dict()).pretty_text)
    cfg = read_config(str(file))
    found = host_of_config(cfg)
    assert found.host.scope == 'mmdet' and 'its registry of models is below that of mmdet' in found.note
    assert found.note in check(cfg).warnings
    _, recorder = train(cfg, [hook(wide(cfg), dict(loss_logits=dict(type='SigmoidKDLoss', at='@logits')))])
    assert all(losses['loss_logits'] > 0 for losses in recorder.losses)
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert log.count("kd_mm: the scope 'mmheir' has no entry in the table of hosts and is taken for mmdet") == 1
    assert "Not known of it: the heads of its own ('@logits'" in log


def test_the_data_of_a_scope_with_nothing_but_models_are_those_of_its_base(foreign, coco_root, tmp_path):
    """The Runner builds them in the scope of the loop, which mmengine has noted of the base."""
    foreign.write('mmheir', HEIR)
    cfg = detector(coco_root, tmp_path / 'work')
    cfg.default_scope, cfg.train_cfg['_scope_'] = 'mmheir', 'mmdet'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    report = look_at_data(cfg, 2)
    assert not report.problems and training_samples(cfg) == 8
    cfg.test_dataloader = cfg.train_dataloader
    picture = next((coco_root / 'images').iterdir())
    with scope_of(cfg), pytest.raises(ZeroDivisionError):  # from the model: the picture has been read
        compare_with(cfg, SimpleNamespace(test_step=lambda data: 1 / 0), None, [str(picture)], (64, 64))


def test_a_model_that_derives_from_a_host_needs_no_entry(foreign, coco_root, tmp_path):
    """Its features are as good as any; what would need an entry says so."""
    foreign.write('mmfish', FISH)
    cfg = read_config(str(fish_config(coco_root, tmp_path / 'work', False)))
    found = host_of_config(cfg)
    assert found.host.scope == 'mmdet' and 'its FishDetector derives from SingleStageDetector of mmdet' in found.note
    _, recorder = train(cfg, [hook(wide(cfg), dict(loss_pkd=dict(type='PKDLoss', at='@neck')))])
    assert all(losses['loss_pkd'] > 0 for losses in recorder.losses)
    with pytest.raises(KeyError, match="FishHead has no dense class logits.*docs/hosts.md"):
        find(build_model(cfg, None), '@logits')


def joints_config(work_dir):
    return Config(dict(
        default_scope='mmjoints', work_dir=str(work_dir), log_level='WARNING', visualizer=dict(type='Visualizer'),
        model=dict(type='JointEstimator'), train_cfg=dict(by_epoch=True, max_epochs=1),
        train_dataloader=dict(dataset=dict(type='Drawn'), batch_size=2, num_workers=0,
                              sampler=dict(type='DefaultSampler', shuffle=False)),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))))


JOINT_LOSSES = dict(loss_pkd=dict(type='PKDLoss', at='backbone'),
                    loss_maps=dict(type='FitNetLoss', at='head', adapter=None))
JOINT_TEACHER = dict(model=dict(type='JointEstimator', width=12), default_scope='mmjoints')


def test_a_host_without_classes(foreign, tmp_path):
    """Its entry needs no more than what a data sample looks like."""
    foreign.write('mmjoints', JOINTS)
    __import__('mmjoints.kd')
    cfg, losses, teacher = joints_config(tmp_path), JOINT_LOSSES, JOINT_TEACHER
    runner, recorder = train(cfg, [hook(teacher, losses)])
    assert len(recorder.losses) == 2 and host_of(runner.model).scope == 'mmjoints'
    assert all(step[name] > 0 for step in recorder.losses for name in (*losses, 'loss_joints'))
    with pytest.raises(KeyError, match='logits'):
        find(runner.model, '@logits')


def test_a_host_without_an_entry_is_told_to_write_one(foreign, tmp_path):
    """Its model wants data samples, and nobody knows what they look like."""
    foreign.write('mmjoints', JOINTS)
    with pytest.raises(ValueError, match="data_samples.*of no host that is known.*An entry of your own"):
        train(joints_config(tmp_path), [hook(JOINT_TEACHER, JOINT_LOSSES)])


def test_what_builds_on_no_host_is_refused(tmp_path):
    file = tmp_path / 'odd.py'
    file.write_text("default_scope = 'mmnothing'\nmodel = dict(type='Odd')\n")
    with pytest.raises(ValueError, match=r"default_scope='mmnothing'.*model.type='Odd'.*mmdet, mmseg.*docs/hosts.md"):
        read_config(str(file))


def test_bad_entries_say_what_is_wrong():
    with pytest.raises(ValueError, match="task='fishing' must be one of 'detection', 'segmentation'"):
        Host('mmfish', 'fishing')
    with pytest.raises(ValueError, match="task='' must be one of"):
        Host('mmfish')
    with pytest.raises(ValueError, match="scope='' must be the name"):
        Host('', 'detection')
    with pytest.raises(ValueError, match="a host is a kd_mm.hosts.table.Host, not 'mmdet'"):
        register('mmdet')
    own = next(host for host in hosts() if host.scope == 'mmdet')
    register(own)  # the same one
    with pytest.raises(ValueError, match="an entry for the scope 'mmdet' already"):
        register(Host('mmdet', 'detection'))


def test_an_unknown_parent_is_named(foreign):
    foreign.names.append('mmfish')
    register(Host('mmfish', parent='mmsea'))
    with pytest.raises(ValueError, match="Host 'mmfish': its parent 'mmsea' is not in the table of hosts"):
        hosts()


def test_a_copied_head_is_found_by_its_name():
    """Who changes a stock head copies it: the class is of no host and has the name of one."""
    class RetinaHead(nn.Module):
        num_classes = cls_out_channels = 2

    model = nn.Module()
    model.bbox_head = RetinaHead()
    model.bbox_head.retina_cls = nn.Conv2d(4, 2, 1)
    assert find(model, '@logits').paths == ('bbox_head.retina_cls', )


def test_the_page_names_every_host_and_field():
    text = (Path(__file__).resolve().parents[2] / 'docs' / 'hosts.md').read_text()
    known = [host for host in hosts() if (Path(kd_mm.hosts.known.__file__).parent / f'{host.scope}.py').is_file()]
    for host in known:
        row = next(line for line in text.splitlines() if line.startswith(f'| `{host.scope}` |'))
        assert host.task in row and f'`kd_mm/hosts/known/{host.scope}.py`' in row
    described = [name for line in text.splitlines() if line.startswith('| `') for name in line.split('|')[1].split('`')]
    assert not {field.name for field in fields(Host)} - set(described)
