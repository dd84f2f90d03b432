"""The promises to the user, each on a real Runner with a real model."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from stock import (
    detector,
    distill_hook,
    hook,
    make_runner,
    same,
    segmentor,
    teacher_of,
    traces,
    train,
    weights,
    wide,
    with_evaluation,
)

from kd_mm.hosts.checkpoint import load_file

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=3.0))
SEG = dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'),
           loss_aux=dict(type='CWDLoss', at='auxiliary_head.conv_seg'))


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'det')


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'seg')


def plain_model(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(copy.deepcopy(cfg.model))


def test_nothing_is_left_behind(det):
    stock, _ = train(det)
    runner, recorder = train(det, [hook(wide(det), CWD)])
    assert all(step['loss_cwd'] > 0 for step in recorder.losses)
    assert traces(runner.model) == traces(stock.model)
    checkpoint = load_file(str(Path(det.work_dir) / 'iter_2.pth'))
    assert list(checkpoint['state_dict']) == list(stock.model.state_dict())
    plain_model(det).load_state_dict(checkpoint['state_dict'], strict=True)
    extras = checkpoint['kd_mm']['state_dict']
    assert extras and all('adapter' in key for key in extras)
    assert not any('teacher' in key for key in [*checkpoint['state_dict'], *extras])


def test_between_two_steps_only_two_hooks_are_on_the_student(seg):
    """A copy made by another hook in the middle of training must not drag the teacher along or call the original."""
    seen = []

    def look(runner):
        own = traces(runner.model)[0]
        seen.append({name: flags for name, flags in own.items() if name and any(flags[1:4])})
        clone = copy.deepcopy(runner.model)
        assert not any('forward' in vars(module) for module in clone.modules())
        clone(torch.zeros(1, 3, 64, 64), mode='tensor')
        assert sum(1 for _ in clone.parameters()) == sum(1 for _ in runner.model.parameters())

    train(seg, [hook(teacher_of(seg), SEG)], look)
    assert seen == [{}, {}]


@pytest.mark.parametrize('weight', [
    0, [0.0, 0, 0, 0, 0], dict(type='WindowSchedule', windows=[(100, 200)])])
def test_weight_zero_equals_no_hook_bit_for_bit(det, weight):
    stock, stock_record = train(det)
    losses = dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=weight),
                  loss_mgd=dict(type='MGDLoss', at='neck', loss_weight=0))
    runner, record = train(det, [hook(wide(det), losses)])
    assert record.losses == stock_record.losses
    assert same(weights(runner), weights(stock))
    assert distill_hook(runner).distiller.teacher.runs == 1  # the dry pass alone


def test_weight_zero_equals_no_hook_with_dropout(seg):
    """The segmentor draws dropout masks: the hook may not shift the random stream, even when it does distil."""
    stock, stock_record = train(seg)
    zero, zero_record = train(seg, [hook(teacher_of(seg), dict(loss_kd=dict(SEG['loss_kd'], loss_weight=0)))])
    assert zero_record.losses == stock_record.losses and same(weights(zero), weights(stock))
    mgd = dict(loss_mgd=dict(type='MGDLoss', at='backbone', levels=[3], loss_weight=1e-3))
    _, record = train(seg, [hook(teacher_of(seg), mgd)])
    assert record.losses[0]['decode.loss_ce'] == stock_record.losses[0]['decode.loss_ce']


def test_teacher_is_in_eval_and_frozen_at_every_step(seg):
    def look(runner):
        teacher = distill_hook(runner).distiller.teacher
        assert not any(module.training for module in teacher.model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
        optimized = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']}
        assert not optimized & {id(p) for p in teacher.model.parameters()}
        # Dropout and batch norm of a teacher that someone put into training mode would answer differently.
        teacher.model.decode_head.dropout.train()
        return {key: value.clone() for key, value in teacher.model.state_dict().items()}

    runner, recorder = train(seg, [hook(teacher_of(seg), SEG)], look)
    assert same(recorder.seen[0], recorder.seen[1])
    modules = [name for name, _ in runner.model.named_modules()]
    assert not any('teacher' in name or 'distill' in name for name in modules)


def test_teacher_runs_as_far_as_the_last_tap(det):
    counted = []

    def look(runner):
        teacher = distill_hook(runner).distiller.teacher
        if not counted:
            counted.append(0)

            def count(*_):
                counted[0] += 1
            teacher.model.bbox_head.retina_cls.register_forward_pre_hook(count)

    det.train_cfg.max_iters = 3
    train(det, [hook(wide(det), CWD)], look)
    assert counted == [0]
    logits = dict(loss_cls=dict(type='SigmoidKDLoss', at='bbox_head.retina_cls'))
    counted.clear()
    train(det, [hook(wide(det), dict(loss_kd=logits['loss_cls']))], look)
    assert counted == [10]  # five levels, two steps


def test_teacher_does_not_run_while_all_weights_are_zero(det):
    det.train_cfg.max_iters = 6
    losses = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight=dict(type='WindowSchedule', windows=[(2, 4)])))
    runner, record = train(det, [hook(wide(det), losses)], lambda r: distill_hook(r).distiller.teacher.runs)
    assert record.seen == [1, 1, 2, 3, 3, 3]
    assert ['loss_cwd' in step for step in record.losses] == [False, False, True, True, False, False]


def test_captured_tensors_are_freed_in_the_same_step(det):
    def empty(distiller):
        step = distiller.current
        return not any(tap._records or tap._swap for tap in step.taps.values()) and not step.records

    runner, record = train(det, [hook(wide(det), CWD)], lambda r: empty(distill_hook(r).distiller))
    assert record.seen == [True, True]
    # after an exception in the student's forward, and in validation
    student, distiller = runner.model, distill_hook(runner).distiller
    student.train()
    distiller.attach()
    with pytest.raises(Exception, match='gt_instances|attribute|data_samples|not iterable|NoneType'):
        student(torch.zeros(1, 3, 64, 64), [None], mode='loss')
    assert empty(distiller)
    runs = distiller.teacher.runs
    student.eval()
    student(torch.zeros(1, 3, 64, 64), mode='tensor')
    assert empty(distiller) and distiller.teacher.runs == runs
    distiller.detach()
    distiller.detach()


def test_attaching_twice_is_an_error(det):
    runner, _ = train(det, [hook(wide(det), CWD)])
    distiller = distill_hook(runner).distiller
    distiller.attach()
    with pytest.raises(RuntimeError, match='already attached'):
        distiller.attach()
    distiller.detach()


def test_val_and_test_build_no_teacher(det, coco_root):
    with_evaluation(det, coco_root)
    for evaluate in ('val', 'test'):
        runner = make_runner(det, [hook('no/such/config.py', CWD)])
        assert 'coco/bbox_mAP' in getattr(runner, evaluate)()
        assert distill_hook(runner).distiller is None


def test_inherit_copies_after_init_and_checks_shapes(det, tmp_path):
    teacher = teacher_of(det, backbone=dict(depth=34))
    losses = dict(loss_pkd=dict(type='PKDLoss', at='neck'))
    det.optim_wrapper.optimizer.lr = 0.0
    det.optim_wrapper.optimizer.weight_decay = 0.0
    runner, _ = train(det, [hook(teacher, losses, inherit=('neck', 'bbox_head'))])
    own, other = runner.model, distill_hook(runner).distiller.teacher.model
    assert same(own.neck.state_dict(), other.neck.state_dict())
    assert same(own.bbox_head.state_dict(), other.bbox_head.state_dict())
    with pytest.raises(ValueError, match=r"inherit: 'neck' differs .*student \(16, .*teacher \(24, "):
        train(det, [hook(wide(det), CWD, inherit=('neck', ))])
    with pytest.raises(ValueError, match="student has no module 'nekc'; it has .*backbone, neck"):
        train(det, [hook(wide(det), CWD, inherit='nekc')])


def test_task_loss_weight(det):
    _, stock = train(det)
    _, record = train(det, [hook(wide(det), CWD, task_loss_weight=0.5)])
    first, own = record.losses[0], stock.losses[0]
    assert first['loss_cls'] == pytest.approx(0.5 * own['loss_cls'], rel=1e-6)
    assert first['loss'] == pytest.approx(0.5 * own['loss'] + first['loss_cwd'], rel=1e-5)
    _, record = train(det, [hook(wide(det), CWD, task_loss_weight=0)])
    assert record.losses[0]['loss'] == pytest.approx(record.losses[0]['loss_cwd'], rel=1e-6)


def test_log_has_terms_weights_and_ratio(det):
    import json
    losses = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight=dict(type='LinearWarmup', steps=4, value=2.0)))
    det.train_cfg.max_iters = 3
    train(det, [hook(wide(det), losses)])
    lines = next(Path(det.work_dir).glob('*/vis_data/scalars.json')).read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert 'loss_cwd' not in steps[0]
    assert [step['kd_weight_cwd'] for step in steps[1:]] == [0.5, 1.0]
    for step in steps[1:]:
        assert step['kd_task_ratio'] == pytest.approx(step['loss_cwd'] / (step['loss_cls'] + step['loss_bbox']), 1e-4)


def test_non_finite_term_stops_training_and_saves_nothing(det):
    det.train_cfg.max_iters = 3

    def poison(runner):
        if runner.iter == 0:
            neck = distill_hook(runner).distiller.teacher.model.neck
            neck.fpn_convs[1].conv.weight.fill_(float('nan'))

    with pytest.raises(FloatingPointError, match='not finite at step 1: loss_cwd, level 1'):
        train(det, [hook(wide(det), CWD)], poison)
    assert not list(Path(det.work_dir).glob('*.pth'))
