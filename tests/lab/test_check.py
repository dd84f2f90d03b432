"""The check of a config and its training say the same: what is refused, in which words, and what is not."""

import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from stock import detector, hook, make_runner, retinanet_model, teacher_of, tool, train

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.lab.check import check
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


def test_a_class_that_is_looked_for_in_the_scope_of_a_base(det):
    """What inherits `_base_ = 'mmdet::...'` has that scope in each part; here the other way round, with both hosts."""
    det.model.bbox_head.update(type='MyHead', _scope_='mmseg')
    problem, = check(det, (64, 64)).problems
    assert problem.startswith('the student of this config cannot be built: KeyError: ')
    assert "comes from a _base_ of mmseg" in problem and "write type='mmdet.MyHead'" in problem
    del det.model.bbox_head._scope_
    problem, = check(det, (64, 64)).problems
    assert '_base_' not in problem  # it is nowhere


def test_a_refused_head_names_what_would_run(det, tmp_path, capsys, monkeypatch):
    """The best of our table does not fit heads of two widths: check and training say what does."""
    teacher = teacher_of(det, **retinanet_model(base=12, neck=24))
    teacher['model']['bbox_head']['feat_channels'] = 24
    det.custom_hooks = [hook(teacher, dict(loss_crosskd=dict(type='CrossKDLoss', at='bbox_head')))]
    det.dump(str(tmp_path / 'config.py'))
    said = "What fits this pair: losses={'loss_mimic': {'type': 'MimicLoss'"
    text = told('check_config', [str(tmp_path / 'config.py'), '--shape', '64', '64'], capsys, monkeypatch)
    assert 'feat_channels' in text and said in text and 'kd-mm methods lists what else there is' in text
    text = told('train', [str(tmp_path / 'config.py')], capsys, monkeypatch)
    assert 'feat_channels' in text and said in text
    # what is said runs
    losses = eval(re.search(r'losses=(\{.*\}) \(the recipe', text).group(1))  # noqa: S307
    det.custom_hooks = [hook(teacher, losses)]
    assert check(det, (64, 64)).problems == []
    # a loss on features has problems of another kind
    det.custom_hooks = [hook(teacher, dict(loss_cwd=dict(type='CWDLoss', at='nekc')))]
    report = check(det, (64, 64))
    assert report.problems and report.instead is None


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
    det.strategy = dict(type='mmengine._strategy.ColossalAIStrategy')
    from kd_mm.lab.configs import faults
    assert faults(det) == []
    det.custom_hooks = [hook(teacher_of(det), CWD)]
    assert len(faults(det)) == 2
    det.strategy = dict(type='FSDPStrategy', state_dict_cfg='full')
    assert len(faults(det)) == 1
    det.runner_type = 'SomeRunner'
    assert 'SomeRunner is not supported' in faults(det)[0]


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


# ------------------------------------------------------------------------------------------------ where files are


def log_of(monkeypatch):
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance().__class__, 'log',
                        lambda self, level, message, *args, **kwargs: said.append(str(message)))
    return said


def test_a_teacher_beside_the_config_or_in_the_current_folder(det, tmp_path, capsys, monkeypatch):
    """The current folder comes first; what was taken is said by both."""
    beside, here = tmp_path / 'configs', tmp_path / 'here'
    beside.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    Config(teacher_of(det)).dump(beside / 'wide.py')
    torch.save(dict(state_dict=build_model(Config(teacher_of(det)), 'mmdet').state_dict()), beside / 'wide.pth')
    det.custom_hooks[0].update(teacher='wide.py', teacher_ckpt='wide.pth')
    det.dump(str(beside / 'config.py'))
    cfg = Config.fromfile(str(beside / 'config.py'))
    said = log_of(monkeypatch)
    train(cfg, cfg.custom_hooks)
    copied = Path(cfg.work_dir) / 'config.py'  # the Runner's, from which a run may be resumed
    entry = Config.fromfile(str(copied)).custom_hooks[0]
    assert (entry.teacher, entry.teacher_ckpt) == (str(beside / 'wide.py'), str(beside / 'wide.pth'))
    assert check(Config.fromfile(str(copied)), (64, 64)).problems == []
    assert tool('check_config').main([str(beside / 'config.py'), '--shape', '64', '64']) == 0
    checked = capsys.readouterr().out
    for name in ('wide.py', 'wide.pth'):
        sentence = f'teacher file {name} is {beside / name}, in the folder of the config'
        assert sentence in checked and any(sentence in line for line in said)
    # A peer's config, one of several teachers, and what the other tools read.
    for teacher in (dict(teacher=dict(type='PeerTeacher', config='wide.py')),
                    dict(teacher=None, teacher_ckpt=None, teachers=dict(a=dict(teacher='wide.py',
                                                                               teacher_ckpt='wide.pth')))):
        cfg.custom_hooks[0].update(teacher)
        assert check(cfg, (64, 64)).problems == []
    assert tool('list_taps').main([str(beside / 'config.py'), '--teacher', '--shape', '64', '64']) == 0
    Config(teacher_of(det)).dump(here / 'wide.py')
    assert tool('check_config').main([str(beside / 'config.py'), '--shape', '64', '64']) == 0
    assert f'wide.py is {here / "wide.py"}, in the current folder' in capsys.readouterr().out


