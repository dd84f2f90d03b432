"""`speed=` on a real Runner: what it may change, and what stays as it was."""

import copy
from pathlib import Path

import pytest
import torch
from stock import detector, distill_hook, hook, same, segmentor, teacher_of, train, weights

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.preflight import random_data
from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model, load_config
from kd_mm.ops.live import LiveBytes
from kd_mm.teachers.speed import Speed

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'), loss_mimic=dict(type='FitNetLoss', at='backbone.layer2'))
SEG = dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'))


@pytest.fixture
def det(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'det')
    cfg.train_dataloader.sampler.shuffle = False
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'seg')


def fast_of(runner):
    return distill_hook(runner).distiller.teacher.fast


def test_auto_teaches_what_exact_teaches(det):
    exact, exact_record = train(det, [hook(teacher_of(det), CWD, speed='exact')])
    auto, record = train(det, [hook(teacher_of(det), CWD)])
    fast = fast_of(auto)
    assert fast_of(exact).speed.exact and fast.speed.fold and len(fast.folding.pairs) == 20
    assert fast.checked == {'neck', 'backbone.layer2'}
    for one, other in zip(record.losses, exact_record.losses):
        for name in ('loss_cwd', 'loss_mimic'):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    # The form is another one indeed, and the teacher's weights are what they were.
    assert record.losses != exact_record.losses
    assert same(distill_hook(auto).distiller.teacher.model.state_dict(),
                distill_hook(exact).distiller.teacher.model.state_dict())
    assert not any('forward' in vars(module) for module in distill_hook(auto).distiller.teacher.model.modules())


def test_a_cut_run_equals_the_uncut_one(det, tmp_path):
    det.train_cfg.max_iters, det.default_hooks.checkpoint.interval = 4, 2
    entry = hook(teacher_of(det), CWD)
    whole, _ = train(det, [entry])
    side = load_file(str(Path(det.work_dir) / 'iter_2.pth'))['kd_mm']['speed']
    assert side['teacher']['form']['fold'] and side['teacher']['checked'] == ['backbone.layer2', 'neck']
    rest = copy.deepcopy(det)
    rest.work_dir, rest.load_from, rest.resume = str(tmp_path / 'rest'), str(Path(det.work_dir) / 'iter_2.pth'), True
    checks = []
    resumed, _ = train(rest, [entry], lambda runner: checks.append(fast_of(runner).checked))
    assert same(weights(whole), weights(resumed)) and len(checks) == 2


def test_what_did_not_hold_stays_dropped_after_a_resume(det, tmp_path):
    """Another batch might decide otherwise: the file says how the run goes on."""
    entry = hook(teacher_of(det), CWD)
    train(det, [entry])
    path = str(Path(det.work_dir) / 'iter_2.pth')
    checkpoint = torch.load(path, weights_only=False)
    state = checkpoint['kd_mm']['speed']['teacher']
    state['form'].update(fold=False)
    torch.save(checkpoint, path)
    rest = copy.deepcopy(det)
    rest.train_cfg.max_iters = 3
    rest.work_dir, rest.load_from, rest.resume = str(tmp_path / 'rest'), path, True
    runner, _ = train(rest, [entry])
    assert not fast_of(runner).speed.fold


def test_an_average_is_never_stale(det):
    """A folded mean teacher gives what it is after each step, not what it was when it was folded."""
    entry = hook(dict(type='EMATeacher', momentum=0.5), dict(loss_fit=dict(type='FitNetLoss', at='backbone.layer2')),
                 speed=dict(fold=True), teacher_ckpt=None)
    det.train_cfg.max_iters = 3
    gaps = []

    def look(runner):
        teacher = distill_hook(runner).distiller.teacher
        images = torch.randn(2, 3, 64, 64)
        tap = distill_hook(runner).distiller.current.taps['teacher', 'backbone.layer2']
        teacher.fast.run(images, (), [tap])
        folded = tap.read()[0]
        with torch.no_grad():
            exact = teacher.model.backbone(images)[1]
        gaps.append(float((folded - exact).abs().max() / exact.abs().max()))
        assert not teacher.fixed and all(pair._kept is None for pair in teacher.fast.folding.pairs)
        return exact

    _, record = train(det, [entry], look)
    assert max(gaps) < 1e-5 and len(gaps) == 3


