"""A weight that follows the student's gradients, in a real Runner: what it measures, when it changes, a resume."""

import copy
import re

import pytest
import torch
from stock import distill_hook, hook, make_runner, segmentor, teacher_of

from kd_mm.engine.distiller import Distiller
from kd_mm.lab.check import check
from kd_mm.ops.modulation import GradientShareSchedule, share_of_gradient


@pytest.fixture
def cfg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path)


def with_weight(cfg, **options):
    """A run whose feature loss has a weight that follows the share of the backbone."""
    cfg = copy.deepcopy(cfg)
    weight = dict(dict(type='GradientShareSchedule', module='backbone', target=50.0, band=1.0, start=2.0, interval=2),
                  **options)
    cfg.custom_hooks = [hook(teacher_of(cfg), dict(loss_dsi=dict(
        type='DSILoss', at='backbone', levels=[-1], loss_weight=weight)))]
    return cfg


def schedule_of(runner):
    return distill_hook(runner).distiller.terms['loss_dsi'].loss.weight.schedule


def test_the_weight_follows_what_the_optimizer_gets(cfg, monkeypatch):
    seen = []
    monkeypatch.setattr('kd_mm.engine.shares.share_of_gradient',
                        lambda part, whole: seen.append(share_of_gradient(part, whole)) or seen[-1])
    runner = make_runner(with_weight(cfg))
    runner.train()
    schedule = schedule_of(runner)
    assert len(seen) == runner.max_iters and all(0 < share < 100 for share in seen)
    assert schedule.state.steps == runner.max_iters % 2
    assert schedule(0) != 2.0
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_an_interval_that_ends_between_optimizer_steps_counts(cfg, monkeypatch):
    changed = []
    update = GradientShareSchedule.update
    monkeypatch.setattr(GradientShareSchedule, 'update', lambda self: changed.append(1) or update(self))
    cfg.train_cfg.max_iters = 12
    cfg.optim_wrapper.accumulative_counts = 4
    runner = make_runner(with_weight(cfg, interval=3))
    runner.train()
    assert len(changed) == 3 and schedule_of(runner).state.passed == 4  # after 4, 8 and 12 iterations


def test_a_checkpoint_keeps_it(cfg, tmp_path):
    runner = make_runner(with_weight(cfg))
    runner.train()
    content = torch.load(tmp_path / f'iter_{runner.max_iters}.pth', weights_only=False)
    kept = {key: value for key, value in flat(content['kd_mm']).items() if key.endswith('modulation.value')}
    assert [float(value) for value in kept.values()] == [schedule_of(runner)(0)]


def flat(value, name=''):
    if hasattr(value, 'items'):
        return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f'{name}.{part}').items()}
    return {name: value}


@pytest.mark.parametrize('options, message', [
    (dict(interval=None), 'an iteration-based loop has none'), (dict(module='encoder'), "module='encoder'")])
def test_what_cannot_work_stops_before_the_first_step(cfg, options, message):
    cfg = with_weight(cfg, **options)
    problem, = check(copy.deepcopy(cfg), (64, 64)).problems
    assert re.search(message, problem)
    runner = make_runner(cfg)
    with pytest.raises(ValueError, match=f'GradientShareSchedule: .*{message}'):
        runner.train()
    assert runner.iter == 0


def test_a_plain_loop(cfg):
    runner = make_runner(cfg)
    student = runner.model
    distiller = Distiller(student, teacher_of(cfg), dict(loss_dsi=dict(
        type='DSILoss', at='backbone', levels=[-1], loss_weight=dict(
            type='GradientShareSchedule', module='decode_head', target=50.0, band=1.0, start=2.0))),
        scope='mmseg', teacher_ckpt='random')
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    distiller.shares.follow(optimizer)
    for name, parameter in student.named_parameters():
        parameter.grad = torch.full_like(parameter, 3.0 if name.startswith('decode_head.') else 1.0)
    optimizer.step()
    sizes = {part: sum(p.numel() for n, p in student.named_parameters() if n.startswith('decode_head.') == part)
             for part in (True, False)}
    schedule = distiller.terms['loss_dsi'].loss.weight.schedule
    expected = 100 * 3 * sizes[True] / (3 * sizes[True] + sizes[False])
    assert float(schedule.state.total) == pytest.approx(expected, rel=1e-6)
    distiller.shares.end_epoch()
    assert schedule.state.steps == 0 and schedule(0) != 2.0
    distiller.detach()
    optimizer.step()
    assert schedule.state.steps == 0
