import math

import pytest
import torch

from kd_mm.losses.cwd import channel_wise_divergence
from kd_mm.registry import build

KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
ENTROPY = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


def value(student, teacher, **options):
    return build(dict(type='CWDLoss', loss_weight=1.0, **options))(student, teacher).item()


def maps(tau=1.0):
    """Two cells; the teacher has three quarters in the first one."""
    teacher = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    teacher[..., 0] = tau * math.log(3)
    return torch.zeros_like(teacher), teacher


@pytest.mark.parametrize('options, expected', [
    ({}, KL), (dict(divergence='cross_entropy'), KL + ENTROPY), (dict(tau=4.0), 16 * KL),
    (dict(divisor='student', student_channels=2), KL * 3 / 2)])
def test_closed_form(options, expected):
    assert value(*maps(options.get('tau', 1.0)), **options) == pytest.approx(expected, rel=1e-12)


def test_student_channels_one_a_level():
    student, teacher = maps()
    loss = build(dict(type='CWDLoss', divisor='student', student_channels=[3, 1]))
    first, second = loss.per_level((student, student), (teacher, teacher))
    assert second.item() == pytest.approx(3 * first.item(), rel=1e-12)
    with pytest.raises(ValueError, match='student_channels has 2 entries'):
        loss((student, ) * 3, (teacher, ) * 3)


def test_invariant_to_a_constant_in_each_channel():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    shift = torch.randn(2, 3, 1, 1).double()
    assert value(student + shift, teacher - 2 * shift) == pytest.approx(value(student, teacher), rel=1e-10)


def test_cross_entropy_has_the_same_gradient():
    student, teacher = torch.randn(2, 3, 4, 5).double().requires_grad_(), torch.randn(2, 3, 4, 5).double()
    grads = [torch.autograd.grad(build(dict(type='CWDLoss', divergence=d))(student, teacher), student)[0]
             for d in ('kl', 'cross_entropy')]
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-15)


def test_region_is_the_loss_of_its_cells():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    whole = channel_wise_divergence(student, teacher, 2.0, mask=mask)
    part = channel_wise_divergence(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4], 2.0)
    assert torch.allclose(whole, part, rtol=1e-12)
    assert (whole >= 0).all()
    assert torch.allclose(channel_wise_divergence(student, teacher, 2.0, mask=7 * mask), part, rtol=1e-12)
    mask[0] = 0
    assert channel_wise_divergence(student, teacher, mask=mask)[0].abs().sum() == 0


def test_region_weights_are_part_of_the_distributions():
    student, teacher = maps()
    mask = torch.tensor([1.0, 3.0]).expand(2, 1, 1, 2)
    # Student 1/4 and 3/4, teacher 3/6 and 3/6.
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert channel_wise_divergence(student, teacher, mask=mask)[0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_peaked_maps_do_not_underflow():
    teacher = torch.zeros(1, 1, 1, 2)
    teacher[..., 0] = 500.0
    assert value(-teacher, teacher) == pytest.approx(500.0)


@pytest.mark.parametrize('options, message', [
    (dict(tau=0), 'tau'), (dict(divergence='mse'), 'is not one of'), (dict(divisor='both'), 'is not one of'),
    (dict(divisor='student'), 'needs student_channels'), (dict(student_channels=4), 'nothing else uses them')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='CWDLoss', **options))
