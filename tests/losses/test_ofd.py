import pytest
import torch
from torch import nn

from kd_mm.losses.ofd import batch_margin, negative_mean, partial_distance
from kd_mm.registry import build


def test_partial_distance_by_hand():
    #         below both | target is the margin | target is t, s above | t positive
    student = torch.tensor([-3.0, -1.0, 0.5, -1.0, -2.0]).view(1, 5, 1, 1)
    teacher = torch.tensor([-5.0, -5.0, -1.0, 2.0, -1.0]).view(1, 5, 1, 1)
    found = partial_distance(student, teacher, torch.full((1, 5, 1, 1), -2.0)).flatten().tolist()
    assert found == [0.0, 1.0, 2.25, 9.0, 0.0]


def test_loss_is_a_sum_per_image():
    student, teacher = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 2.0)
    assert build(dict(type='OFDLoss', loss_weight=1.0))(student, teacher).item() == 48
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 0] = 0.5
    loss = build(dict(type='OFDLoss'))
    assert loss.level_loss(0, student, teacher, None, mask).item() == 3.0


def test_negative_mean_is_that_of_samples():
    scale, shift = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, -0.3]).double()
    draws = torch.randn(400000, 3, generator=torch.Generator().manual_seed(0)).double() * scale + shift
    sampled = torch.stack([column[column < 0].mean() for column in draws.T])
    assert torch.allclose(negative_mean(scale, shift), sampled, rtol=0.01)


def test_negative_mean_at_the_edges():
    # Rare negatives, a dead channel that is positive, one that is negative, and a very negative one.
    scale, shift = torch.tensor([1.0, 0.0, 0.0, 1e-3]), torch.tensor([4.0, 2.0, -2.0, -5.0])
    assert negative_mean(scale, shift).tolist() == pytest.approx([-3.0, 0.0, -2.0, -5.0], rel=1e-5)


def test_margin_of_a_batch():
    teacher = torch.tensor([[-1.0, -3.0], [2.0, 4.0]]).view(1, 2, 1, 2)
    assert batch_margin(teacher).tolist() == [-2.0, 0.0]
    student = torch.tensor([[0.0, 0.0], [2.0, 4.0]]).view(1, 2, 1, 2)
    # max(t, m) is -1 and -2 in the first channel
    assert build(dict(type='OFDLoss', margin='batch', loss_weight=1.0))(student, teacher).item() == 5.0


def norm(channels=2):
    module = nn.BatchNorm2d(channels)
    nn.init.constant_(module.bias, 4.0)  # the margin is -3
    return module


def test_bind_reads_the_batch_norm_and_keeps_no_reference():
    student, teacher = torch.full((1, 2, 1, 1), -2.0), torch.full((1, 2, 1, 1), -9.0)
    loss = build(dict(type='OFDLoss', loss_weight=1.0))
    module = norm()
    loss.bind([nn.Identity()], [module])
    assert loss(student, teacher).item() == pytest.approx(2.0)
    assert list(loss.state_dict()) == ['margin_0'] and not list(loss.parameters()) and not list(loss.children())
    nn.init.constant_(module.bias, 1.0)
    assert loss(student, teacher).item() == pytest.approx(2.0)


def test_what_is_no_batch_norm():
    student, teacher = torch.full((1, 2, 1, 1), -2.0), torch.full((1, 2, 1, 1), -9.0)
    auto = build(dict(type='OFDLoss', loss_weight=1.0))
    auto.bind([nn.Identity()], [nn.Identity()])
    assert auto(student, teacher).item() == 98.0  # margin -9: that of the batch
    strict = build(dict(type='OFDLoss', margin='norm'))
    with pytest.raises(ValueError, match='level 0.*not Identity.*Tap the batch norm'):
        strict.bind([nn.Identity()], [nn.Identity()])
    with pytest.raises(ValueError, match='no batch norm is known'):
        strict(student, teacher)
    ignoring = build(dict(type='OFDLoss', margin='batch', loss_weight=1.0))
    ignoring.bind([nn.Identity()], [norm()])
    assert ignoring(student, teacher).item() == 98.0


def test_wrong_number_of_margins():
    loss = build(dict(type='OFDLoss'))
    loss.bind([None], [norm(3)])
    with pytest.raises(ValueError, match='level 0: 3 margins for 2 channels'):
        loss(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))


def test_bad_options():
    with pytest.raises(ValueError, match='margin'):
        build(dict(type='OFDLoss', margin='bn'))
