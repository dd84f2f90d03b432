"""The check of a config and its training say the same: what is refused, in which words, and what is not."""

import sys

import pytest
from mmengine.config import Config
from stock import detector, hook, teacher_of, tool

from kd_mm.lab.configs import apply_options, hook_entries, read_config

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'))


@pytest.fixture
def det(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'work')
    cfg.custom_hooks = [hook(teacher_of(cfg), CWD)]
    return cfg


@pytest.fixture
def file(det, tmp_path):
    det.dump(str(tmp_path / 'config.py'))
    return str(tmp_path / 'config.py')


def told(name, arguments, capsys, monkeypatch):
    """What a tool prints or ends with, when called with a wrong config or option."""
    monkeypatch.setattr(sys, 'argv', [f'{name}.py'])
    try:
        assert tool(name).main(arguments) == 1
    except SystemExit as error:
        assert isinstance(error.code, str)
        return error.code
    caught = capsys.readouterr()
    return caught.out + caught.err


# ------------------------------------------------------------------------------------------------ the hook's entry


@pytest.mark.parametrize('name', ['DistillHook', 'mmdet.DistillHook', 'nobody.DistillHook'])
def test_a_name_that_no_runner_finds(det, tmp_path, capsys, monkeypatch, name):
    det.custom_hooks[0].type = name
    det.dump(str(tmp_path / 'config.py'))
    message = f"custom_hooks: the Runner does not find type={name!r}; write type='kd_mm.DistillHook'"
    for which in ('train', 'check_config'):
        assert message in told(which, [str(tmp_path / 'config.py')], capsys, monkeypatch)
    assert not (tmp_path / 'work').exists()


def test_whose_hook_it_is(det):
    """By what the Runner would make of it, not by the name alone."""
    det.custom_hooks = [dict(type='EMAHook'), dict(type='kd_mm.engine.hook.DistillHook')]
    det.default_hooks.one = hook(teacher_of(det), CWD)
    det.default_hooks.two = None
    assert [entry.type for entry in hook_entries(det)] == ['kd_mm.engine.hook.DistillHook', 'kd_mm.DistillHook']


def test_wrong_arguments_before_anything_is_built(det, tmp_path, capsys, monkeypatch):
    det.custom_hooks[0].update(colour='red', seed='a')
    det.dump(str(tmp_path / 'config.py'))
    for which in ('train', 'check_config'):
        text = told(which, [str(tmp_path / 'config.py')], capsys, monkeypatch)
        assert "DistillHook got unknown argument(s) 'colour'" in text and "seed='a' must be a whole number" in text


def test_a_config_without_the_hook_may_have_what_the_hook_refuses(det):
    det.custom_hooks = []
    det.runner_type, det.optim_wrapper.type = 'FlexibleRunner', 'OptimWrapperDict'
    from kd_mm.lab.configs import faults
    assert faults(det) == []
    det.custom_hooks = [hook(teacher_of(det), CWD)]
    assert len(faults(det)) == 2


# ------------------------------------------------------------------------------------------------ options


OPTIONS = [
    ('custom_hooks.1.seed=3', ["custom_hooks.1.seed=...: '1' is no index of the list custom_hooks",
                               'It has: 0 (DistillHook)']),
    ('custom_hooks.first.seed=3', ["'first' is no index of the list custom_hooks"]),
    ('custom_hooks.0.losses.loss_cwd.tau.x=3', ['custom_hooks.0.losses.loss_cwd.tau=1.0 has nothing below it']),
    ('custom_hoks.0.seed=3', ["the config has no list 'custom_hoks' for the index 0. Its lists: custom_hooks"]),
    ('custom_hooks.0.sead=3', ["unknown argument(s) 'sead'. It accepts: teacher, losses"]),
    ('val_dataloader.batch_size=3', ['val_dataloader=None has nothing below it']),
]


@pytest.mark.parametrize(('option', 'messages'), OPTIONS, ids=[option for option, _ in OPTIONS])
def test_an_option_that_leads_nowhere(det, tmp_path, capsys, monkeypatch, option, messages):
    det.custom_hooks[0].losses.loss_cwd.tau = 1.0
    det.dump(str(tmp_path / 'config.py'))
    for which in ('train', 'check_config'):
        text = told(which, [str(tmp_path / 'config.py'), '--cfg-options', option], capsys, monkeypatch)
        assert all(message in text for message in messages), text


def test_options_that_lead_somewhere(file):
    cfg = read_config(file, {'custom_hooks.0.losses.loss_cwd.tau': 2.0, 'new.key': 1, 'custom_hooks.0.seed': 3})
    assert cfg.custom_hooks[0].losses.loss_cwd.tau == 2.0 and cfg.custom_hooks[0].seed == 3 and cfg.new.key == 1
    pair = Config(dict(pair=(dict(a=1), )))
    with pytest.raises(ValueError, match='pair=.* has nothing below it'):
        apply_options(pair, {'pair.0.a': 2})
