"""Weights that are measured: what they hold, and that measuring changes nothing else."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run
from stock import detector, distill_hook, hook, same, segmentor, teacher_of, train, weights
from torch.utils.checkpoint import checkpoint

from kd_mm.engine import balance
from kd_mm.engine.balance import State, measure
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.preflight import random_data
from kd_mm.engine.term import STUDENT, Term
from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model, load_config
from kd_mm.ops.schedules import AutoWeight, Schedule
from kd_mm.registry import MODELS
from kd_mm.types.records import Recorded

AUTO = dict(type='AutoWeight', warmup=0)


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'work', steps=6)


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'work', steps=6)


def states(runner):
    return distill_hook(runner).distiller.balance.state()


def pkd(weight, **extra):
    return dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=weight, **extra))


# ------------------------------------------------------------------------------------------- what is held


def own_pulls(model, data, path, term_loss):
    """The two norms by plain autograd at the output of a module, without any part of ours."""
    kept = {}

    def keep(module, args, output):
        kept['maps'] = output

    handle = model.get_submodule(path).register_forward_hook(keep)
    losses = model(**copy.deepcopy(data), mode='loss')
    handle.remove()
    task = model.parse_losses(losses)[0]

    def norm(value):
        found = torch.autograd.grad(value, kept['maps'], retain_graph=True)
        return float(torch.stack([gradient.double().square().sum() for gradient in found]).sum().sqrt())

    return norm(task), norm(term_loss(kept['maps']))


@pytest.mark.parametrize('share, factor', [(1.0, 1.0), (0.25, 1.0), (1.0, 0.5)])
def test_the_weight_makes_the_share(det, share, factor):
    """The first step against the quotient of two norms that the test works out by itself."""
    student, teacher = (build_model(load_config(cfg)[0], 'mmdet') for cfg in (det.to_dict(), teacher_of(det)))
    student.init_weights()
    kd = Distiller(student, teacher, pkd(dict(AUTO, share=share)), scope='mmdet', task_loss_weight=factor)
    student.train()
    data = random_data(student, (64, 64))
    with torch.no_grad():
        theirs = teacher.eval().extract_feat(data['inputs'])
    task, own = own_pulls(student, data, 'neck', lambda maps: kd.terms['loss_pkd'].loss(maps, theirs))
    kd.attach()
    result = student(**data, mode='loss')
    assert float(result['kd_weight_pkd']) == pytest.approx(share * factor * task / own, rel=1e-4)
    assert float(kd.after_step()['kd_share_pkd']) == pytest.approx(share, rel=1e-4)
    kd.detach()


@pytest.mark.parametrize('by', ['gradient', 'loss'])
def test_a_term_times_1000_ends_at_the_weight_by_1000(det, by):
    found = []
    for size in (1.0, 1000.0):
        weight = dict(levels=[size] * 5, schedule=dict(AUTO, every=2, by=by))
        runner, record = train(det, [hook(teacher_of(det), pkd(weight))], states)
        found.append([State(**seen['loss_pkd']).weight(AutoWeight(warmup=0)) for seen in record.seen])
        assert record.losses[-1]['loss_pkd'] > 0
    one, thousand = found
    assert thousand == pytest.approx([weight / 1000 for weight in one], rel=1e-4)
    assert len(set(one)) > 3  # it was measured again and again


def test_by_loss_is_the_quotient_of_the_values(det):
    _, record = train(det, [hook(teacher_of(det), pkd(dict(AUTO, share=0.3, by='loss', every=1, smoothing=0)))])
    for step in record.losses:
        task = sum(value for name, value in step.items() if name in ('loss_cls', 'loss_bbox'))
        assert step['loss_pkd'] == pytest.approx(0.3 * task, rel=1e-4)
        assert step['kd_task_ratio'] == pytest.approx(0.3, rel=1e-4)


def test_schedules_are_multiplied(det):
    product = dict(type='ProductSchedule', schedules=[
        'auto', dict(type='WindowSchedule', windows=[(2, 5)], value=0.5)])
    _, record = train(det, [hook(teacher_of(det), pkd(product))], states)
    assert ['loss_pkd' in step for step in record.losses] == [False, False, True, True, True, False]
    assert record.seen[1]['loss_pkd']['steps'] == 0 and record.seen[-1]['loss_pkd']['steps'] == 3
    first = record.seen[2]['loss_pkd']
    assert first['share'] == pytest.approx(0.5 * 1 / 100)  # the schedule's half, in the first of 100 steps of warm-up
    assert record.losses[2]['kd_weight_pkd'] == pytest.approx(0.5 * math.exp(first['mean']) / 100, rel=1e-5)


def test_warm_up_bounds_and_smoothing():
    state, settings = State(), AutoWeight(share=2.0, warmup=4, smoothing=0.5, bounds=(0.1, 5.0))
    assert state.weight(settings) == 0  # nothing is known
    state.learn(settings, 2.0)
    seen = []
    for state.steps in range(6):
        seen.append(state.weight(settings))
    assert seen == pytest.approx([1, 2, 3, 4, 4, 4])
    state.learn(settings, 8.0)  # the first two are averaged: log 4 = (log 2 + log 8) / 2
    assert state.mean == pytest.approx(math.log(4)) and state.weight(settings) == pytest.approx(5)
    for quotient in (1e-6, 1e-6):
        state.learn(settings, quotient)
    assert state.mean == pytest.approx(math.log(4) / 4 + 0.75 * math.log(1e-6))
    assert state.weight(settings) == pytest.approx(0.1)


def test_when_it_is_measured():
    state, settings = State(count=1), AutoWeight(every=20)
    due = []
    for state.steps in range(65):
        due += [state.steps] if state.due(settings) else []
    assert due == [0, 1, 2, 4, 8, 16, 20, 40, 60]
    assert State(steps=7).due(settings)  # until there is a first one


# ------------------------------------------------------------------------------------------- nothing else changes


class Playback(Schedule):
    """The weights of another run."""

    weights = ()

    def __call__(self, step, max_steps=0):
        return self.weights[step]


@pytest.mark.parametrize('checkpointed', [False, True], ids=['plain', 'checkpoints that run again'])
def test_measuring_changes_no_gradient_no_statistics_and_no_random_state(seg, monkeypatch, checkpointed):
    """A training with measured weights equals one with the same weights as numbers, bit for bit."""
    monkeypatch.setitem(MODELS.module_dict, 'Playback', Playback)
    if checkpointed:  # below the tap nothing runs again while measuring; above it the head's convolutions do
        from mmseg.models.decode_heads import FCNHead
        forward = FCNHead._forward_feature
        monkeypatch.setattr(FCNHead, '_forward_feature', lambda head, inputs: checkpoint(
            lambda *maps: forward(head, maps), *inputs, use_reentrant=False))
    losses = dict(type='FitNetLoss', at='backbone', levels=[3], adapter=dict(type='ConvAdapter', always=True))
    settings = dict(AUTO, every=1, smoothing=0.5)
    measured, record = train(seg, [hook(teacher_of(seg), dict(loss_hint=dict(losses, loss_weight=settings)))], states)
    monkeypatch.setattr(Playback, 'weights', [
        State(**seen['loss_hint']).weight(AutoWeight(warmup=0)) for seen in record.seen])
    assert len(set(Playback.weights)) == 6
    monkeypatch.setattr(balance, 'measure', None)  # it would fail if called
    given, expected = train(seg, [hook(teacher_of(seg), dict(loss_hint=dict(losses, loss_weight=dict(
        type='Playback'))))])
    assert record.losses == expected.losses and same(weights(measured), weights(given))


def test_other_terms_and_a_weight_of_zero_are_left_alone(det, monkeypatch):
    plain, expected = train(det)
    monkeypatch.setattr(balance, 'measure', None)
    zero, record = train(det, [hook(teacher_of(det), pkd(dict(levels=[0] * 5, schedule='auto')))])
    assert record.losses == expected.losses and same(weights(zero), weights(plain))


def test_cut_and_resumed_is_equal_bit_for_bit(det, tmp_path):
    det.train_dataloader.sampler.shuffle = False
    losses = {**pkd(dict(AUTO, every=2)), 'loss_cwd': dict(type='CWDLoss', at='backbone', loss_weight='auto')}
    whole, record = train(det, [hook(teacher_of(det), losses)], states)
    first = copy.deepcopy(det)
    first.train_cfg.max_iters, first.work_dir = 4, str(tmp_path / 'first')
    first.default_hooks.checkpoint.interval = 4
    train(first, [hook(teacher_of(det), losses)])
    saved = load_file(Path(first.work_dir) / 'iter_4.pth')['kd_mm']['weights']
    assert saved == record.seen[3]
    rest = copy.deepcopy(det)
    rest.load_from, rest.resume, rest.work_dir = str(Path(first.work_dir) / 'iter_4.pth'), True, str(tmp_path / 'rest')
    resumed, end = train(rest, [hook(teacher_of(det), losses)], states)
    assert end.seen == record.seen[4:] and end.losses == record.losses[4:]
    assert same(weights(resumed), weights(whole))


def test_a_resume_without_what_was_measured_is_an_error(det, tmp_path):
    train(det, [hook(teacher_of(det), pkd(1.0))])
    det.load_from, det.resume = str(Path(det.work_dir) / 'iter_6.pth'), True
    det.train_cfg.max_iters, det.work_dir = 7, str(tmp_path / 'rest')
    with pytest.raises(ValueError, match=r"measured weights under 'kd_mm' \(missing: loss_pkd\)\. Resume with the"):
        train(det, [hook(teacher_of(det), pkd('auto'))])


@pytest.mark.parametrize('counts', [1, 2], ids=['one step', 'accumulated with no_sync'])
def test_two_processes_have_the_same_weights(cityscapes_root, tmp_path, counts):
    worker = Path(__file__).resolve().parents[1] / 'helpers' / 'ddp_balance_worker.py'
    first, second = run([str(worker), str(cityscapes_root), str(tmp_path / 'two'), str(counts), 'pytorch'],
                        tmp_path / 'two', 2)
    assert first['states'] == second['states'] and first['states'][-1].keys() == {'loss_kd', 'loss_hint', 'loss_value'}
    assert all(state['count'] == 4 and state['mean'] != 0 for state in first['states'][-1].values())
    assert first['losses'] != second['losses']  # other pictures
    for part in ('student', 'extras'):
        for key, value in first[part].items():
            if 'running_' not in key and 'num_batches' not in key:
                torch.testing.assert_close(second[part][key], value, rtol=0, atol=0, msg=key)


# ------------------------------------------------------------------------------------------- ways of training


@pytest.mark.no_cover  # nothing of ours runs here alone, and tracing the compiler takes half as long again
def test_compiled(seg):
    """The taps inside one compiled graph are measured by what lies after the graph, so both must be outside."""
    seg.train_cfg.max_iters = 2
    seg.train_dataloader.sampler.shuffle = False
    seg.model.decode_head.dropout_ratio = seg.model.auxiliary_head.dropout_ratio = 0.0
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits', loss_weight=AUTO),
                  loss_hint=dict(type='FitNetLoss', at='backbone', loss_weight=AUTO))
    _, expected = train(seg, [hook(teacher_of(seg), losses)], states)
    torch._dynamo.reset()
    seg.compile = dict(backend='aot_eager')
    _, record = train(seg, [hook(teacher_of(seg), losses)], states)
    assert torch._dynamo.utils.counters['stats']['calls_captured'] > 0
    for one, two in zip(expected.seen, record.seen):
        assert two['loss_kd'] == pytest.approx(one['loss_kd'], rel=1e-3)
        assert two['loss_hint']['count'] == one['loss_hint']['count']
    assert record.seen[0]['loss_hint']['share'] == pytest.approx(1)
    torch._dynamo.reset()


def test_mixed_precision(det, monkeypatch):
    # mmengine refuses mixed precision without an accelerator, although torch has it on the CPU.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    det.optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=det.optim_wrapper.optimizer)
    _, record = train(det, [hook(teacher_of(det), pkd(AUTO))], states)
    assert record.seen[0]['loss_pkd']['share'] == pytest.approx(1)
    det.optim_wrapper = dict(type='OptimWrapper', optimizer=det.optim_wrapper.optimizer)
    _, exact = train(det, [hook(teacher_of(det), pkd(AUTO))], states)
    assert record.seen[0]['loss_pkd']['mean'] == pytest.approx(exact.seen[0]['loss_pkd']['mean'], abs=0.05)


@pytest.mark.parametrize('size', [1e-9, 1e-4, 1.0, 1e5])
def test_gradients_in_half_precision_neither_vanish_nor_overflow(size):
    """Float16 holds 6e-8 to 65504; the task's gradient here is `size` times the term's."""
    maps = torch.randn(2, 3, 4, 4, requires_grad=True).to(torch.float16) * 1
    record = Recorded((maps, ))
    record.edges = (torch.autograd.graph.get_gradient_edge(maps), )
    term = SimpleNamespace(learner=STUDENT, student_paths=['neck'], loss=SimpleNamespace(
        weight=SimpleNamespace(auto=AutoWeight())), reader=SimpleNamespace(edges=lambda record: record.edges))
    step = SimpleNamespace(records={STUDENT: {'neck': record}}, model=lambda name: torch.nn.Identity())
    found = SimpleNamespace(term=term, total=(maps.float() * 0.01).sum())
    pull, = measure(step, [found], {STUDENT: lambda: (maps.float() * (0.01 * size)).sum()})
    assert pull.term == pytest.approx(0.01 * math.sqrt(96), rel=1e-2)
    if size > 1e-9:
        assert pull.share == pytest.approx(1 / size, rel=2e-2)
    else:  # as a number of half precision it is 0 at every scale but the largest
        assert pull.share == pytest.approx(1 / size, rel=0.5)


def test_in_place_activations_after_a_tap(seg):
    """The gradient is that of what the tap saw, not of what a later ReLU made of it."""
    at = 'backbone.layer4.1:pre_relu'
    losses = dict(loss_hint=dict(type='FitNetLoss', at=at, loss_weight=dict(AUTO, every=1, smoothing=0)))
    _, record = train(seg, [hook(teacher_of(seg), losses)], states)
    assert [seen['loss_hint']['share'] for seen in record.seen] == pytest.approx([1.0] * 6)


@pytest.mark.parametrize('losses', [
    dict(type='DKDLoss', at='@roi_logits'), dict(type='DKDLoss', at='@roi_logits', proposals='teacher'),
    dict(type='BCKDLoss', at='bbox_head'), dict(type='CrossKDLoss', at='bbox_head')],
    ids=['sampled rows', "the teacher's rows", 'head', 'cross-head'])
def test_rows_and_heads(losses, monkeypatch):
    from two_stage import two_stage_config
    cfg = two_stage_config('faster', classes=2) if 'roi' in losses['at'] else None
    if cfg is None:
        from heads import head_config
        cfg = head_config('retinanet')
    student = build_model(load_config(cfg)[0], 'mmdet')
    student.init_weights()
    kd = Distiller(student, load_config(cfg)[0], dict(loss_x=dict(losses, loss_weight=dict(AUTO))),
                   teacher_ckpt='random', scope='mmdet')
    student.train()
    kd.attach()
    with monkeypatch.context() as patch:  # the watch, which stops what has no gradient, agrees
        seen = []
        patch.setattr(kd.watch, 'gradients', lambda step, found: seen.append(step.has_gradient(found[0])))
        student(**random_data(student, (64, 64)), mode='loss')
    assert seen == [True]
    kd.balance.start(kd.all_terms())
    result = student(**random_data(student, (64, 64)), mode='loss')
    assert float(result['kd_weight_x']) > 0 and float(kd.after_step()['kd_share_x']) == pytest.approx(1)
    kd.detach()


def test_peers_balance_both_directions(det):
    peer = dict(type='PeerTeacher', config=teacher_of(det, backbone=dict(depth=34)))
    runner, record = train(det, [hook(peer, pkd(dict(AUTO, every=2)))], states)
    assert record.seen[-1].keys() == {'loss_pkd', 'teacher/loss_pkd'}
    own, theirs = (record.seen[-1][name] for name in ('loss_pkd', 'teacher/loss_pkd'))
    assert own['count'] == theirs['count'] == 4 and own['mean'] != theirs['mean']
    assert {'loss_pkd', 'teacher/loss_pkd'} == load_file(Path(det.work_dir) / 'iter_6.pth')['kd_mm']['weights'].keys()


def test_several_taps_and_terms_share_one_pass_of_the_task(det, monkeypatch):
    calls = []
    grad = torch.autograd.grad
    # Ours alone: torch's own passes ask for lists of outputs.
    monkeypatch.setattr(torch.autograd, 'grad', lambda total, *args, **kwargs: (
        calls.append(total) if isinstance(total, torch.Tensor) else None, grad(total, *args, **kwargs))[1])
    losses = {**pkd(AUTO), 'loss_cwd': dict(type='CWDLoss', at='backbone', loss_weight=AUTO)}
    det.train_cfg.max_iters = 1
    train(det, [hook(teacher_of(det), losses)])
    assert len(calls) == 5  # the task once, each term once; and each once by the watch in its first step


# ------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize('options, message', [
    (dict(share=0), 'AutoWeight: share=0 must be above 0'),
    (dict(share='1'), "share='1' must be a finite number above 0, not text"),
    (dict(every=0), 'every=0 must be a whole number from 1'),
    (dict(by='grad'), "by='grad' is not one of 'gradient', 'loss'"),
    (dict(smoothing=1), 'smoothing=1 must be below 1, or nothing is learned'),
    (dict(smoothing=-0.1), 'smoothing=-0.1 must be within 0..1'),
    (dict(bounds=(2, 1)), r'bounds=\(2, 1\) must be a pair \(lowest, highest\)'),
    (dict(bounds=(0, 1)), r'bounds\[0\]=0 must be above 0'),
    (dict(bounds=3), 'bounds=3 must be a list'),
    (dict(warmup=-1), 'warmup=-1 must be a whole number from 0'),
    (dict(shares=1), r"AutoWeight got unknown argument\(s\) 'shares'. It accepts: share, every, by, smoothing")])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Term('loss_pkd', dict(type='PKDLoss', at='neck', loss_weight=dict(type='AutoWeight', **options)))


def test_wrong_places(det):
    with pytest.raises(ValueError, match="loss_weight='automatic' must be a finite number from 0, not text"):
        train(det, [hook(teacher_of(det), pkd('automatic'))])
    with pytest.raises(ValueError, match='schedules has more than one AutoWeight'):
        train(det, [hook(teacher_of(det), pkd(dict(type='ProductSchedule', schedules=['auto', AUTO])))])
    with pytest.raises(ValueError, match="momentum='auto': AutoWeight balances a loss"):
        train(det, [hook(dict(type='EMATeacher', momentum='auto'), pkd(1.0))])
    with pytest.raises(ValueError, match=r"loss_pkd: loss_weight='auto' holds the term at a share of the student's own "
                                         r'losses, and task_loss_weight=0 leaves none\. Give a number'):
        train(det, [hook(teacher_of(det), pkd('auto'), task_loss_weight=0)])


def test_a_tap_that_the_task_does_not_use(det, monkeypatch):
    """Its weight stays 0, and after a while the training stops with the reason."""
    monkeypatch.setattr(balance, 'PATIENCE', 4)
    student, teacher = (build_model(load_config(cfg)[0], 'mmdet') for cfg in (det.to_dict(), teacher_of(det)))
    student.init_weights()
    kd = Distiller(student, teacher, pkd('auto'), scope='mmdet')
    student.train()
    data = random_data(student, (64, 64))
    kd.attach()
    monkeypatch.setattr(student.bbox_head, 'loss', lambda maps, samples: dict(
        loss_own=student.bbox_head.retina_cls.weight.sum()))
    for _ in range(3):
        result = student(**copy.deepcopy(data), mode='loss')
        assert float(result['loss_pkd']) == 0 == float(result['kd_weight_pkd'])
    with pytest.raises(RuntimeError, match=r"loss_pkd: loss_weight='auto' holds it at a share of the task, but in 4 "
                                           r"steps the gradient of the task at \['neck'\] was 0 or not finite"):
        student(**copy.deepcopy(data), mode='loss')
    kd.detach()


def test_a_reentrant_checkpoint_above_the_tap(seg, monkeypatch):
    from mmseg.models.decode_heads import FCNHead
    forward = FCNHead._forward_feature
    monkeypatch.setattr(FCNHead, '_forward_feature', lambda head, inputs: checkpoint(
        lambda *maps: forward(head, maps), *inputs, use_reentrant=True))
    losses = dict(type='FitNetLoss', at='backbone', loss_weight='auto')
    with pytest.raises(RuntimeError, match=r"a re-entrant activation checkpoint lies between the losses and backbone, "
                                           r"through which .* or give dict\(type='AutoWeight', by='loss'\)"):
        train(seg, [hook(teacher_of(seg), dict(loss_hint=losses))])
    losses['loss_weight'] = dict(AUTO, by='loss')
    _, record = train(seg, [hook(teacher_of(seg), dict(loss_hint=losses))])
    assert all(step['loss_hint'] > 0 for step in record.losses)


def test_outside_of_a_training_the_factor_is_1():
    from kd_mm import build
    maps = torch.rand(2, 4, 3, 3)
    loss, plain = (build(dict(type='FitNetLoss', loss_weight=weight)) for weight in ('auto', 1.0))
    assert loss(maps, maps + 1) == plain(maps, maps + 1) and replace(State(), count=0).weight(AutoWeight()) == 0
