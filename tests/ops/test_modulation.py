"""Weights that follow the share of a module in the gradient; in training: tests/engine/test_shares.py."""

import pytest
import torch

from kd_mm.ops.modulation import GradientShareSchedule, modulated_weight, share_of_gradient
from kd_mm.registry import build


def test_share():
    part, rest = torch.tensor([[-1.0, 2.0]]), torch.tensor([1.0])
    assert share_of_gradient([part, None], [part, rest, None]).item() == pytest.approx(75)
    assert share_of_gradient([None], [rest, None]).item() == 0
    assert share_of_gradient([None], [None]) is None
    assert share_of_gradient([rest * 0], [rest * 0]).item() == 0


@pytest.mark.parametrize('share, expected', [
    (1e-7, 15.0), (1.9, 6.0), (2.0, 6.0), (2.1, 6.0),  # no gradient at all; inside the band
    (1.0, 6.0 * 0.021 * 0.99 / (0.01 * 0.979)),  # below: to the upper end
    (4.0, 6.0 * 0.019 * 0.96 / (0.04 * 0.981)),  # above: to the lower end
    (0.001, 60.0), (80.0, 0.6)])  # no more than a factor of ten
def test_rules(share, expected):
    assert modulated_weight(6.0, share, 2.0, 0.1, 15.0) == pytest.approx(expected, rel=1e-12)


def test_a_weight_of_0_stays_and_the_last_phase_is_the_default():
    assert modulated_weight(0.0, 1.0, 2.0, 0.1, 15.0) == 0
    assert modulated_weight(6.0, 1.0, 2.0, 0.1, 15.0, final=True) == 15


def test_the_target_is_reached():
    """A module whose gradient is proportional to the weight, beside a constant one: the share comes into the band."""
    with pytest.raises(ValueError, match='PKDLoss: loss_weight: a GradientShareSchedule .* give it alone'):
        build(dict(type='PKDLoss', loss_weight=dict(type='ProductSchedule', schedules=[
            dict(type='GradientShareSchedule', module='neck'), dict(type='LinearWarmup', steps=10)])))
    schedule = build(dict(type='GradientShareSchedule', module='encoder', target=2.0, band=0.1, start=100.0))
    for _ in range(6):
        weight = schedule(0)
        share = 100 * weight / (weight + 300)
        schedule.observe(torch.tensor(share))
        assert schedule.update()
    assert share == pytest.approx(1.9, rel=1e-4) or share == pytest.approx(2.1, rel=1e-4)


def test_the_mean_of_the_steps_counts_and_is_forgotten():
    one, other = (GradientShareSchedule(start=6.0) for _ in range(2))
    for share in (1.0, 7.0):
        one.observe(torch.tensor(share))
    one.observe(None)
    other.observe(torch.tensor(4.0))
    assert one.update() and other.update() and one(0) == pytest.approx(other(0))
    assert not one.update()


def test_state():
    schedule = GradientShareSchedule(start=6.0)
    schedule.observe(torch.tensor(4.0))
    schedule.update()
    schedule.observe(torch.tensor(4.0))
    other = GradientShareSchedule(start=1.0)
    other.state.load_state_dict(schedule.state.state_dict())
    assert other(0) == schedule(0) != 6.0
    assert schedule.update() and other.update() and other(0) == schedule(0)


def test_final():
    assert GradientShareSchedule(start=6.0, final=10)(9) == 6 and GradientShareSchedule(start=6.0, final=10)(10) == 15
    late = GradientShareSchedule(start=6.0, final=-10)
    assert late(89, 100) == 6 and late(90, 100) == 15
    with pytest.raises(ValueError, match='GradientShareSchedule: final counts from the end'):
        late(5)


def test_a_loss_keeps_it_in_its_state():
    loss = build(dict(type='DSILoss', loss_weight=dict(type='GradientShareSchedule', start=3.0)))
    assert loss.modulation is loss.weight.schedule.state and 'modulation.value' in loss.state_dict()
    assert loss.weight.at(0, 0, 2) == [3.0, 3.0]
    assert build(dict(type='DSILoss')).modulation is None
    both = build(dict(type='DSILoss', loss_weight=dict(levels=[1.0, 2.0], schedule=dict(
        type='GradientShareSchedule', start=3.0))))
    assert both.weight.at(0, 0, 2) == [3.0, 6.0] and both.modulation is not None


@pytest.mark.parametrize('options, message', [
    (dict(module='a b'), "module='a b'"), (dict(target=0), 'target=0'), (dict(target=100), 'target=100'),
    (dict(band=3), 'band=3 must be below target'), (dict(low=2), 'low=2'), (dict(high=0.5), 'high=0.5'),
    (dict(interval=0), 'interval=0')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f'GradientShareSchedule: {message}'):
        GradientShareSchedule(**options)
