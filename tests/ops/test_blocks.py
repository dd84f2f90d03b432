"""Blocks: the same numbers as all at once, and next to no memory of their own."""

import pytest
import torch
from tensors import draw

from kd_mm.lab.meters import allocation_peak
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.blocks import block_slices, sum_in_blocks
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def terms(student, teacher, mask):
    """Several sums of different shapes, two of them not linear in the student."""
    weighted = (student - teacher).square() * mask
    return weighted.sum(), (student * teacher).exp().sum(dim=(0, 2, 3)), mask.sum()


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 7, 3, 1), (3, 1, 1, 6)])
@pytest.mark.parametrize('most', [1, 7, 20, 41, 1000])
@pytest.mark.parametrize('along', ['cells', 'images'])
def test_blocks_do_not_change_the_numbers(shape, most, along):
    student, teacher = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    mask = draw(shape[0], 1, *shape[2:], seed=2).abs()
    factors = [3.0, draw(shape[1], seed=3), 0.0]
    grads = []
    for found in (terms(student, teacher, mask),
                  sum_in_blocks(terms, along, student, teacher, mask, max_block=most)):
        total = sum((factor * part).sum() for factor, part in zip(factors, found))
        grads.append(torch.autograd.grad(total, student)[0])
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-14)
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(
        terms(student, teacher, mask), sum_in_blocks(terms, along, student, teacher, mask, max_block=most)))


@pytest.mark.parametrize('most', [1, 13, 45, 1000])
def test_channels_stay_whole(most):
    student, teacher, mask = draw(2, 5, 3, 4).requires_grad_(), draw(2, 5, 3, 4, seed=1), draw(2, 5, 3, 4, seed=2)

    def rows(one, other, weights):
        return ((one.flatten(2).softmax(dim=2) - other.flatten(2).softmax(dim=2)) * weights.flatten(2)).square().sum(),

    whole, = rows(student, teacher, mask)
    found, = sum_in_blocks(rows, 'channels', student, teacher, mask, max_block=most)
    assert torch.isclose(found, whole, rtol=1e-12)
    grads = [torch.autograd.grad(value, student)[0] for value in (whole, found)]
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize('along', ['cells', 'channels', 'images'])
@pytest.mark.parametrize('shape', [(3, 4, 5, 6), (7, 4), (1, 2, 1, 9)])
@pytest.mark.parametrize('most', [1, 10, 50, 10**6])
def test_each_value_is_in_one_block(along, shape, most):
    seen = torch.zeros(shape)
    for block in block_slices(shape, along, most):
        part = seen[block]
        assert part.numel() and part.shape[0] and (along != 'images' or part[0].numel() == seen[0].numel())
        assert part.numel() <= max(most, {'cells': shape[1] * (shape[3] if len(shape) == 4 else 1),
                                          'channels': seen[0, 0].numel() * (shape[1] if len(shape) == 2 else 1),
                                          'images': seen[0].numel()}[along])
        part += 1
    assert bool((seen == 1).all())


def test_a_backward_inside_autocast_is_that_of_the_forward():
    student, weights = draw(2, 4, 3, 5).float().requires_grad_(), draw(4, 4, seed=1).float()

    def product(one):
        return (one.flatten(2).transpose(1, 2) @ weights).square().sum(),

    total, = sum_in_blocks(product, 'images', student)
    expected, = torch.autograd.grad(product(student)[0], student)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        total.backward()
    assert torch.allclose(student.grad, expected, rtol=1e-5)


def test_nothing_is_zero():
    rows = torch.zeros(0, 4, requires_grad=True)
    total, = sum_in_blocks(lambda one, other: ((one - other).sum(), ), 'cells', rows, rows.detach())
    total.backward()
    assert total.item() == 0 and rows.grad.shape == (0, 4)
    with pytest.raises(ValueError, match="'cells', 'channels', 'images'"):
        sum_in_blocks(lambda one: (one.sum(), ), 'pixels', rows)


#: 19 classes and an eighth of the edge of a crop of Cityscapes, in blocks of a 64th: 1.2 MiB a copy.
SHAPE = (2, 19, 64, 128)


@pytest.mark.parametrize('loss', [
    dict(type='SoftmaxKDLoss'), dict(type='CWDLoss'), dict(type='DISTLoss'), dict(type='DKDLoss'),
    dict(type='SigmoidKDLoss'), dict(type='ZeroFirstOrderLoss'), dict(type='BPKDLoss')], ids=lambda loss: loss['type'])
def test_pixel_losses_hold_a_gradient_for_each_term(loss, monkeypatch):
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    labels = torch.arange(SHAPE[2]).div(4, rounding_mode='floor').clamp(max=18).view(1, -1, 1)
    batch = KDBatch(seg_map=labels.expand(SHAPE[0], -1, SHAPE[3]).contiguous())
    loss: KDLoss = build(loss)
    whole = loss(student, teacher, batch)
    slope, = torch.autograd.grad(whole, student)
    for place in ('ops.blocks', 'regions.edge', 'losses.bpkd', 'losses.zero_first_order'):
        monkeypatch.setattr(f'kd_mm.{place}.BLOCK', 2**14)
    assert torch.isclose(loss(student, teacher, batch), whole, rtol=1e-5)
    copy = student.numel() * student.element_size()
    peak = allocation_peak(lambda: loss(student, teacher, batch).backward())
    assert torch.allclose(student.grad, slope, rtol=1e-3, atol=1e-3 * slope.abs().max().item()) and peak >= copy
    # Each term's gradient is a copy; the rest are a few maps of one channel and the numbers of a block.
    assert peak <= (1.75 if 'terms' not in vars(type(loss)) else 2.5) * copy
