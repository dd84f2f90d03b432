import pytest
import torch
from peak import Largest
from tensors import Given, by_differences, draw

from kd_mm.losses.skd_pairwise import affinity_gap, pooled_nodes
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, region=None, **options):
    return build(dict(type='SKDPairwiseLoss', loss_weight=1.0, **options))(student, teacher, KDBatch(), region).item()


def all_at_once(student, teacher, weights):
    gap = student.transpose(1, 2) @ student - teacher.transpose(1, 2) @ teacher
    pairs = weights[:, :, None] * weights[:, None, :]
    return (pairs * gap.square()).sum() / pairs.sum()


def test_closed_form():
    # Two nodes: at right angles in the student, equal in the teacher: two of four pairs are 1 apart.
    student = torch.eye(2).view(1, 2, 1, 2).double()
    teacher = torch.full((1, 3, 1, 2), 5.0).double()
    assert value(student, teacher, kernel=1) == pytest.approx(0.5)
    assert value(3 * student, -teacher, kernel=1) == pytest.approx(0.5)
    assert value(student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1), kernel=1) == pytest.approx(0.5)
    # One window: a single node is as near to itself on both sides.
    assert value(student, teacher, kernel=2) == pytest.approx(0.0)


def test_windows():
    features = torch.arange(12.0).view(1, 1, 3, 4)
    nodes, weights = pooled_nodes(features, (2, 2))
    assert nodes.flatten().tolist() == [5, 7, 9, 11] and weights is None
    mask = torch.ones(1, 1, 3, 4)
    mask[..., 3], mask[..., 2, :2] = 0.0, 0.0
    mask[..., 0, 0] = 0.5
    mask[..., 1, 0:2] = 0.25
    nodes, weights = pooled_nodes(features - 20, (2, 2), mask)
    assert nodes.flatten().tolist() == [-15, -14, 0, -10] and weights.tolist() == [[1.0, 1.0, 0.0, 1.0]]
    assert pooled_nodes(features, (2, 2), 0.5 * torch.ones(1, 1, 3, 4))[1].tolist() == [[0.5] * 4]


@pytest.mark.parametrize('block', [1, 7, 50, 1000])
def test_blocks_do_not_change_the_numbers(block):
    student, teacher = draw(2, 3, 11).requires_grad_(), draw(2, 5, 11, seed=1)
    weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(2)).double()
    plain = all_at_once(student, teacher, weights)
    blocked = affinity_gap(student, teacher, weights, block)
    assert torch.isclose(blocked, plain, rtol=1e-12)
    grads = [torch.autograd.grad(3 * loss, student)[0] for loss in (plain, blocked)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-15)
    single = affinity_gap(student.float(), teacher.float(), weights, block)
    assert torch.isclose(single.double(), plain, rtol=1e-6)


def test_gradient_by_differences():
    student, teacher = draw(1, 2, 2, 3).requires_grad_(), draw(1, 2, 2, 3, seed=1)
    loss = build(dict(type='SKDPairwiseLoss', kernel=1))
    gradient, = torch.autograd.grad(loss(student, teacher), student)
    assert torch.allclose(gradient, by_differences(lambda s: loss(s, teacher), student), rtol=1e-6, atol=1e-9)


def test_peak_memory_is_a_block():
    nodes = 16 * 32
    student, teacher = torch.randn(2, 2, 16, 32, requires_grad=True), torch.randn(2, 3, 16, 32)
    block = 2**14
    watch = Largest()
    with watch:
        loss = affinity_gap(student.flatten(2), teacher.flatten(2), None, block)
        loss.backward()
    assert watch.numel <= block < nodes * nodes / 10
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda none: none):
        affinity_gap(student.flatten(2), teacher.flatten(2), None, block)
    assert sum(kept) <= 2 * student.numel()


def test_the_loss_uses_blocks():
    watch, features = Largest(), torch.randn(1, 2, 40, 64)
    with watch:
        build(dict(type='SKDPairwiseLoss', kernel=1))(features, features)
    assert watch.numel <= 2**21 < 2560**2


def test_scale_is_a_grid():
    student, teacher = draw(2, 4, 6, 10), draw(2, 5, 6, 10, seed=1)
    pooled = [torch.nn.functional.max_pool2d(tensor, (3, 5)) for tensor in (student, teacher)]
    assert value(student, teacher, scale=0.5) == pytest.approx(value(*pooled, kernel=1), rel=1e-12)
    assert value(student, teacher, scale=0.01) == pytest.approx(value(student, teacher, kernel=1), rel=1e-12)


def test_a_detached_length_changes_the_gradient_alone():
    student, teacher = draw(1, 3, 4, 4).requires_grad_(), draw(1, 3, 4, 4, seed=1)
    found = []
    for detach in (False, True):
        total = build(dict(type='SKDPairwiseLoss', kernel=1, detach_norm=detach))(student, teacher)
        found.append((total, torch.autograd.grad(total, student)[0]))
    assert torch.isclose(found[0][0], found[1][0], rtol=1e-12)
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-2)
    # With the length attached no gradient points along a node.
    along = [(gradient * student).sum(dim=1).abs().max().item() for _, gradient in found]
    assert along[0] < 1e-12 < 1e-3 < along[1]


@pytest.mark.parametrize('options', [dict(kernel=1), dict(kernel=2)])
def test_region_is_the_loss_of_its_cells(options):
    student, teacher = draw(2, 3, 4, 6), draw(2, 5, 4, 6, seed=1)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 2:, :4] = 2.0
    part = value(student[:, :, 2:, :4], teacher[:, :, 2:, :4], **options)
    assert value(student, teacher, Given(mask), **options) == pytest.approx(part, rel=1e-12)


def test_an_empty_node_has_a_finite_gradient():
    student = torch.zeros(1, 3, 4, 4).requires_grad_()
    build(dict(type='SKDPairwiseLoss'))(student, torch.randn(1, 3, 4, 4)).backward()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize('options', [dict(kernel=0), dict(kernel=1.5), dict(scale=0), dict(scale=2.0), dict(eps=-1)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='SKDPairwiseLoss', **options))