def test_an_average_that_a_hook_keeps_is_never_stale(det):
    """Its tensors are changed past torch's version counters."""
    average = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.5, priority=49)
    entry = hook(dict(type='EMATeacher'), dict(loss_fit=dict(type='FitNetLoss', at='backbone.layer2')),
                 teacher_ckpt=None)
    det.train_cfg.max_iters = 3

    def look(runner):
        teacher = distill_hook(runner).distiller.teacher
        assert teacher.shared
        images = torch.randn(2, 3, 64, 64)
        tap = distill_hook(runner).distiller.current.taps['teacher', 'backbone.layer2']
        teacher.fast.run(images, (), [tap])
        with torch.no_grad():
            torch.testing.assert_close(tap.read()[0], teacher.model.backbone(images)[1], rtol=1e-4, atol=1e-5)

    train(det, [entry, average], look)


def test_a_peer_has_no_form_but_its_own(det):
    peer = dict(type='PeerTeacher', config=teacher_of(det))
    with pytest.raises(ValueError, match=r"speed={'fold': True} is for a teacher that does not train"):
        train(det, [hook(peer, CWD, speed=dict(fold=True))])
    runner, _ = train(det, [hook(peer, CWD)])
    assert fast_of(runner).speed.exact
    teachers = dict(fixed=dict(teacher=teacher_of(det), teacher_ckpt='random'),
                    peer=dict(teacher=peer, teacher_ckpt='random'))
    losses = {f'loss_{name}': dict(CWD['loss_cwd'], teacher=name) for name in teachers}
    with pytest.raises(ValueError, match="or give the peer speed='exact' where it is for the other teachers"):
        Distiller(student_of(det), None, losses, teachers=teachers, speed='tune')
    teachers['peer']['speed'] = 'exact'
    found = Distiller(student_of(det), None, losses, teachers=teachers, speed='tune').teachers
    assert found['fixed'].fast.speed.tune and found['peer'].fast.speed.exact


def test_speed_of_each_teacher(det):
    teachers = {name: dict(teacher=teacher_of(det), teacher_ckpt='random', **extra) for name, extra in dict(
        plain=dict(speed='exact'), half=dict(speed=dict(precision='bf16')), rest={}).items()}
    losses = {f'loss_{name}': dict(type='CWDLoss', at='neck', teacher=name) for name in teachers}
    runner, record = train(det, [dict(type='kd_mm.DistillHook', teachers=teachers, losses=losses)])
    found = {name: teacher.fast.speed for name, teacher in distill_hook(runner).distiller.teachers.items()}
    assert found['plain'] == Speed() and found['half'] == Speed(precision='bf16') and found['rest'].fold
    for step in record.losses[:1]:
        assert step['loss_half'] == pytest.approx(step['loss_plain'], rel=0.05) and step['loss_half'] > 0


@pytest.mark.parametrize('extra, message', [
    (dict(speed='quick'), "speed='quick' is not one of 'auto', 'exact', 'tune'"),
    (dict(speed=dict(fold=1.5)), 'fold=1.5 must be True or False'),
    (dict(teachers=dict(a=dict(teacher='x.py', sped='auto'))), "unknown key 'sped'; known are teacher, teacher_ckpt"),
])
def test_bad_speeds_fail_before_the_first_step(det, extra, message):
    entry = dict(type='kd_mm.DistillHook', losses=CWD, **({} if 'teachers' in extra else dict(
        teacher=teacher_of(det), teacher_ckpt='random')), **extra)
    with pytest.raises(ValueError, match=message):
        train(det, [entry])


def test_a_speed_that_no_teacher_looks_at_is_checked_all_the_same(det):
    losses = dict(loss_fit=dict(type='FitNetLoss', student_at='backbone.layer2', teacher_at='backbone.layer3'))
    given = dict(plain=dict(teacher=teacher_of(det), teacher_ckpt='random', speed='exact'))
    for teachers in (dict(teacher='self'), dict(teachers=given)):
        for speed, message in (('quick', "speed='quick' is not one of"), (dict(chunk='all'), "or 'auto'")):
            with pytest.raises(ValueError, match=message):
                Distiller(student_of(det), teachers.get('teacher'), losses, teachers=teachers.get('teachers'),
                          speed=speed)


