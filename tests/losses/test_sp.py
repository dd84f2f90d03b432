import pytest
import torch
from tensors import random_rows

from kd_mm.losses.sp import similarity_gap, similarity_gap_factored
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'SPLoss': dict(skip=dict(
    test_the_batch_twice_is_what_the_reduction_says='the numbers of a row of unit length are smaller in a longer one'))}


def value(student, teacher, batch=None, **options):
    return build(dict(type='SPLoss', loss_weight=1.0, **options))(student, teacher, batch).item()


@pytest.mark.parametrize('norm, expected', [('l2', 2 * (2 - 2**0.5) / 4), ('l1', 2 * 0.5 / 4)])
def test_closed_form(norm, expected):
    # Rows of G: (1, 0) and (0, 1) against (1, 1) and (1, 1), divided by their norm.
    student, teacher = torch.eye(2).double(), torch.ones(2, 3).double()
    assert value(student, teacher, norm=norm) == pytest.approx(expected, rel=1e-12)


def test_both_orders_of_the_products_agree():
    student, teacher = random_rows(40, 5).requires_grad_(), random_rows(40, 7)
    direct, factored = similarity_gap(student, teacher), similarity_gap_factored(student, teacher)
    assert torch.isclose(direct, factored, rtol=1e-12)
    gradients = [torch.autograd.grad(total, student)[0] for total in (direct, factored)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-15)
    student.data[3], teacher[4] = 0.0, 0.0
    assert torch.isclose(similarity_gap(student, teacher), similarity_gap_factored(student, teacher), rtol=1e-12)
    gradient, = torch.autograd.grad(similarity_gap_factored(student, teacher), student)
    assert torch.isfinite(gradient).all()


def test_no_matrix_of_cells_times_cells():
    # 60 000 cells: M^2 numbers would be 14 GB.
    maps = torch.randn(1, 2, 200, 300)
    assert value(maps, maps.flip(1)) < 1e-9
    assert value(maps, torch.randn(1, 3, 200, 300)) > 0


def test_relations_do_not_see_rotations():
    student, teacher = random_rows(2, 4, 3, 3), random_rows(2, 6, 3, 3)
    rotation = torch.linalg.qr(random_rows(4, 4))[0]
    turned = 3 * torch.einsum('nchw,cd->ndhw', student, rotation)
    assert value(turned, teacher) == pytest.approx(value(student, teacher), rel=1e-9)
    assert value(student, turned) == pytest.approx(0.0, abs=1e-12)


def test_samples():
    student, teacher = random_rows(3, 4, 2, 2), random_rows(3, 6, 2, 2)
    images = similarity_gap(student.flatten(1), teacher.flatten(1)).item()
    rows = student.permute(0, 2, 3, 1).reshape(12, 4), teacher.permute(0, 2, 3, 1).reshape(12, 6)
    cells = similarity_gap(*rows).item()
    assert value(student, teacher, samples='image') == pytest.approx(images, rel=1e-12)
    assert value(student, teacher) == pytest.approx(cells, rel=1e-12)
    large = random_rows(3, 6, 5, 4)
    assert value(student, large, samples='image') > 0
    with pytest.raises(ValueError, match='differ in size'):
        value(student, large)


def test_draws_depend_on_seed_and_step_alone():
    student, teacher = random_rows(2, 4, 6, 6), random_rows(2, 6, 6, 6)
    first = value(student, teacher, KDBatch(step=3), limit=10)
    torch.rand(5)
    assert value(student, teacher, KDBatch(step=3), limit=10) == first
    assert value(student, teacher, KDBatch(step=4), limit=10) != first
    assert value(student, teacher, KDBatch(step=3, seed=1), limit=10) != first


def test_region_chooses_the_cells():
    student, teacher = random_rows(2, 3, 4, 5), random_rows(2, 4, 4, 5)
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    loss = build(dict(type='SPLoss', loss_weight=1.0))
    found = loss.per_level(student, teacher, None, lambda features, batch: (mask, ))[0].item()
    assert found == pytest.approx(value(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4]), rel=1e-12)


@pytest.mark.parametrize('options', [dict(samples='pixel'), dict(limit=1), dict(norm='max')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='SPLoss', **options))
