"""Adversarial losses in real trainings: their own optimizer, resumed, in mixed precision, on two ranks."""

from pathlib import Path

import pytest
import torch
from ranks import run
from stock import distill_hook, hook, make_runner, same, segmentor, teacher_of, train, weights

from kd_mm.hosts.checkpoint import load_file

WORKER = Path(__file__).resolve().parents[1] / 'helpers' / 'ddp_opponents_worker.py'
HOLISTIC = dict(type='SKDHolisticLoss', at='decode_head.conv_seg', width=2, optimizer=dict(type='Adam', lr=0.01))


def pspnet(root, work_dir, **options):
    cfg = segmentor(root, work_dir, **options)
    head = dict(cfg.model.decode_head, type='PSPHead', pool_scales=(1, 2))
    for key in ('num_convs', 'concat_input'):
        head.pop(key)
    # The host does not restore the random state that dropout draws from.
    cfg.model.decode_head = dict(head, dropout_ratio=0.0)
    cfg.model.auxiliary_head.dropout_ratio = 0.0
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return pspnet(cityscapes_root, tmp_path / 'seg')


def holistic(cfg, **options):
    extra = {key: options.pop(key) for key in ('task_loss_weight', ) if key in options}
    return [hook(teacher_of(cfg), dict(loss_holistic=dict(HOLISTIC, **options)), **extra)]


def opponent(runner):
    found, = distill_hook(runner).distiller.opponents()
    return found


def side(runner):
    """Everything of the opponent that could differ: parameters, power iterations, optimizer."""
    state = {key: value.clone() for key, value in distill_hook(runner).distiller.terms.state_dict().items()}
    for index, moments in opponent(runner).optimizer.state_dict()['state'].items():
        state.update({f'{index}.{key}': torch.as_tensor(value).clone() for key, value in moments.items()})
    return state


# ------------------------------------------------------------------------------------------------ two optimizers


@pytest.mark.parametrize('objective', ['wgan-gp', 'hinge'])
def test_both_learn_and_each_has_its_own_optimizer(seg, objective):
    runner, record = train(seg, holistic(seg, objective=objective), side)
    own = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']}
    network = opponent(runner).network
    theirs = {id(p) for group in opponent(runner).optimizer.param_groups for p in group['params']}
    assert theirs == {id(p) for p in network.parameters()} and not own & theirs
    assert own == {id(p) for p in runner.model.parameters()}
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    layers = [key for key in record.seen[0] if key.endswith(('.u', 'conv.weight', 'norm.weight', 'gamma'))]
    assert len(layers) == 4 + 4 + 1 + 2
    assert all(not torch.equal(record.seen[0][key], record.seen[1][key]) for key in layers)
    told = runner.message_hub.get_scalar('train/kd_opponent_holistic').data[0]
    assert len(told) == 2 and told[0] != told[1]
    assert all(step['loss_holistic'] != 0 for step in record.losses)


def test_the_student_meets_the_discriminator_of_the_step_before(seg):
    """With a rate of 0 for the discriminator the first step is the same and the second is not."""
    seg.train_dataloader.sampler.shuffle = False
    _, learning = train(seg, holistic(seg))
    _, still = train(seg, holistic(seg, optimizer=dict(type='SGD', lr=0.0)))
    first, second = ([step['loss_holistic'] for step in record.losses] for record in (learning, still))
    assert first[0] == second[0] and first[1] != second[1]


