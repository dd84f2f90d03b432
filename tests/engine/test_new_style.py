"""Configs with classes for ``type``, ``read_base()`` and no default scope, as the hosts' newer ones are."""

import copy
import importlib

import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.registry import DefaultScope, Registry
from stock import detector, segmentor, tool, with_evaluation

from kd_mm.hosts.models import build_model, load_config, scope_of_config
from kd_mm.lab.check import check
from kd_mm.lab.configs import dropped_hooks, read_config

AS_NAMES = ('norm_cfg', 'init_cfg')


def source(value, imports, scope='mmdet'):
    """A config's value as a new-style file has it; ``imports`` gets the classes."""
    if isinstance(value, dict):
        parts = []
        for key, item in value.items():
            if key == 'type' and isinstance(item, str) and item != 'nms':
                parts.append(f'type={class_of(item, imports, scope)}')
            else:
                held = set() if key in AS_NAMES else imports
                parts.append(f'{key}={repr(item) if key in AS_NAMES else source(item, held, scope)}')
        return f'dict({", ".join(parts)})'
    if isinstance(value, (list, tuple)):
        inner = ', '.join(source(item, imports, scope) for item in value)
        return f'[{inner}]' if isinstance(value, list) else f'({inner}{"," if value else ""})'
    return repr(value)


def class_of(name, imports, scope):
    if name.startswith(f'{scope}.'):
        name = name.split('.')[-1]
    registries = [value for value in vars(importlib.import_module(f'{scope}.registry')).values()
                  if isinstance(value, Registry) and value.scope == scope]
    with DefaultScope.overwrite_default_scope(scope):
        found = next((cls for cls in (registry.get(name) for registry in registries) if cls is not None), None)
    assert found is not None, name
    imports.add(f'from {found.__module__} import {found.__name__}')
    return found.__name__


def write(path, cfg, entry=None, base=None, scope='mmdet'):
    imports = set()
    lines = [] if base else [f'{key} = {source(value, imports, scope)}' for key, value in cfg.items()
                             if key not in ('default_scope', 'custom_hooks') and not key.startswith('_')]
    if entry is not None:
        imports.add('from kd_mm.engine.hook import DistillHook')
        imports.add('from kd_mm.losses.cwd import CWDLoss')
        lines.append(f'custom_hooks = [dict(type=DistillHook, {entry})]')
    head = f'from mmengine.config import read_base\nwith read_base():\n    from .{base} import *\n' if base else ''
    path.write_text('\n'.join([head, *sorted(imports), *lines, 'default_scope = None', '']))
    return path


