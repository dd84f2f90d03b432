"""FlexibleRunner and its strategies, in one process and in two over gloo."""

import importlib.util
from pathlib import Path

import pytest
import torch
from flexible import flexible
from mmengine.config import Config
from mmengine.hooks import Hook
from ranks import run
from stock import Recorder, detector, distill_hook, hook, make_runner, same, teacher_of, wide

from kd_mm.engine.arguments import argument_faults
from kd_mm.engine.holding import refusal
from kd_mm.hosts.models import build_model

WORKER = Path(__file__).resolve().parents[1] / 'helpers' / 'fsdp_worker.py'
SINGLE = dict(type='SingleDeviceStrategy')
HINT = dict(loss_hint=dict(type='FitNetLoss', at='neck', adapter=dict(type='ConvAdapter', always=True)))


class Weights(Hook):
    """Gives the student the same first weights in any Runner."""

    def __init__(self, state):
        self.state = state

    def before_train(self, runner):
        if runner.iter == 0:
            runner.model.load_state_dict(self.state)


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'det')


@pytest.fixture
def warm(det):
    """Three steps of a warm-up that the extras must follow, with everything that a cut must keep."""
    det.train_cfg.max_iters = 3
    det.param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
                           dict(type='CosineAnnealingLR', by_epoch=False, T_max=3)]
    det.optim_wrapper.clip_grad = dict(max_norm=1.0)
    det.default_hooks.checkpoint.interval = 1
    return det


def trained(runner, state):
    recorder = Recorder()
    runner.register_hook(recorder)
    runner.register_hook(Weights(state))
    runner.train()
    return runner, recorder


def test_a_single_device_equals_the_plain_runner_and_a_cut_run(warm, tmp_path):
    state = build_model(warm, 'mmdet').state_dict()
    entry = hook(wide(warm), HINT, adapter_lr_mult=2)
    plain, expected = trained(make_runner(warm, [entry]), state)
    whole, found = trained(flexible(warm, SINGLE, [entry], work_dir=str(tmp_path / 'whole')), state)
    assert found.losses == expected.losses and found.rates == expected.rates
    assert same(whole.model.state_dict(), plain.model.state_dict())
    extras = [distill_hook(runner).distiller.terms.state_dict() for runner in (plain, whole)]
    assert same(*extras)
    saved = torch.load(tmp_path / 'whole' / 'iter_3.pth', weights_only=True)
    build_model(warm, 'mmdet').load_state_dict(saved['state_dict'], strict=True)
    assert saved['kd_mm']['state_dict'].keys() == extras[0].keys()

    (tmp_path / 'whole' / 'last_checkpoint').write_text(str(tmp_path / 'whole' / 'iter_1.pth'))
    again, rest = trained(flexible(warm, SINGLE, [entry], work_dir=str(tmp_path / 'whole'), resume=True), state)
    assert rest.losses == expected.losses[1:] and rest.rates == expected.rates[1:]
    assert same(again.model.state_dict(), plain.model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in again.model.modules())


@pytest.mark.parametrize('arguments, refused', [
    (dict(speed=dict(fold=True)), True), (dict(speed='tune'), True), (dict(speed='exact'), False), ({}, False),
    (dict(teachers=dict(one=dict(speed='exact'), two=dict(speed=dict(fold=True)))), True), (dict(teachers=7), False),
    (dict(teachers=dict(one=7)), False)])
def test_a_sharded_teacher_runs_in_no_other_form(arguments, refused):
    """Said before anything is built, so that ``kd-mm check`` says it, too; which in one process is no fault."""
    found = argument_faults(dict(arguments, shard_teacher=True)).get('shard_teacher', '')
    assert ('runs in its exact form, and speed=' in found) == refused and bool(found) == refused
    assert 'shard_teacher' not in argument_faults(dict(arguments, shard_teacher=False))
    assert "must be True or False" in argument_faults(dict(arguments, shard_teacher='yes'))['shard_teacher']


