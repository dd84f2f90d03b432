import pytest
import torch
from tensors import Given

from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, region=None, **options):
    return build(dict(type='ATLoss', loss_weight=1.0, **options))(student, teacher, KDBatch(), region).item()


def opposite(count=2):
    """Two cells: the student looks at the first, the teacher at the second only."""
    student, teacher = torch.zeros(count, 3, 1, 2).double(), torch.zeros(count, 5, 1, 2).double()
    student[..., 0], teacher[..., 1] = 7.0, -2.0
    return student, teacher


@pytest.mark.parametrize('reduction, expected', [('mean', 1.0), ('cell_sum', 2.0), ('norm', 2**0.5)])
def test_closed_form(reduction, expected):
    # Attentions (1, 0) and (0, 1): squared differences 1 and 1.
    assert value(*opposite(), reduction=reduction) == pytest.approx(expected)
    assert value(*opposite(3), reduction=reduction) == pytest.approx(expected)


def test_exponent():
    student = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2).double()
    teacher = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).double()
    assert value(student, teacher, p=1) == pytest.approx((0.6**2 + 0.2**2) / 2)
    assert value(student, teacher, p=2) == pytest.approx(1 - 16 / (81 + 256)**0.5)


def test_invariant_to_scale_sign_and_order_of_channels():
    student, teacher = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 6, 3, 5).double()
    assert value(-3 * student.flip(1), 0.5 * teacher) == pytest.approx(value(student, teacher), rel=1e-10)


@pytest.mark.parametrize('options', [{}, dict(reduction='cell_sum'), dict(reduction='norm')])
def test_region_is_the_loss_of_its_cells(options):
    student, teacher = torch.randn(2, 4, 4, 5).double(), torch.randn(2, 6, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    part = value(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4], **options)
    assert value(student, teacher, Given(mask), **options) == pytest.approx(part, rel=1e-12)
    mask[1] = 0
    first = value(student[:1, :, 1:3, :4], teacher[:1, :, 1:3, :4], **options)
    assert value(student, teacher, Given(mask), **options) == pytest.approx(first, rel=1e-12)


def test_cell_sum_does_not_depend_on_the_resolution():
    student, teacher = torch.randn(2, 4, 4, 5).double(), torch.randn(2, 6, 4, 5).double()
    fine = [tensor.repeat_interleave(2, 2).repeat_interleave(2, 3) for tensor in (student, teacher)]
    coarse = value(student, teacher, reduction='cell_sum')
    assert value(*fine, reduction='cell_sum') == pytest.approx(coarse, rel=1e-10)
    assert value(*fine) == pytest.approx(value(student, teacher) / 4, rel=1e-10)


def test_the_larger_map_is_averaged():
    student, teacher = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 6, 2, 3).double()
    pooled = torch.nn.functional.avg_pool2d(student, 2)
    assert value(student, teacher) == pytest.approx(value(pooled, teacher), rel=1e-12)
    assert value(teacher, student) == pytest.approx(value(teacher, pooled), rel=1e-12)
    wide, tall = torch.randn(1, 2, 2, 6).double(), torch.randn(1, 2, 4, 3).double()
    expected = value(torch.nn.functional.avg_pool2d(wide, (1, 2)), torch.nn.functional.avg_pool2d(tall, (2, 1)))
    assert value(wide, tall) == pytest.approx(expected, rel=1e-12)
    masked = value(student, teacher, Given(torch.ones(2, 1, 2, 3)))
    assert masked == pytest.approx(value(student, teacher), rel=1e-12)


def test_an_empty_map_has_a_finite_gradient():
    student = torch.zeros(2, 4, 3, 3).requires_grad_()
    build(dict(type='ATLoss'))(student, torch.randn(2, 4, 3, 3)).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('options', [dict(p=0.5), dict(p=float('nan')), dict(reduction='sum')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='ATLoss', **options))
