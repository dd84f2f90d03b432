import pytest
import torch

from kd_mm.registry import build


def value(student, teacher, region=None, **options):
    loss = build(dict(type='NSTLoss', loss_weight=1.0, **options))
    return loss(student, teacher, None, None if region is None else lambda features, batch: (region, )).item()


def random_maps(*shape):
    return torch.randn(*shape).double()


def test_closed_form():
    # Three cells; the student's one channel is on the diagonal between the teacher's two.
    student, teacher = torch.zeros(1, 1, 1, 3).double(), torch.zeros(1, 2, 1, 3).double()
    student[0, 0, 0, :2] = 5.0
    teacher[0, 0, 0, 0], teacher[0, 1, 0, 1] = 2.0, -3.0
    # a.b: t with t' 1, 0, 0, 1; s with s 1; s with t 1/sqrt 2 and -1/sqrt 2.
    assert value(student, teacher) == pytest.approx(0.5 + 1 - 2 * 0.5, rel=1e-12)
    assert value(student, teacher, degree=1) == pytest.approx(0.5 + 1 - 0, rel=1e-12)
    # Degree 2 with offset 1: (4 + 1 + 1 + 4) / 4 + 4 - 2 * ((1 + r)^2 + (1 - r)^2) / 2, r^2 = 1/2.
    assert value(student, teacher, offset=1.0) == pytest.approx(2.5 + 4 - 2 * 1.5, rel=1e-12)


def test_neither_order_nor_scale_nor_copies_of_channels_count():
    student, teacher = random_maps(2, 5, 4, 6), random_maps(2, 7, 4, 6)
    first = value(student, teacher)
    assert value(torch.cat([student.flip(1) * 3] * 2, dim=1), teacher) == pytest.approx(first, rel=1e-10)
    assert value(teacher.flip(1), teacher) == pytest.approx(0.0, abs=1e-14)


def test_cells_in_another_order_on_both_sides_are_the_same():
    student, teacher = random_maps(2, 5, 4, 6), random_maps(2, 7, 4, 6)
    assert value(student.flip(3), teacher.flip(3)) == pytest.approx(value(student, teacher), rel=1e-12)
    assert value(student.flip(3), teacher) != pytest.approx(value(student, teacher), rel=1e-6)


def test_region_is_the_loss_of_its_cells():
    student, teacher = random_maps(2, 3, 4, 5), random_maps(2, 4, 4, 5)
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    part = value(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4], offset=0.5)
    assert value(student, teacher, mask, offset=0.5) == pytest.approx(part, rel=1e-12)
    mask[0] = 0
    part = value(student[1:, :, 1:3, :4], teacher[1:, :, 1:3, :4], offset=0.5)
    assert value(student, teacher, mask, offset=0.5) == pytest.approx(part, rel=1e-12)


def test_region_weighs_the_cells():
    student, teacher = random_maps(1, 3, 1, 2), random_maps(1, 4, 1, 2)
    twice = student[..., [0, 1, 1]], teacher[..., [0, 1, 1]]
    assert value(student, teacher, torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)) == pytest.approx(value(*twice), rel=1e-6)


@pytest.mark.parametrize('options', [dict(degree=0), dict(degree=1.5), dict(degree=True), dict(offset=-1.0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='NSTLoss', **options))