def test_what_stays_refused_says_why(det):
    entry = hook(wide(det), HINT)
    with pytest.raises(ValueError, match='shard_teacher=True shares the weights among processes, and this is a .*one'):
        flexible(det, SINGLE, [dict(entry, shard_teacher=True)]).train()
    for given, reason in (
            (('MyRunner', ), 'MyRunner is not supported: how it builds'),
            (('FlexibleRunner', dict(type='ColossalAIStrategy')), 'ColossalAIStrategy .* owns model, optimizer'),
            (('FlexibleRunner', dict(type='FSDPStrategy')), "saves a piece of every weight .*state_dict_cfg='full'"),
            (('FlexibleRunner', dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=3))), 'in pieces')):
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(refusal(*given))
    for allowed in (dict(type='FSDPStrategy', state_dict_cfg='full'), dict(type='DeepSpeedStrategy'), None, SINGLE,
                    dict(type='FSDPStrategy', state_dict_cfg=dict(state_dict_type='FULL_STATE_DICT'))):
        assert refusal('FlexibleRunner', allowed) is None


# ------------------------------------------------------------------------------------------------ two processes


@pytest.fixture(scope='module')
def joined(cityscapes_root, tmp_path_factory):
    """The teacher's file, and what one process with the plain Runner makes of the joined batch."""
    from fsdp_worker import config
    root = tmp_path_factory.mktemp('joined')
    cfg = config(cityscapes_root, root / 'one', 4, 'none')
    teacher = build_model(Config(teacher_of(cfg, backbone=dict(depth=34))), 'mmseg')
    teacher.init_weights()
    torch.save(dict(state_dict=teacher.state_dict()), root / 'teacher.pth')
    torch.save(dict(state_dict=build_model(cfg, 'mmseg').state_dict()), root / 'student.pth')
    made, = run([str(WORKER), str(cityscapes_root), str(root / 'one'), str(root / 'teacher.pth'),
                 str(root / 'student.pth'), '4', 'none'], root / 'one', 1)
    return root / 'teacher.pth', root / 'student.pth', made['joined']


def compare(ranks, joined, names):
    first, second = ranks
    assert list(first) == names
    for name in names:
        for part in ('student', 'extras'):
            assert first[name][part].keys() == joined[part].keys()
            for key, value in joined[part].items():
                torch.testing.assert_close(first[name][part][key], second[name][part][key], rtol=0, atol=0,
                                           msg=f'{name}, ranks: {key}')
                torch.testing.assert_close(first[name][part][key], value, rtol=1e-4, atol=1e-5,
                                           msg=f'{name}, joined: {key}')


def test_shards_equal_one_process_on_the_joined_batch(cityscapes_root, tmp_path, joined):
    """FSDP with units of their own, taps at one and inside another; a cut run; a sharded teacher; DDP."""
    teacher, student, expected = joined
    ranks = run([str(WORKER), str(cityscapes_root), str(tmp_path / 'two'), str(teacher), str(student), '2', 'pytorch'],
                tmp_path / 'two', 2)
    refused = [rank.pop('refused') for rank in ranks]
    compare(ranks, expected, ['shards', 'resumed', 'sharded teacher', 'ddp'])
    first = ranks[0]
    assert first['resumed']['losses'] == first['shards']['losses'][2:]
    assert first['sharded teacher']['losses'] == first['shards']['losses']
    assert first['shards']['teacher'] == expected['teacher'] > 1.5 * first['sharded teacher']['teacher']
    assert all('EMATeacher averages the whole student' in text and "loss_weight='auto' measures" in text
               for text in refused)


@pytest.mark.skipif(importlib.util.find_spec('deepspeed') is None, reason='deepspeed is not installed')
def test_deepspeed_equals_one_process_on_the_joined_batch(cityscapes_root, tmp_path, joined):
    teacher, student, expected = joined
    ranks = run([str(WORKER.with_name('deepspeed_worker.py')), str(cityscapes_root), str(tmp_path / 'two'),
                 str(teacher), str(student), '2'], tmp_path / 'two', 2)
    half = [rank.pop('bf16') for rank in ranks]
    compare(ranks, expected, ['stage 1', 'stage 2', 'resumed'])
    assert ranks[0]['resumed']['losses'] == ranks[0]['stage 2']['losses'][2:]
    for rank in half:
        assert rank['student'].keys() == expected['student'].keys()
        assert rank['losses'][0]['loss_inside'] == pytest.approx(ranks[0]['stage 2']['losses'][0]['loss_inside'],
                                                                 rel=0.5)
