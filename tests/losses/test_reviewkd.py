import pytest
import torch

from kd_mm.losses.reviewkd import FusionBlock, hierarchical_context_loss
from kd_mm.registry import build

SWEEP = {'ReviewKDLoss': dict(skip=dict(
    test_zero_for_equal_inputs='the fusion changes the student first',
    test_outside_of_the_region_nothing_counts='its convolutions reach over the border'))}


def test_context_loss_by_hand():
    # A gap of +1 and -1 in halves of an 8 x 8 map: the squares are 1; halves average out in the 1 x 1 grid only.
    student = torch.ones(1, 2, 8, 8).double()
    student[:, :, 4:] = -1
    zero = torch.zeros_like(student)
    expected = (1 + 1 / 2 + 1 / 4 + 0 / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert hierarchical_context_loss(student, zero).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('height, grids', [(4, (2, 1)), (2, (1, )), (1, ()), (3, (2, 1))])
def test_grids_that_are_not_smaller_are_left_out(height, grids):
    student, teacher = torch.randn(1, 2, height, 5).double(), torch.randn(1, 2, height, 5).double()
    expected, weight, weights = (student - teacher).square().mean(), 1.0, 1.0
    for edge in grids:
        weight, weights = weight / 2, weights + weight / 2
        pooled = [torch.nn.functional.adaptive_avg_pool2d(part, edge) for part in (student, teacher)]
        expected = expected + weight * (pooled[0] - pooled[1]).square().mean()
    assert torch.isclose(hierarchical_context_loss(student, teacher), expected / weights, rtol=1e-12)


def test_context_loss_of_a_region():
    student, teacher = torch.randn(1, 2, 8, 8).double(), torch.randn(1, 2, 8, 8).double()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    half = hierarchical_context_loss(student, teacher, (1, ), mask)
    gap = (student - teacher)[..., :4]
    expected = (gap.square().mean() + gap.mean(dim=(2, 3)).square().mean() / 2) / 1.5
    assert torch.isclose(half, expected, rtol=1e-12)
    assert hierarchical_context_loss(student, teacher, mask=0 * mask).item() == 0


def test_fusion_shares():
    torch.manual_seed(0)
    block = FusionBlock(4, 3, 5, fuse=True).double()
    torch.nn.init.zeros_(block.attention.weight)
    block.attention.bias.data = torch.tensor([0.0, 1e9]).double()  # half of the own, all of the deeper
    features, deeper = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 3, 2, 2).double()
    output, fused = block(features, deeper)
    own = block.reduce_norm(block.reduce(features))
    repeated = deeper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(fused, own / 2 + repeated, rtol=1e-12)
    assert output.shape == (2, 5, 4, 4)


def maps(*channels):
    return tuple(torch.randn(2, width, 16 >> level, 12 >> level).double() for level, width in enumerate(channels))


def test_the_fine_level_sees_the_deep_ones_and_not_the_other_way():
    student, teacher = maps(4, 6, 8), maps(5, 5, 5)
    loss = build(dict(type='ReviewKDLoss'))
    loss.prepare(student, teacher)
    assert loss.blocks[0].reduce.out_channels == 8 and loss.blocks[2].attention is None
    before = loss.fuse(student)
    changed = loss.fuse((*student[:2], student[2] + torch.randn_like(student[2])))
    assert [bool(torch.isclose(a, b).all()) for a, b in zip(before, changed)] == [False] * 3
    changed = loss.fuse((student[0] + torch.randn_like(student[0]), *student[1:]))
    assert [bool(torch.isclose(a, b).all()) for a, b in zip(before, changed)] == [False, True, True]


def test_the_total_is_the_sum_over_levels():
    student, teacher = maps(4, 6), maps(5, 7)
    loss = build(dict(type='ReviewKDLoss', channels=3, loss_weight=2.0))
    total = loss(student, teacher)
    levels = loss.level_terms(student, teacher, [None, None])
    assert len(levels) == 2 and torch.isclose(total, 2 * sum(levels), rtol=1e-12)
    fused = loss.fuse(student)
    assert torch.isclose(levels[1], hierarchical_context_loss(fused[1], teacher[1]), rtol=1e-12)


def test_dilated_stages_of_one_size():
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
    loss = build(dict(type='ReviewKDLoss'))
    loss((student, student), (teacher, teacher)).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize('options', [dict(channels=0), dict(pools=[4, 0])])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='ReviewKDLoss', **options))