@pytest.fixture
def folder(coco_root, tmp_path):
    """A student's base and a teacher, both new, and a student that inherits."""
    cfg = with_evaluation(detector(coco_root, tmp_path / 'work'), coco_root).to_dict()
    write(tmp_path / 'base.py', cfg)
    teacher = copy.deepcopy(cfg)
    teacher['model']['neck']['out_channels'] = 24
    teacher['model']['bbox_head'].update(in_channels=24, feat_channels=24)
    teacher['model']['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    write(tmp_path / 'teacher.py', teacher)
    text = (tmp_path / 'teacher.py').read_text().replace("{'type': 'Pretrained', ", 'dict(type=PretrainedInit, **{')
    text = text.replace("'torchvision://resnet18'}", "'torchvision://resnet18'})")
    (tmp_path / 'teacher.py').write_text('from mmengine.model import PretrainedInit\n' + text)
    write(tmp_path / 'student.py', cfg, f"teacher={str(tmp_path / 'teacher.py')!r}, teacher_ckpt='random', "
          "losses=dict(loss_cwd=dict(type=CWDLoss, at='neck'))", base='base')
    return tmp_path


def test_the_tools_train_and_check(folder, monkeypatch):
    path = str(folder / 'student.py')
    monkeypatch.delenv('RANK', raising=False)
    cfg = read_config(path)
    assert cfg.get('default_scope') is None and scope_of_config(cfg) == 'mmdet'
    assert isinstance(cfg.model['type'], type)
    report = check(cfg, (64, 64))
    assert report.problems == [] and report.step.terms[0].loss > 0
    assert tool('check_config').main([path, '--shape', '64', '64']) == 0
    work = folder / 'trained'
    tool('train').main([path, '--work-dir', str(work)])
    assert (work / 'iter_2.pth').is_file()
    assert tool('test').main([path, str(work / 'iter_2.pth'), '--work-dir', str(folder / 'tested')]) in (None, 0)
    for more in ((), ('--teacher', )):
        assert tool('list_taps').main([path, *more, '--shape', '64', '64', '--filter', 'neck']) == 0
    assert tool('measure').main([path, '--shape', '64', '64', '--batch', '1', '--steps', '1']) in (None, 0)


def test_a_segmenter(cityscapes_root, tmp_path, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    cfg = segmentor(cityscapes_root, tmp_path / 'work').to_dict()
    write(tmp_path / 'base.py', cfg, scope='mmseg')
    write(tmp_path / 'teacher.py', segmentor(cityscapes_root, tmp_path / 'work', base=12).to_dict(), scope='mmseg')
    student = write(tmp_path / 'student.py', cfg, f"teacher={str(tmp_path / 'teacher.py')!r}, teacher_ckpt='random', "
                    "losses=dict(loss_cwd=dict(type=CWDLoss, at='@logits'))", base='base', scope='mmseg')
    report = check(read_config(str(student)), (64, 64))
    assert report.problems == [] and report.step.terms[0].loss > 0
    tool('train').main([str(student), '--work-dir', str(tmp_path / 'trained')])
    assert (tmp_path / 'trained' / 'iter_2.pth').is_file()


def test_a_hook_of_the_base_that_is_lost(folder):
    """A list of hooks replaces that of the base in this style too; one that is taken over does not."""
    base, student = folder / 'base.py', folder / 'student.py'
    base.write_text(base.read_text() + "from mmengine.hooks import EMAHook\ncustom_hooks = [dict(type=EMAHook)]\n")
    lost, = dropped_hooks(read_config(str(student)))
    assert 'student.py replaces the list of' in lost and 'base.py and drops EMAHook' in lost
    student.write_text(student.read_text().replace('custom_hooks = [', 'custom_hooks = [*custom_hooks, '))
    assert dropped_hooks(read_config(str(student))) == []


def test_a_student_of_names_with_a_new_teacher(folder, coco_root):
    from stock import hook, train
    cfg = detector(coco_root, folder / 'classic')
    _, record = train(cfg, [hook(str(folder / 'teacher.py'), dict(loss_cwd=dict(type='CWDLoss', at='neck')))])
    assert all(step['loss_cwd'] > 0 for step in record.losses)


@pytest.mark.parametrize('kind', ['Pretrained', 'PretrainedInit', 'mmengine.model.PretrainedInit', PretrainedInit],
                         ids=str)
def test_a_pretrained_backbone_is_not_fetched(folder, kind):
    """By name, by path, as a class, alone or in a list: a check needs no download."""
    part = dict(type=kind, checkpoint='torchvision://resnet18')
    for init in (part, [dict(type='Kaiming', layer='Conv2d'), part]):
        model = load_config(str(folder / 'base.py'))[0].model
        model['backbone']['init_cfg'] = init
        for given in (Config(dict(model=model)), load_config(dict(model))[0]):
            build_model(given, 'mmdet').init_weights()


def test_no_scope_and_no_host(tmp_path):
    (tmp_path / 'other.py').write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(ValueError, match="default_scope=None, and model.type='RetinaNet' is no class of theirs"):
        read_config(str(tmp_path / 'other.py'))


def test_the_student_is_exported(folder, monkeypatch, capsys):
    """With the stored config, in which classes are paths, and with the file; neither keeps the hook."""
    monkeypatch.delenv('RANK', raising=False)
    path, work = str(folder / 'student.py'), folder / 'trained'
    tool('train').main([path, '--work-dir', str(work)])
    for name, more in (('stored.pth', []), ('file.pth', ['--config', path])):
        tool('export_student').main([str(work / 'iter_2.pth'), str(folder / name), *more])
        assert 'loads strictly into RetinaNet' in capsys.readouterr().out
        exported = torch.load(folder / name, weights_only=True)
        assert 'kd_mm' not in exported['meta']['cfg']
        model = build_model(Config.fromstring(exported['meta']['cfg'], '.py'), None)
        model.load_state_dict(exported['state_dict'])
