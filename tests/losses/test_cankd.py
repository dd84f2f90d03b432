import pytest
import torch
from torch.nn import functional as F

from kd_mm.losses.cankd import CrossNonLocal, instance_standardise
from kd_mm.registry import build


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_block_starts_as_the_identity():
    # IN of (-1, 1) is itself up to eps, that of (1, -1) the opposite: half the mean square of 2.
    student = torch.tensor([-1.0, 1.0]).double().view(1, 1, 1, 2)
    loss = build(dict(type='CanKDLoss', eps=1e-12, loss_weight=1.0))
    assert loss(student, -student).item() == pytest.approx(2.0, rel=1e-9)
    assert loss(3 * student + 1, student).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize('sub_sample', [True, False])
def test_the_attention_is_that_of_all_pairs(sub_sample):
    """The product from the right is the mean over the teacher's cells, written out."""
    block = CrossNonLocal(4, 3, sub_sample, 1e-5, dtype=torch.float64)
    torch.nn.init.normal_(block.norm.weight)
    student, teacher = features(2, 4, 5, 7, seed=1), features(2, 4, 5, 7, seed=2)
    keys, values = block.phi(teacher), block.g(teacher)
    if sub_sample:
        keys, values = F.max_pool2d(keys, 2), F.max_pool2d(values, 2)
    pairs = torch.einsum('ncp,ncq->npq', block.theta(student).flatten(2), keys.flatten(2)) / keys[0, 0].numel()
    mixed = torch.einsum('npq,ncq->ncp', pairs, values.flatten(2)).view(2, 3, 5, 7)
    expected = student + F.batch_norm(block.conv(mixed), None, None, block.norm.weight, block.norm.bias, True)
    torch.testing.assert_close(block(student, teacher), expected, rtol=1e-10, atol=1e-12)


def test_a_mask_of_ones_is_none_and_others_leave_out():
    block = CrossNonLocal(4, 2, True, 1e-5, dtype=torch.float64)
    torch.nn.init.normal_(block.norm.weight)
    student, teacher = features(2, 4, 6, 6, seed=1), features(2, 4, 6, 6, seed=2)
    mask = torch.ones(2, 1, 6, 6)
    torch.testing.assert_close(block(student, teacher, mask), block(student, teacher), rtol=1e-10, atol=1e-12)
    mask[:, :, 3:] = 0
    moved = student + (1 - mask) * 7
    torch.testing.assert_close(block(moved, teacher, mask)[:, :, :3], block(student, teacher, mask)[:, :, :3])
    inside = instance_standardise(student[:, :, :3])
    torch.testing.assert_close(instance_standardise(student, mask)[:, :, :3], inside)


def test_the_block_is_trained_and_small_maps_are_not_pooled_away():
    loss = build(dict(type='CanKDLoss'))
    student, teacher = features(2, 4, 1, 5, seed=1).requires_grad_(), features(2, 4, 1, 5, seed=2)
    loss(student, teacher).backward()
    assert loss.blocks[0].norm.weight.grad.abs().sum() > 0 and student.grad.abs().sum() > 0
    assert loss.blocks[0].theta.out_channels == 2  # half of the channels


@pytest.mark.parametrize('options, message', [
    (dict(inner_channels=0), 'inner_channels=0'), (dict(sub_sample='no'), "sub_sample='no'"),
    (dict(eps=0), 'eps=0 must be above 0'), (dict(norm_eps=-1), 'norm_eps=-1')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='CanKDLoss', **options))


def test_rows_are_refused():
    with pytest.raises(ValueError, match='CanKDLoss needs maps'):
        build(dict(type='CanKDLoss'))(torch.zeros(3, 4), torch.zeros(3, 4))
