import pytest
import torch
from torch.nn import functional as F

from kd_mm.losses.dsi import cell_cosine_gap
from kd_mm.registry import build


def value(student, teacher, **options):
    return build(dict(dict(type='DSILoss', loss_weight=1.0), **options))(student, teacher)


def test_closed_form():
    # Cells at 0, 60 and 180 degrees to the teacher's.
    student = torch.tensor([[3.0, 0.0], [1.0, 3**0.5], [-0.1, 0.0]], dtype=torch.float64).t().reshape(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 0.0]] * 3).double().t().reshape(1, 2, 1, 3)
    torch.testing.assert_close(cell_cosine_gap(student, teacher).flatten(), torch.tensor([0.0, 0.5, 2.0]).double())
    assert value(student, teacher).item() == pytest.approx(2.5 / 3, rel=1e-12)
    assert value(student, teacher, loss_weight=4.0).item() == pytest.approx(10 / 3, rel=1e-12)


@pytest.mark.parametrize('resize_student', [False, True])
def test_the_side_that_is_resized(resize_student):
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 8, 7).double()
    size = (8, 7) if resize_student else (4, 5)
    own, theirs = (side if side.shape[2:] == size else F.interpolate(side, size=size, mode='bilinear')
                   for side in (student, teacher))
    expected = 1 - F.cosine_similarity(own, theirs, dim=1).mean()
    torch.testing.assert_close(value(student, teacher, resize_student=resize_student), expected)


def test_a_vector_of_length_0_is_drawn_to_the_teacher():
    student = torch.zeros(1, 2, 1, 1).requires_grad_()
    loss = value(student, torch.ones(1, 2, 1, 1))
    loss.backward()
    assert loss.item() == 1 and (student.grad < 0).all() and torch.isfinite(student.grad).all()


def test_rows_have_one_direction_each():
    rows = torch.randn(5, 4)
    assert value(2 * rows, rows).item() == pytest.approx(0, abs=1e-6)


def test_one_channel_has_no_direction():
    with pytest.raises(ValueError, match='DSILoss, level 0: .*one channel'):
        value(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="resize_student='no'"):
        build(dict(type='DSILoss', resize_student='no'))
