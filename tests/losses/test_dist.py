import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.dist import dist_terms, pearson
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='DISTLoss', **options))(student, teacher, batch, region).item()


def test_pearson_by_hand():
    first = torch.tensor([[1.0, 2.0, 3.0]]).double()
    second = torch.tensor([[1.0, 3.0, 2.0]]).double()
    assert pearson(first, second, [1], eps=0.0).item() == pytest.approx(0.5)
    assert pearson(first, -first, [1], eps=0.0).item() == pytest.approx(-1.0)
    # Norms sqrt(2) each: eps is added to their product.
    assert pearson(first, second, [1], eps=2.0).item() == pytest.approx(0.25)
    weights = torch.tensor([[1.0, 0.0, 1.0]]).double()
    assert pearson(first, second, [1], weights, eps=0.0).item() == pytest.approx(1.0)
    assert pearson(torch.ones(1, 3), first, [1]).item() == 0.0


def test_closed_form_of_the_two_terms():
    # Rows agree in order (r = 1), columns are opposite in the first two classes and constant in the third.
    teacher = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.2, 0.5]]).double()
    student = torch.tensor([[0.2, 0.2, 0.5], [0.1, 0.3, 0.5]]).double()
    inter, intra = dist_terms(student, teacher)
    assert intra.item() == pytest.approx((2 + 2 + 1) / 3, rel=1e-5)
    # Rows centred: (-.2, 0, .2) and (-.1, -.1, .2): r = .06 / sqrt(.08 * .06)
    assert inter.item() == pytest.approx(1 - 0.06 / (0.08 * 0.06)**0.5, rel=1e-5)
    logits = [p.log() for p in (student / student.sum(1, True), teacher / teacher.sum(1, True))]
    inter, intra = dist_terms(*(z.softmax(dim=1) for z in logits))
    both = value(*logits, beta=2.0, gamma=3.0)
    assert both == pytest.approx(2 * inter.item() + 3 * intra.item(), rel=1e-12)


def test_tau_squared():
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    assert value(4 * student, 4 * teacher, tau=4.0) == pytest.approx(16 * value(student, teacher), rel=1e-9)


def test_pixels_are_rows():
    student, teacher = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (student, teacher)]
    assert value(student, teacher) == pytest.approx(value(*rows), rel=1e-12)
    assert value(student, teacher, activation='sigmoid') == pytest.approx(value(*rows, activation='sigmoid'), rel=1e-12)
    assert value(student, teacher) != pytest.approx(value(student, teacher, activation='sigmoid'), rel=1e-3)


def test_anchors_are_rows_of_their_own():
    student, teacher = draw(2, 6, 3, 4), draw(2, 6, 3, 4, seed=1)
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (student, teacher)]
    found = value(student, teacher, activation='sigmoid', anchors=2)
    assert found == pytest.approx(value(*rows, activation='sigmoid'), rel=1e-12)
    mask = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    weighted = value(student, teacher, KDBatch(), Given(mask), activation='sigmoid', anchors=2)
    cells = mask.permute(0, 2, 3, 1).reshape(-1).repeat_interleave(2).view(-1, 1, 1, 1)
    maps = [z[:, :, None, None] for z in rows]
    assert weighted == pytest.approx(value(*maps, KDBatch(), Given(cells), activation='sigmoid'), rel=1e-12)
    with pytest.raises(ValueError, match='anchors=4'):
        value(student, teacher, anchors=4)
    with pytest.raises(ValueError, match='anchors=2'):
        value(rows[0], rows[1], anchors=2)


def test_ignored_pixels_are_left_out():
    student, teacher = draw(1, 4, 2, 6), draw(1, 4, 2, 6, seed=1)
    seg_map = torch.zeros(1, 4, 12, dtype=torch.uint8)
    seg_map[:, :, 6:] = 255
    batch = KDBatch(seg_map=seg_map)
    half = value(student[..., :3], teacher[..., :3])
    assert value(student, teacher, batch) == pytest.approx(half, rel=1e-7)
    assert value(student, teacher, batch, mask_ignored=False) == pytest.approx(value(student, teacher), rel=1e-12)
    seg_map[:] = 255
    assert value(student, teacher, batch) == 0.0


def test_invariant_to_scale_and_offset_of_the_scores():
    student, teacher = draw(6, 4).sigmoid(), draw(6, 4, seed=1).sigmoid()
    moved = dist_terms(0.3 * student + 0.1, teacher, eps=1e-14)
    assert all(torch.isclose(a, b, rtol=1e-9) for a, b in zip(moved, dist_terms(student, teacher, eps=1e-14)))


def test_constant_scores_have_a_finite_gradient():
    student = torch.zeros(5, 4).requires_grad_()
    build(dict(type='DISTLoss'))(student, draw(5, 4).float()).backward()
    assert torch.isfinite(student.grad).all()
    assert value(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize('options', [dict(tau=0), dict(beta=-1), dict(gamma=-1), dict(activation='relu'),
                                     dict(anchors=0), dict(anchors=1.5), dict(eps=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='DISTLoss', **options))


def test_nearly_constant_scores_keep_their_digits():
    """Classes that are nowhere in the batch: scores of 1e-4 around 0.3, whose plain sums of squares say nothing."""
    student, teacher = (0.3 + 1e-4 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
                        for seed in (0, 1))
    found = dist_terms(student, teacher, eps=1e-14)
    assert all(torch.isclose(one.double(), other, rtol=1e-3) for one, other in zip(
        found, dist_terms(student.double(), teacher.double(), eps=1e-14)))
