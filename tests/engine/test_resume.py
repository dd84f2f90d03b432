"""A resume restores every state or says which one is missing: adapters, teachers that change, opponents."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from stock import (
    detector,
    distill_hook,
    hook,
    make_runner,
    same,
    segmentor,
    teacher_of,
    train,
    weights,
    with_evaluation,
)

from kd_mm.hosts.checkpoint import load_file

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'))
AVERAGE = dict(type='EMAHook', momentum=0.1)
HOLISTIC = dict(type='SKDHolisticLoss', at='decode_head.conv_seg', width=2, optimizer=dict(type='Adam', lr=0.01))


@pytest.fixture
def det(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'first')
    cfg.train_dataloader.sampler.shuffle = False
    cfg.optim_wrapper.optimizer.lr = 0.05
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path / 'first')
    cfg.model.decode_head.dropout_ratio = cfg.model.auxiliary_head.dropout_ratio = 0.0
    return cfg


def holistic(cfg, **options):
    return [hook(teacher_of(cfg), dict(loss_holistic=dict(HOLISTIC, **options)))]


class First(Hook):
    """What the teacher and the student are when the first step begins."""

    priority = 'LOWEST'

    def __init__(self):
        self.teacher = self.student = None

    def before_train(self, runner):
        teacher = distill_hook(runner).distiller.teacher
        self.teacher = {key: value.clone() for key, value in teacher.model.state_dict().items()}
        self.student = weights(runner)


class Look(First):
    """The same of a teacher by name."""

    def before_train(self, runner):
        super().before_train(runner)
        teacher = distill_hook(runner).distiller.teachers['mean']
        self.teacher = {key: value.clone() for key, value in teacher.model.state_dict().items()}


def mean_teacher(**extra):
    return hook(dict(type='EMATeacher', momentum=0.25, **extra), CWD)


def last(cfg):
    return Path(cfg.work_dir) / f'iter_{cfg.train_cfg.max_iters}.pth'


def resumed(cfg, tmp_path, checkpoint=None):
    rest = copy.deepcopy(cfg)
    rest.work_dir, rest.train_cfg.max_iters = str(tmp_path / 'rest'), cfg.train_cfg.max_iters + 1
    rest.load_from, rest.resume = str(checkpoint or last(cfg)), True
    return rest


def rewritten(cfg, change):
    """The last checkpoint, changed."""
    checkpoint = load_file(last(cfg))
    change(checkpoint)
    path = last(cfg).with_name('changed.pth')
    torch.save(checkpoint, path)
    return path


# ------------------------------------------------------------------------------------------------ the average


def teacher_at_the_end(runner):
    return {key: value.clone() for key, value in distill_hook(runner).distiller.teacher.model.state_dict().items()}


@pytest.mark.parametrize('before', [True, False], ids=['with', 'without'])
@pytest.mark.parametrize('after', [True, False], ids=['with', 'without'])
def test_an_ema_hook_comes_and_goes(det, tmp_path, before, after):
    """Whoever kept the average, and whoever will: the teacher goes on from it."""
    runner, _ = train(det, [mean_teacher(), *([AVERAGE] if before else [])])
    expected, first = teacher_at_the_end(runner), First()
    assert not same(expected, weights(runner))
    rest, _ = train(resumed(det, tmp_path), [mean_teacher(), *([AVERAGE] if after else []), first])
    assert same(first.teacher, expected)
    if after:
        average = next(item for item in rest.hooks if isinstance(item, EMAHook)).ema_model.module
        momentum, old = 0.1, expected
        for name, value in average.named_parameters():
            torch.testing.assert_close(value, (1 - momentum) * old[name] + momentum * weights(rest)[name],
                                       rtol=1e-4, atol=1e-5)
            assert value.data_ptr() == dict(distill_hook(rest).distiller.teacher.model.named_parameters())[
                name].data_ptr()


def test_the_average_is_found_when_it_is_shared_no_longer(det, tmp_path):
    """Also where the EMAHook has exchanged the checkpoint's two sets of weights before the distillation hook looks."""
    runner, _ = train(det, [mean_teacher(), AVERAGE])
    expected = teacher_at_the_end(runner)
    for priority in ('NORMAL', 'VERY_HIGH'):
        first = First()
        train(resumed(det, tmp_path), [mean_teacher(share=False), dict(AVERAGE, priority=priority), first])
        assert same(first.teacher, expected) and same(first.student, weights(runner)), priority


def test_checkpoints_of_earlier_versions(det, tmp_path):
    """A shared average had no entry at all."""
    runner, _ = train(det, [mean_teacher(), AVERAGE])
    old = rewritten(det, lambda checkpoint: checkpoint['kd_mm'].pop('teachers'))
    for hooks in ([AVERAGE], []):
        first = First()
        train(resumed(det, tmp_path, old), [mean_teacher(), *hooks, first])
        assert same(first.teacher, teacher_at_the_end(runner))