def test_a_precision_without_its_operators_is_told_before_the_first_step(det):
    """mmcv's deformable convolutions have no bfloat16 on a CPU."""
    deformable = teacher_of(det, neck=dict(in_channels=[32, 64, 128, 256]), backbone=dict(
        depth=50, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, False, False)))
    losses = dict(loss_cwd=CWD['loss_cwd'])
    with pytest.raises(ValueError, match=r"speed=dict\(precision='bf16'\) is not possible here: .*BFloat16.*Leave it"):
        Distiller(student_of(det), deformable, losses, teacher_ckpt='random', speed=dict(precision='bf16'))
    kd = Distiller(student_of(det), teacher_of(det), losses, teacher_ckpt='random', speed=dict(precision='bf16'))
    assert kd.teacher.fast.fault is None


def student_of(cfg):
    model = build_model(load_config(cfg.to_dict())[0], cfg.default_scope)
    model.init_weights()
    return model


def test_parts_of_a_batch_give_what_the_whole_gives(seg):
    whole, whole_record = train(seg, [hook(teacher_of(seg), SEG, speed='exact')])
    parts, record = train(seg, [hook(teacher_of(seg), SEG, speed=dict(chunk=1))])
    most = []
    for one, other in zip(record.losses, whole_record.losses):
        assert one['loss_kd'] == pytest.approx(other['loss_kd'], rel=1e-5)
    distiller = distill_hook(parts).distiller
    distiller.teacher.model.backbone.register_forward_pre_hook(lambda module, given: most.append(given[0].shape[0]))
    images = torch.randn(3, 3, 64, 64)
    distiller.teacher.fast.run(images, [None] * 3, [distiller.current.taps['teacher', 'decode_head.conv_seg']])
    assert most == [1, 1, 1]


def test_the_student_waits_where_the_taps_are_read(det, monkeypatch):
    """A teacher on a stream of its own is joined after the student's forward and before any term looks."""
    kd = Distiller(student_of(det).train(), teacher_of(det), dict(loss_pkd=dict(type='PKDLoss', at='neck')),
                   teacher_ckpt='random')
    events, step = [], kd.current
    monkeypatch.setattr(kd.teacher.fast, 'join', lambda records: events.append(('join', len(list(records)))))
    monkeypatch.setattr(step, 'evaluate', lambda *args, own=step.evaluate: events.append('term') or own(*args))
    kd.student.backbone.register_forward_hook(lambda *_: events.append('student'))
    kd.attach()
    kd.student(**random_data(kd.student, (64, 64)), mode='loss')
    kd.detach()
    assert events == ['student', ('join', 1), 'term']


def test_the_dry_pass_knows_what_student_and_teacher_need(det):
    """A teacher much wider than the student is given fewer images at a time."""
    cfg = teacher_of(det, backbone=dict(depth=50, base_channels=32, stem_channels=32),
                     neck=dict(in_channels=[128, 256, 512, 1024]))
    found = {}
    for name, teacher in dict(wide=cfg, equal=teacher_of(det)).items():
        kd = Distiller(student_of(det), teacher, dict(loss_pkd=dict(type='PKDLoss', at='neck')), teacher_ckpt='random')
        found[name] = kd.teacher.fast
    assert found['equal'].parts(8) == 8 and found['equal'].budget > found['equal'].needed
    assert found['wide'].needed > 3 * found['equal'].needed and found['wide'].budget == found['equal'].budget


def test_the_head_counts_whatever_is_tapped(det):
    """It keeps its maps for the backward pass of the task's losses, not for taps."""
    budgets = [
        Distiller(student_of(det), teacher_of(det), dict(loss_kd=dict(loss, at=at)),
                  teacher_ckpt='random').teacher.fast.budget
        for at, loss in {'neck': dict(type='PKDLoss'), 'bbox_head': dict(type='SigmoidKDLoss')}.items()]
    assert budgets[0] == pytest.approx(budgets[1], rel=0.1)
    student = student_of(det)
    images = random_data(student, (64, 64))['inputs']
    with LiveBytes() as features:
        kept = student.extract_feat(images)
    assert budgets[0] * images.shape[0] > 1.2 * features.held, kept