def test_clipping_of_the_student_does_not_see_it(seg):
    """A discriminator with huge gradients, or none, leaves the first step of a clipped student as it is."""
    seg.train_cfg.max_iters = 1
    seg.optim_wrapper.clip_grad = dict(max_norm=0.1)
    found = []
    for weight in (1e6, 1e-6):
        runner, _ = train(seg, holistic(seg, discriminator_weight=weight))
        found.append((weights(runner), [float(v) for v in runner.message_hub.get_scalar('train/grad_norm').data[0]]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] and found[0][1][0] > 0.1


def test_its_rate_follows_the_schedule(seg):
    seg.train_cfg.max_iters = 4
    seg.param_scheduler = [dict(type='PolyLR', by_epoch=False, power=0.9, eta_min=0, begin=0, end=4)]
    _, record = train(seg, holistic(seg), lambda runner: opponent(runner).optimizer.param_groups[0]['lr'])
    assert record.seen == pytest.approx([rates[0] for rates in record.rates])  # both start at 0.01
    assert record.seen[-1] < record.seen[0]


def test_a_weight_of_zero_is_no_loss(seg):
    plain, _ = train(seg)
    runner, record = train(seg, holistic(seg, loss_weight=0), side)
    assert same(weights(plain), weights(runner)) and same(*record.seen)


def test_off_steps_train_neither(seg):
    window = dict(type='WindowSchedule', value=0.1, windows=[(1, None)])
    _, record = train(seg, holistic(seg, loss_weight=window), side)
    assert 'loss_holistic' not in record.losses[0] and 'loss_holistic' in record.losses[1]
    assert not any('exp_avg' in key for key in record.seen[0]) and any('exp_avg' in key for key in record.seen[1])


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize('objective', ['wgan-gp', 'hinge'])
def test_run_cut_in_half_equals_the_uncut_run(cityscapes_root, tmp_path, objective):
    def config(name):
        cfg = pspnet(cityscapes_root, tmp_path / name, steps=4)
        cfg.param_scheduler = [dict(type='PolyLR', by_epoch=False, power=0.9, eta_min=1e-4, begin=0, end=4)]
        cfg.default_hooks.checkpoint.interval = 2
        return cfg

    class Cut(Exception):
        pass

    def cut(runner):
        if runner.iter + 1 > 2:
            raise Cut

    whole, uncut = train(config('whole'), holistic(config('whole'), objective=objective))
    with pytest.raises(Cut):
        train(config('cut'), holistic(config('cut'), objective=objective), cut)
    saved = load_file(str(tmp_path / 'cut' / 'iter_2.pth'))
    assert list(saved['state_dict']) == list(whole.model.state_dict())
    assert len(saved['kd_mm']['opponents']) == 1 and any(key.endswith('.u') for key in saved['kd_mm']['state_dict'])
    resumed = config('cut')
    resumed.resume = True
    second, record = train(resumed, holistic(resumed, objective=objective))
    assert record.losses[-1]['loss_holistic'] == uncut.losses[-1]['loss_holistic']
    assert same(weights(whole), weights(second)) and same(side(whole), side(second))


def test_resume_without_the_optimizer_would_differ(cityscapes_root, tmp_path):
    """What the test above compares does depend on the saved optimizer."""
    cfg = pspnet(cityscapes_root, tmp_path / 'cut', steps=2)
    train(cfg, holistic(cfg))
    path = tmp_path / 'cut' / 'iter_2.pth'
    content = load_file(str(path))
    cfg.train_cfg.max_iters, cfg.resume = 3, True
    right, _ = train(cfg, holistic(cfg))
    states = content['kd_mm']['opponents']
    for state in states['loss_holistic/0']['state'].values():  # Adam's moments
        for name in ('exp_avg', 'exp_avg_sq'):
            state[name].zero_()
    torch.save(content, path)
    (tmp_path / 'cut' / 'last_checkpoint').write_text(str(path))
    wrong, _ = train(cfg, holistic(cfg))
    assert not same(side(right), side(wrong))
    content['kd_mm'].pop('opponents')
    torch.save(content, path)
    (tmp_path / 'cut' / 'last_checkpoint').write_text(str(path))
    with pytest.raises(ValueError, match='opponents under .*missing: loss_holistic/0'):
        train(cfg, holistic(cfg))


# ------------------------------------------------------------------------------------------------ precision, errors


def test_mixed_precision(seg, monkeypatch):
    # mmengine refuses mixed precision without an accelerator, although torch has it on the CPU.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    seg.optim_wrapper = dict(seg.optim_wrapper, type='AmpOptimWrapper', dtype='bfloat16')
    runner, record = train(seg, holistic(seg), lambda r: {p.dtype for p in opponent(r).parameters()})
    assert record.seen == [{torch.float32}] * 2
    assert all(torch.isfinite(value).all() for value in side(runner).values())
    assert record.losses[1]['loss_holistic'] != 0


def test_an_opponent_that_is_not_finite_stops_the_training(seg):
    with pytest.raises(FloatingPointError, match='not finite at step 1: loss_holistic|kd_opponent_holistic'):
        train(seg, holistic(seg, optimizer=dict(type='SGD', lr=1e38)))


def test_a_peer_cannot_have_one(seg):
    teacher = dict(type='PeerTeacher', config=teacher_of(seg))
    with pytest.raises(ValueError, match='loss_holistic: SKDHolisticLoss trains a network against the student'):
        make_and_start(seg, teacher)


def make_and_start(cfg, teacher):
    return make_runner(cfg, [dict(type='kd_mm.DistillHook', teacher=teacher, teacher_ckpt='random', losses=dict(
        loss_holistic=HOLISTIC))]).train()


# ------------------------------------------------------------------------------------------------ several ranks


def test_two_ranks_stay_equal(cityscapes_root, tmp_path):
    first, second = run([str(WORKER), str(cityscapes_root), str(tmp_path / 'two')], tmp_path / 'two', 2)
    assert first['told'] != second['told']  # each judges its own images
    assert first['side'].keys() == second['side'].keys()
    for part in ('side', 'student'):
        for key, value in first[part].items():
            if 'running_' not in key and 'num_batches' not in key:  # batch norm's statistics are each rank's own
                torch.testing.assert_close(second[part][key], value, rtol=0, atol=0, msg=key)
    assert any(not torch.equal(value, first['before'][key]) for key, value in first['side'].items()
               if key in first['before'])