def test_a_missing_average_is_an_error(det, tmp_path):
    train(det)
    with pytest.raises(ValueError, match=r"teachers under 'kd_mm' \(missing: teacher\)\. Resume with the config it was "
                                         'written by, or start from its weights with load_from'):
        train(resumed(det, tmp_path), [mean_teacher()])
    with pytest.raises(ValueError, match=r"teachers under 'kd_mm' \(missing: teacher\)"):
        train(resumed(det, tmp_path), [mean_teacher(), AVERAGE])


def test_a_state_that_nobody_takes_is_an_error(det, tmp_path):
    train(det, [mean_teacher()])
    with pytest.raises(ValueError, match=r"teachers under 'kd_mm' \(left over: teacher\)"):
        train(resumed(det, tmp_path), [hook(teacher_of(det), CWD)])
    with pytest.raises(ValueError, match=r"teachers under 'kd_mm' \(teacher: missing: backbone.*left over: "):
        rename = rewritten(det, lambda checkpoint: checkpoint['kd_mm'].update(
            teachers=dict(teacher={'other.weight': torch.zeros(1)})))
        train(resumed(det, tmp_path, rename), [mean_teacher()])
    peer = dict(type='PeerTeacher', config=teacher_of(det))
    with pytest.raises(ValueError, match=r"teachers under 'kd_mm' \(teacher: missing: backbone"):
        train(resumed(det, tmp_path), [hook(peer, CWD)])


def test_resume_in_an_empty_work_dir_is_a_start(det):
    """The host's ``--resume`` without a checkpoint: the average must not stay what the model was built with."""
    det.resume, first = True, First()
    train(det, [mean_teacher(), first])
    assert same(first.teacher, first.student)


@pytest.mark.parametrize('hooks', [[], [AVERAGE], [dict(AVERAGE, priority='VERY_HIGH')]], ids=str)
def test_a_mean_teacher_starts_as_the_student(det, hooks):
    """An EMAHook copies the student before its weights are initialised, and copies it again after the first step."""
    wide = teacher_of(det)
    losses = dict(CWD, loss_fixed=dict(CWD['loss_cwd'], teacher='fixed'))
    losses['loss_cwd'] = dict(CWD['loss_cwd'], teacher='mean')
    first = Look()
    train(det, [dict(type='kd_mm.DistillHook', losses=losses, inherit=['neck'], teachers=dict(
        fixed=dict(teacher=wide, teacher_ckpt='random'),
        mean=dict(teacher=dict(type='EMATeacher', momentum=0.25)))), *hooks, first])
    assert same(first.teacher, first.student) and any(key.startswith('neck.') for key in first.student)


def test_validation_before_a_resumed_training(det, tmp_path, coco_root):
    """The checkpoint is loaded once, before there is anything to restore."""
    runner, _ = train(det, [mean_teacher()])
    again, first = make_runner(with_evaluation(resumed(det, tmp_path), coco_root), [mean_teacher()]), First()
    again.register_hook(first)
    again.val()
    again.train()
    assert same(first.teacher, teacher_at_the_end(runner))  # (the host itself initialises the student once more)


# ------------------------------------------------------------------------------------------------ opponents


def test_missing_and_foreign_opponents(seg, tmp_path):
    train(seg, holistic(seg))
    none = rewritten(seg, lambda checkpoint: checkpoint['kd_mm'].pop('opponents'))
    with pytest.raises(ValueError, match=r"opponents under 'kd_mm' \(missing: loss_holistic/0\)"):
        train(resumed(seg, tmp_path, none), holistic(seg))
    with pytest.raises(ValueError, match=r'loss_holistic/0: the state of another optimizer than SGD'):
        train(resumed(seg, tmp_path), holistic(seg, optimizer=dict(type='SGD', lr=0.01)))
    with pytest.raises(ValueError, match=r"adapters under 'kd_mm' \(left over: loss_holistic.*opponents under "
                                         r"'kd_mm' \(left over: loss_holistic/0\)"):
        train(resumed(seg, tmp_path), [hook(teacher_of(seg), dict(
            loss_kd=dict(type='SoftmaxKDLoss', at='@logits')))])


@pytest.mark.parametrize('old', [False, True], ids=['now', 'a list'])
def test_opponents_are_known_by_name(seg, tmp_path, old):
    """Two losses in another order in the config of the resume keep their own optimizers."""
    losses = dict(loss_one=dict(HOLISTIC), loss_two=dict(HOLISTIC, optimizer=dict(type='Adam', lr=0.02)))
    runner, _ = train(seg, [hook(teacher_of(seg), losses)])
    found = distill_hook(runner).distiller

    def rates(distiller):
        return {term.name: term.loss.opponents()[0].optimizer.param_groups[0]['initial_lr']
                for term in distiller.all_terms()}

    def as_list(checkpoint):
        if old:
            checkpoint['kd_mm']['opponents'] = list(checkpoint['kd_mm']['opponents'].values())

    path = rewritten(seg, as_list)
    swapped = dict(reversed(losses.items()))
    rest, _ = train(resumed(seg, tmp_path, path), [hook(teacher_of(seg), swapped)])
    assert rates(distill_hook(rest).distiller) == rates(found) == dict(loss_one=0.01, loss_two=0.02)
