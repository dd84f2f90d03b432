import pytest
import torch
from torch import nn

from kd_mm.losses.transkd import Assistant, Mixer, SelectiveFusion, hierarchical_distance, tokens_of
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'TransKDLoss': dict(options=dict(embed_weights=[1.0], middle=4), skip=dict(
    test_zero_for_equal_inputs='the student is fused and projected first',
    test_outside_of_the_region_nothing_counts='fusion and batch norm see the whole map'))}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pyramid(*widths, count=2, dtype=torch.float64, seed=0):
    """Two stages of 8x12 and 4x6 cells, and their embeddings."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, width, 8 // 2**(index % 2), 12 // 2**(index % 2), generator=draw, dtype=dtype)
                 for index, width in enumerate(widths * 2))


def prepared(student, teacher, **options):
    torch.manual_seed(0)
    loss = build(dict(dict(type='TransKDLoss', embed_weights=[0.3, 0.7], middle=8), **options))
    loss.prepare(student, teacher)
    return loss


def test_hierarchical_distance_by_hand():
    # Differences +1 and -1 by columns: 1 as it is, 1 pooled to 4x4 and 2x2 of 8x8 by pairs of columns of one sign, 0 to
    # one cell.
    gap = torch.ones(1, 1, 8, 8).double()
    gap[..., 4:] = -1
    assert hierarchical_distance(gap, 0 * gap).item() == pytest.approx((1 + 0.5 + 0.25 + 0) / 1.875)
    # Of four rows, 4 is no smaller size: 2 and 1 have the weights 1/2 and 1/4.
    low = gap[:, :, :4]
    assert hierarchical_distance(low, 0 * low).item() == pytest.approx((1 + 0.5 + 0) / 1.75)


def test_hierarchical_distance_of_a_region():
    gap = torch.randn(2, 3, 1, 6).double()
    mask = torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(2, 1, 1, 6)
    # One row has no smaller sizes, and so the distance is that of the cells alone.
    assert hierarchical_distance(gap, 0 * gap, mask).item() == pytest.approx(gap[..., :3].square().mean().item())
    assert hierarchical_distance(gap, 0 * gap, 0 * mask).item() == 0.0


def test_fusion_selects_between_the_stages():
    fusion = SelectiveFusion(3, 4, 5, deepest=False)
    fusion.enter = nn.Conv2d(3, 4, 1, bias=False)
    shallow, deep = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    for branch in fusion.select:
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
    wide = deep.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    out, mid = fusion(shallow, deep)
    assert torch.allclose(mid, 0.5 * fusion.enter(shallow) + 0.5 * wide, atol=1e-6) and out.shape == (2, 5, 4, 4)
    fusion.select[0].bias.data.fill_(100.0)
    assert torch.allclose(fusion(shallow, deep)[1], fusion.enter(shallow), atol=1e-6)


def test_one_image_is_enough():
    student, teacher = pyramid(3, 4, count=1), pyramid(5, 6, count=1)
    total = prepared(student, teacher)(student, teacher)
    assert torch.isfinite(total)


def test_the_deepest_stage_reaches_all_and_is_reached_by_none():
    student, teacher = pyramid(3, 4), pyramid(5, 6)
    loss = prepared(student, teacher)
    first = loss.fused(student[:2])
    moved = loss.fused((student[0], student[1] + torch.randn_like(student[1])))
    assert not torch.allclose(moved[0], first[0]) and not torch.allclose(moved[1], first[1])
    moved = loss.fused((student[0] + torch.randn_like(student[0]), student[1]))
    assert not torch.allclose(moved[0], first[0]) and torch.equal(moved[1], first[1])
    assert [tuple(part.shape) for part in first] == [tuple(part.shape) for part in teacher[:2]]


def test_terms_are_weighed():
    student, teacher = pyramid(3, 4), pyramid(5, 6)
    loss = prepared(student, teacher, feature_weight=2.0, embed_weights=[3.0, 5.0])
    for linear in loss.linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    features = sum(hierarchical_distance(s, t) for s, t in zip(loss.fused(student[:2]), teacher))
    expected = 2 * features + 3 * teacher[2].square().mean() + 5 * teacher[3].square().mean()
    assert torch.isclose(loss(student, teacher), expected, rtol=1e-12)


def test_mixer_at_the_last_stage():
    student, teacher = pyramid(3, 4), pyramid(5, 6)
    loss = prepared(student, teacher, embedding='mixer', heads=2)
    plain = [linear(tokens_of(tensor)) for linear, tensor in zip(loss.linears, student[2:])]
    found = loss.embedded(student[2:], student[:2], KDBatch())
    assert torch.equal(found[0], plain[0]) and not torch.allclose(found[1], plain[1])
    loss.mixer.attention_weight.data.zero_()
    loss.mixer.conv_weight.data.zero_()
    assert torch.allclose(loss.embedded(student[2:], student[:2], KDBatch())[1], plain[1])
    silent = Mixer(4, 2, add=False)
    silent.attention_weight.data.zero_()
    silent.conv_weight.data.zero_()
    assert silent(torch.ones(1, 3, 4)).abs().max() == 0


def test_assistants_embed_the_image_and_the_stage_before():
    student, teacher = pyramid(3, 4), pyramid(5, 6)
    batch = KDBatch(images=torch.randn(2, 3, 32, 48).double())
    loss = prepared(student, teacher, embedding='assistant')
    loss.shares[0].data.fill_(2.0)
    loss.shares[3].data.fill_(7.0)
    found = loss.embedded(student[2:], student[:2], batch)
    wanted = (2 * loss.linears[0](tokens_of(student[2])) + 0.5 * loss.assistants[0](batch.targets.images),
              0.5 * loss.linears[1](tokens_of(student[3])) + 7 * loss.assistants[1](student[0]))
    assert all(torch.allclose(f, w, rtol=1e-12) for f, w in zip(found, wanted))
    assert isinstance(loss.assistants[0], Assistant) and torch.isfinite(loss(student, teacher, batch))
    with pytest.raises(ValueError, match='looks at the input images'):
        loss(student, teacher)
    with pytest.raises(ValueError, match='stage 0: the assistant makes'):
        loss(student, teacher, KDBatch(images=torch.randn(2, 3, 64, 48).double()))


def test_levels_must_be_two_of_each_stage():
    student, teacher = pyramid(3, 4), pyramid(5, 6)
    for levels, weights in ((3, [1.0]), (4, [1.0]), (4, [1.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match=f'{levels} levels for {len(weights)} embed_weights'):
            build(dict(type='TransKDLoss', embed_weights=weights))(student[:levels], teacher[:levels])
    with pytest.raises(ValueError, match='heads=3 does not divide the 4 channels'):
        prepared(student, teacher, embedding='mixer', heads=3)


@pytest.mark.parametrize('options', [
    dict(middle=0), dict(heads=1.5), dict(embedding='none'), dict(feature_weight=-1), dict(embed_weights=[1, -1])])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='TransKDLoss', **options))
