import pytest
import torch
from tensors import Given, draw

from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, labels, region=None, **options):
    return build(dict(type='IDDLoss', **options))(student, teacher, KDBatch(seg_map=labels), region).item()


LABELS = torch.tensor([[[0, 0, 1, 255, 4]], [[1, 1, 1, 4, 255]]])
#: Means 1, 4 and 9 in the first image; 2 and 5 in the second: distances 3, 8, 5 and 3.
STUDENT = torch.tensor([[0.0, 2.0, 4.0, 99.0, 9.0], [1.0, 2.0, 3.0, 5.0, 99.0]]).view(2, 1, 1, 5).double()
#: Distances 3, 3 and 0 in the first image and 1 in the second.
TEACHER = torch.tensor([[1.0, 1.0, 4.0, 50.0, 4.0], [0.0, 0.0, 0.0, 1.0, 50.0]]).view(2, 1, 1, 5).double()


def test_closed_form():
    assert value(STUDENT, TEACHER, LABELS) == pytest.approx((0 + 25 + 25 + 4) / 4)
    assert value(STUDENT, TEACHER, LABELS, num_classes=4) == pytest.approx(0.0)  # only one pair is left, equal
    # Means of the distances 16/3 and 3, and 2 and 1.
    first = [3 * 3 / 16 - 3 / 2, 8 * 3 / 16 - 3 / 2, 5 * 3 / 16 - 0]
    expected = sum(gap**2 for gap in first) / 4
    assert value(STUDENT, TEACHER, LABELS, scale='mean') == pytest.approx(expected)


def test_distances_are_euclidean_and_channels_need_not_agree():
    student = torch.tensor([[0.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2).double()
    teacher = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]).view(1, 3, 1, 2).double()
    assert value(student, teacher, torch.tensor([[[0, 1]]])) == pytest.approx((5 - 3)**2)
    moved = student + draw(1, 2, 1, 1)
    assert value(moved, teacher, torch.tensor([[[0, 1]]])) == pytest.approx(4.0)


def test_scale_mean_ignores_the_scale():
    student, teacher = draw(2, 3, 1, 5), draw(2, 4, 1, 5, seed=1)
    scaled = value(7 * student, 0.1 * teacher, LABELS, scale='mean')
    assert scaled == pytest.approx(value(student, teacher, LABELS, scale='mean'), rel=1e-10)


def test_region_weighs_the_centres():
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).expand(2, 1, 1, 5)
    # Means 0, 4, 9 and 2, 5.
    assert value(STUDENT, TEACHER, LABELS, Given(mask)) == pytest.approx((1 + 36 + 25 + 4) / 4)


@pytest.mark.parametrize('scale', ['none', 'mean'])
def test_equal_centres_have_a_finite_gradient(scale):
    student = torch.zeros(2, 3, 1, 5).requires_grad_()
    loss = build(dict(type='IDDLoss', scale=scale))(student, draw(2, 3, 1, 5).float(), KDBatch(seg_map=LABELS))
    loss.backward()
    assert loss.item() > 0 and torch.isfinite(student.grad).all()


def test_one_class_has_no_distance():
    student = draw(1, 3, 2, 2).requires_grad_()
    loss = build(dict(type='IDDLoss'))(student, draw(1, 3, 2, 2, seed=1), KDBatch(seg_map=torch.ones(1, 2, 2)))
    loss.backward()
    assert loss.item() == 0.0
    with pytest.raises(ValueError, match='segmentation map'):
        build(dict(type='IDDLoss'))(student, student)


@pytest.mark.parametrize('options', [dict(scale='sum'), dict(num_classes=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='IDDLoss', **options))
