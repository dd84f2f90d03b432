import math

import pytest
import torch

from kd_mm.losses.fsp import flow_matrix, pool_to
from kd_mm.registry import build


def random_maps(*shapes):
    return tuple(torch.randn(2, *shape).double() for shape in shapes)


def value(student, teacher, masks=None, **options):
    loss = build(dict(type='FSPLoss', **options))
    return loss(student, teacher, None, None if masks is None else lambda features, batch: masks).item()


def test_matrix_by_hand():
    first = torch.tensor([[[[1.0, 2.0, 3.0, 0.0]], [[-1.0, -2.0, 4.0, 4.0]]]])  # pooled: 2, 3 and -1, 4
    second = torch.tensor([[[[10.0, 1.0]]]])
    assert flow_matrix(first, second).tolist() == [[[11.5], [-3.0]]]
    assert flow_matrix(second, first).tolist() == [[[11.5, -3.0]]]


@pytest.mark.parametrize('distance, expected', [('squared', 4 * 3 * 4 + 3 * 2), ('column_norm', 3 * 4 + 2 * 3**0.5)])
def test_closed_form_of_two_pairs(distance, expected):
    # Constant maps of ones against 3, 1 and 2: entries of G differ by 2 (4 x 3 of them), then by 1 (3 x 2).
    shapes = (4, 8, 8), (3, 4, 4), (2, 4, 4)
    student = tuple(torch.ones(2, *shape) for shape in shapes)
    teacher = tuple(torch.full((2, *shape), level) for shape, level in zip(shapes, (3.0, 1.0, 2.0)))
    assert value(student, teacher, distance=distance) == pytest.approx(expected)


def test_images_count_once():
    shapes = (4, 8, 8), (6, 4, 4)
    student, teacher = random_maps(*shapes), random_maps(*shapes)
    twice = [tuple(torch.cat([tensor] * 2) for tensor in side) for side in (student, teacher)]
    assert value(*twice) == pytest.approx(value(student, teacher), rel=1e-12)


def test_the_same_place_for_all_cells_does_not_matter():
    shapes = (4, 4, 4), (6, 4, 4)
    student, teacher = random_maps(*shapes), random_maps(*shapes)
    moved = tuple(tensor.flip(3) for tensor in student)
    assert value(moved, teacher) == pytest.approx(value(student, teacher), rel=1e-12)
    assert value((moved[0], student[1]), teacher) != pytest.approx(value(student, teacher), rel=1e-6)


def test_region_is_the_loss_of_its_cells():
    shapes = (4, 8, 8), (6, 4, 4)
    student, teacher = random_maps(*shapes), random_maps(*shapes)
    masks = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)
    masks[0][:, :, 2:6, :4] = masks[1][:, :, 1:3, :2] = 1
    inside = [(side[0][:, :, 2:6, :4], side[1][:, :, 1:3, :2]) for side in (student, teacher)]
    assert value(student, teacher, masks) == pytest.approx(value(*inside), rel=1e-12)


def test_pooling_stays_in_the_region():
    features, mask = torch.tensor([1.0, 9.0, 3.0, 2.0]).view(1, 1, 1, 4), torch.tensor([0.5, 0, 0, 0]).view(1, 1, 1, 4)
    pooled, weights = pool_to(features, mask, (1, 2))
    assert pooled.flatten().tolist() == [1.0, 0.0] and weights.flatten().tolist() == [0.5, 0.0]


def test_joint_has_one_weight():
    shapes = (4, 8, 8), (6, 4, 4)
    student, teacher = random_maps(*shapes), random_maps(*shapes)
    assert len(build(dict(type='FSPLoss')).per_level(student, teacher)) == 1
    assert value(student, teacher, loss_weight=3.0) == pytest.approx(3 * value(student, teacher), rel=1e-12)
    with pytest.raises(ValueError, match='2 entries.*1 levels'):
        value(student, teacher, loss_weight=[1.0, 2.0])


def test_equal_matrices_have_a_finite_gradient():
    maps = random_maps((4, 4, 4), (6, 4, 4))
    student = tuple(tensor.clone().requires_grad_() for tensor in maps)
    build(dict(type='FSPLoss', distance='column_norm'))(student, maps).backward()
    assert all(math.isfinite(tensor.grad.sum()) for tensor in student)


def test_one_layer_is_not_enough():
    with pytest.raises(ValueError, match='1 level.*relates two layers'):
        value(*[random_maps((4, 8, 8))] * 2)
    with pytest.raises(ValueError, match='FSPLoss needs maps'):
        value(*[(torch.ones(2, 4), torch.ones(2, 4))] * 2)
    with pytest.raises(ValueError, match='distance'):
        build(dict(type='FSPLoss', distance='l2'))
