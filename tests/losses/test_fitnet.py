import pytest
import torch

from kd_mm.registry import build


def value(student, teacher, **options):
    return build(dict(type='FitNetLoss', loss_weight=1.0, **options))(student, teacher).item()


@pytest.mark.parametrize('options, expected', [
    ({}, 9.0), (dict(reduction='batch_mean'), 9.0 * 24), (dict(reduction='sum'), 9.0 * 48),
    (dict(reduction='norm'), (9.0 * 48)**0.5), (dict(distance='l1'), 3.0),
    (dict(distance='l1', reduction='sum'), 3.0 * 48)])
def test_closed_form(options, expected):
    student, teacher = torch.full((2, 4, 2, 3), 5.0).double(), torch.full((2, 4, 2, 3), 2.0).double()
    assert value(student, teacher, **options) == pytest.approx(expected, rel=1e-12)


def test_normalised_features_are_free_of_scale():
    student, teacher = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    plain = value(student, teacher, normalize=True, reduction='batch_mean')
    assert value(7 * student, teacher, normalize=True, reduction='batch_mean') == pytest.approx(plain, rel=1e-12)
    assert value(student, teacher, normalize=True, mult=3.0, reduction='batch_mean') == pytest.approx(9 * plain)
    assert value(-teacher, teacher, normalize=True, reduction='batch_mean') == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize('options', [dict(reduction='norm'), dict(normalize=True)])
def test_gradient_at_zero_is_finite(options):
    student = torch.zeros(1, 2, 2, 2).requires_grad_()
    build(dict(type='FitNetLoss', **options))(student, torch.zeros(1, 2, 2, 2)).backward()
    assert torch.isfinite(student.grad).all()


def test_default_weight_is_cirkds():
    assert build(dict(type='FitNetLoss'))(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item() == 10.0


@pytest.mark.parametrize('options', [dict(distance='l3'), dict(reduction='batchmean')])
def test_bad_options(options):
    with pytest.raises(ValueError, match='is not one of'):
        build(dict(type='FitNetLoss', **options))