def test_a_file_that_is_in_neither_folder(det, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    for name, extra in (('wide.py', dict(teacher='wide.py')), ('wide.pth', dict(teacher_ckpt='wide.pth'))):
        det.custom_hooks = [{**hook(teacher_of(det), CWD), **extra}]
        det.dump(str(tmp_path / 'configs' / 'config.py'))
        cfg = Config.fromfile(str(tmp_path / 'configs' / 'config.py'))
        both = f'(looked at {tmp_path / name} and {tmp_path / "configs" / name}'
        refused(cfg, re.escape(both))


# ------------------------------------------------------------------------------------------------ the same words


def refused(cfg, message):
    """Check and training both refuse, with a sentence that fits; all that check said."""
    found = check(cfg, (64, 64)).problems
    assert any(re.search(message, problem) for problem in found), found
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        train(cfg, cfg.custom_hooks)
    text = str(caught.value)
    assert any(problem in text or text in problem for problem in found), (found, text)
    return found


def test_a_loss_that_is_named_like_the_students_own(det):
    """Before the first step, and without a trace on the student."""
    det.custom_hooks = [hook(teacher_of(det), dict(loss_cls=CWD['loss_cwd'], loss_x=CWD['loss_cwd']))]
    assert refused(det, "the student already has a loss named 'loss_cls'; rename") == [
        "the student already has a loss named 'loss_cls'; rename the distillation loss"]
    runner = make_runner(det, det.custom_hooks)
    with pytest.raises(ValueError, match=r'1 problem\(s\).*\n.*already has a loss named'):
        runner.train()
    assert runner.iter == 0
    # Without the student's own losses the name is free.
    det.custom_hooks[0].task_loss_weight = 0
    assert check(det, (64, 64)).problems == []
    _, record = train(det, det.custom_hooks)
    assert record.losses[0]['loss_cls'] > 0


def test_looking_for_the_names_leaves_the_student_as_it_was(coco_root, tmp_path):
    """GHM's loss averages the gradients that it has seen, in a buffer."""
    cfg = detector(coco_root, tmp_path)
    cfg.model.bbox_head.loss_cls = dict(_delete_=True, type='GHMC', bins=10, momentum=0.75, use_sigmoid=True)
    student = build_model(Config(dict(model={**cfg.model, 'bbox_head': {
        **cfg.model.bbox_head, 'loss_cls': dict(type='GHMC', bins=10, momentum=0.75, use_sigmoid=True)}})), 'mmdet')
    before = {key: value.clone() for key, value in student.state_dict().items()}
    sums = student.bbox_head.loss_cls.acc_sum.clone()
    state, flags = torch.get_rng_state(), [module.training for module in student.modules()]
    with pytest.raises(ValueError, match="already has a loss named 'loss_bbox'"):
        Distiller(student, teacher_of(detector(coco_root, tmp_path)), dict(loss_bbox=CWD['loss_cwd']),
                  teacher_ckpt='random', scope='mmdet')
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert torch.equal(student.bbox_head.loss_cls.acc_sum, sums)
    assert torch.equal(state, torch.get_rng_state()) and flags == [module.training for module in student.modules()]


def test_one_class_without_a_comma_is_told_by_the_check(det):
    det.train_dataloader.dataset.metainfo = dict(classes=('disc'))
    assert any('needs a comma' in warning for warning in check(det, (64, 64)).warnings)


# ------------------------------------------------------------------------------------------------ the teacher's config


def test_errors_of_the_teachers_own_config_name_it(det):
    det.custom_hooks[0].teacher = teacher_of(det, neck=dict(norm_confg=None))
    refused(det, "teacher of type 'RetinaNet' cannot be built: TypeError: .*norm_confg")


def test_a_teacher_that_reads_a_file_of_its_own(det):
    det.custom_hooks[0].teacher = 'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py'
    refused(det, 'its own config names a file that is not there.*configs/gfl/gfl_r101.*relative path is looked for in')


def test_a_teacher_whose_parts_lie_deeper(det):
    """The semi-supervised wrapper of the zoo holds a student and a teacher."""
    inner = dict(type='RetinaNet', **{key: value for key, value in det.model.to_dict().items() if key != 'type'})
    wrapper = dict(
        type='SoftTeacher', detector=inner, semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'), data_preprocessor=dict(
            type='MultiBranchDataPreprocessor', data_preprocessor=det.model.data_preprocessor.to_dict()))
    det.custom_hooks[0].teacher = dict(model=wrapper, default_scope='mmdet')
    refused(det, "teacher has no module 'neck'. Closest: 'teacher.neck'.* teacher_at='teacher.neck'")
    det.custom_hooks[0].losses.loss_cwd = dict(type='CWDLoss', student_at='neck', teacher_at='teacher.neck')
    assert check(det, (64, 64)).problems == []
    assert train(det, det.custom_hooks)[1].losses[0]['loss_cwd'] > 0


# ------------------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize('source', ['peer', 'teacher'])
def test_no_teacher_is_drawn_as_the_student_is(det, source):
    """Two equal networks learn nothing from each other: not with the same seed for the Runner and the hook, either."""
    det.randomness = dict(seed=0)
    config = teacher_of(det)
    teacher = dict(type='PeerTeacher', config=config) if source == 'peer' else config
    det.custom_hooks = [hook(teacher, CWD, seed=0, teacher_ckpt='random')]
    runner, record = train(det, det.custom_hooks)
    assert record.losses[0]['loss_cwd'] > 1e-4
    report = check(det, (64, 64))
    assert report.problems == [] and report.warnings == [] and report.step.terms[0].loss > 1e-4
    weights = [next(model.backbone.parameters()) for model in (report.student, report.distiller.teacher.model)]
    assert not torch.equal(*weights)
