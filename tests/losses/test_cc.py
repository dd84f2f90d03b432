import math

import pytest
import torch
from tensors import check_samples_and_limit, random_rows

from kd_mm.losses.cc import taylor_gaussian
from kd_mm.registry import build


def value(student, teacher, batch=None, **options):
    return build(dict(type='CCLoss', **options))(student, teacher, batch).item()


def test_kernel_by_hand():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).double()
    found = taylor_gaussian(rows, 0.5, 3) * math.e  # 1 + x + x^2 / 2 + x^3 / 6
    assert found[0].tolist() == pytest.approx([1 + 1 + 1 / 2 + 1 / 6, 1 + 2 + 2 + 8 / 6, 1.0])
    unit = torch.nn.functional.normalize(random_rows(5, 3), dim=1)
    assert torch.allclose(taylor_gaussian(unit, 0.4, 20), torch.exp(-0.4 * torch.cdist(unit, unit)**2))


@pytest.mark.parametrize('options, expected', [
    (dict(kernel='bilinear'), 2 / 4), (dict(kernel='bilinear', distance='norm'), 2**0.5 / 4),
    # Off the diagonal x = 0 against 1: 2 gamma x + (2 gamma x)^2 / 2 apart.
    ({}, 2 * (math.exp(-0.8) * (0.8 + 0.32))**2 / 4), (dict(order=1, gamma=1.0), 2 * (math.exp(-2) * 2)**2 / 4)])
def test_closed_form(options, expected):
    student, teacher = torch.eye(2).double(), torch.tensor([[3.0, 0.0], [5.0, 0.0]]).double()
    assert value(student, teacher, **options) == pytest.approx(expected, rel=1e-12)


def test_normalize():
    student, teacher = random_rows(6, 4), random_rows(6, 5)
    scale = torch.rand(6, 1).double() + 0.5
    assert value(scale * student, teacher) == pytest.approx(value(student, teacher), rel=1e-9)
    raw = dict(normalize=False)
    assert value(scale * student, teacher, **raw) != pytest.approx(value(student, teacher, **raw), rel=1e-3)


def test_relations_do_not_see_rotations():
    student, teacher = random_rows(2, 4, 3, 3), random_rows(2, 6, 3, 3)
    rotation = torch.linalg.qr(random_rows(4, 4))[0]
    turned = torch.einsum('nchw,cd->ndhw', student, rotation)
    assert value(turned, teacher) == pytest.approx(value(student, teacher), rel=1e-9)


def test_samples_and_limit():
    check_samples_and_limit(value)


def test_equal_relations_have_a_finite_gradient():
    rows = random_rows(6, 4)
    student = rows.clone().requires_grad_()
    total = build(dict(type='CCLoss', distance='norm'))(student, rows)
    total.backward()
    assert total.item() == 0.0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('options', [
    dict(kernel='poly'), dict(gamma=0), dict(order=0), dict(order=1.5), dict(distance='l1'), dict(samples='pixel'),
    dict(limit=1)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='CCLoss', **options))
