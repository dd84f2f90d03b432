import math

import pytest
import torch
from torch import nn

from kd_mm.losses.vid import gaussian_surprise
from kd_mm.registry import build

SWEEP = {'VIDLoss': dict(skip=dict(
    test_zero_for_equal_inputs='the logarithm of the variance remains'))}


def prepared(student, teacher, **options):
    loss = build(dict(type='VIDLoss', **options))
    loss.prepare((student, ), (teacher, ))
    return loss


def test_density_by_hand():
    mean, target = torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 3.0)
    found = gaussian_surprise(mean, torch.tensor([1.0, math.e**2]), target).flatten().tolist()
    assert found == pytest.approx([4.5, 0.5 * (9 / math.e**2 + 2)])


@pytest.mark.parametrize('variance', [5.0, 0.3, 1000.0])
def test_the_start_is_the_given_variance(variance):
    student, teacher = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 6, 3, 3).double()
    loss = prepared(student, teacher, init_variance=variance)
    assert loss.variance(0).tolist() == pytest.approx([variance] * 6, rel=1e-9)
    loss.regressors[0] = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False).double())
    nn.init.zeros_(loss.regressors[0][0].weight)
    expected = 0.5 * (teacher.square().mean().item() / variance + math.log(variance))
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_can_be_negative():
    x = torch.zeros(1, 2, 3, 3)
    assert prepared(x, x, init_variance=0.5)(x, x).item() == pytest.approx(0.5 * math.log(0.5), rel=1e-4)


def test_a_channel_that_cannot_be_predicted_gets_a_large_variance():
    student, teacher = torch.zeros(1, 1, 8, 8), torch.randn(1, 2, 8, 8)
    teacher[:, 1] *= 10
    loss = prepared(student, teacher)
    for _ in range(300):
        loss.zero_grad()
        loss(student, teacher).backward()
        loss.log_scales[0].data -= 3 * loss.log_scales[0].grad
    found = loss.variance(0)
    assert found[0].item() == pytest.approx(teacher[:, 0].square().mean().item(), rel=0.05)
    assert found[1] > 20 * found[0]


def test_region_is_the_loss_of_its_cells():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 4, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    loss = prepared(student, teacher)
    found = loss.per_level(student, teacher, None, lambda features, batch: (mask, ))[0]
    part = loss(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4])
    assert found.item() == pytest.approx(part.item(), rel=1e-12)


@pytest.mark.parametrize('options', [dict(init_variance=0.0), dict(init_variance=1e-5), dict(eps=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='VIDLoss', **options))
