import math

import pytest
import torch
from tensors import check_samples_and_limit, random_rows

from kd_mm.losses.pkt import neighbour_probabilities
from kd_mm.registry import build

SWEEP = {'PKTLoss': dict(skip=dict(
    test_the_batch_twice_is_what_the_reduction_says='probabilities of twice as many neighbours are half as large'))}


def value(student, teacher, batch=None, **options):
    return build(dict(type='PKTLoss', loss_weight=1.0, **options))(student, teacher, batch).item()


def test_closed_form():
    # Cosines 0 and 1: rows (2/3, 1/3) for the student and (1/2, 1/2) for the teacher.
    student, teacher = 4 * torch.eye(2).double(), torch.ones(2, 3).double()
    expected = 2 * (0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))) / 4
    assert value(student, teacher, eps=1e-14) == pytest.approx(expected, rel=1e-9)
    assert value(teacher, student, eps=1e-14) == pytest.approx(
        2 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 4, rel=1e-9)


def test_opposite_samples_are_never_neighbours():
    found = neighbour_probabilities(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]).double(), 1e-14)
    assert found[0].tolist() == pytest.approx([1 / 1.5, 0.0, 0.5 / 1.5], abs=1e-12)
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_relations_see_neither_rotations_nor_the_size_of_a_sample():
    student, teacher = random_rows(2, 4, 3, 3), random_rows(2, 6, 3, 3)
    rotation = torch.linalg.qr(random_rows(4, 4))[0]
    turned = torch.einsum('nchw,cd->ndhw', student, rotation) * (torch.rand(2, 1, 3, 3).double() + 0.5)
    assert value(turned, teacher) == pytest.approx(value(student, teacher), rel=1e-5)
    assert value(turned, student, eps=1e-14) == pytest.approx(0.0, abs=1e-12)


def test_samples_and_limit():
    check_samples_and_limit(value)


def test_more_cells_than_the_limit_cost_no_more():
    maps = torch.randn(1, 2, 200, 300)
    assert value(maps, torch.randn(1, 3, 200, 300), limit=64) > 0


@pytest.mark.parametrize('options', [dict(eps=0), dict(samples='pixel'), dict(limit=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='PKTLoss', **options))
