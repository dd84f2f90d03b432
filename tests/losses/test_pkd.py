import pytest
import torch

from kd_mm.losses.pkd import standardise
from kd_mm.regions import GTBoxRegion
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, **options):
    return build(dict(type='PKDLoss', loss_weight=1.0, eps=0.0, **options))(student, teacher).item()


def test_closed_form():
    # Cells (0, 2) and (0, 0, ...) would have no deviation; (-1, 1) against (1, -1) correlate by -1: 2 (n - 1) / n.
    student = torch.tensor([-1.0, 1.0]).double().view(1, 1, 1, 2)
    assert value(student, -student) == pytest.approx(2 * 0.5, rel=1e-12)
    assert value(student, student) == 0.0


def test_is_one_minus_the_mean_correlation():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    rows = [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(3)]
    expected = (1 - sum(rows) / 3) * 39 / 40
    assert value(student, teacher) == pytest.approx(expected.item(), rel=1e-10)


def test_invariant_to_an_affine_map_of_each_channel():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    scale, shift = torch.rand(1, 3, 1, 1).double() + 0.1, torch.randn(1, 3, 1, 1).double()
    assert value(scale * student + shift, teacher) == pytest.approx(value(student, teacher), rel=1e-10)
    assert value(-scale * student, teacher) != pytest.approx(value(student, teacher), rel=1e-3)


@pytest.mark.parametrize('size', [(8, 10), (4, 10), (8, 5)])
def test_either_side_may_differ_in_size(size):
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, *size)
    loss = build(dict(type='PKDLoss'))
    resized = torch.nn.functional.interpolate(student, size=size, mode='bilinear', align_corners=False)
    assert torch.allclose(loss(student, teacher), loss(resized, teacher))
    other = build(dict(type='PKDLoss', resize_student=False))
    resized = torch.nn.functional.interpolate(teacher, size=(4, 5), mode='bilinear', align_corners=False)
    assert torch.allclose(other(student, teacher), other(student, resized))
    batch = KDBatch(input_shape=(32, 40), boxes=[torch.tensor([[0.0, 0.0, 20.0, 20.0]])] * 2)
    assert torch.isfinite(loss(student, teacher, batch, GTBoxRegion()))
    assert torch.isfinite(other(student, teacher, batch, GTBoxRegion()))


def test_region_is_the_loss_of_its_cells():
    features = torch.randn(2, 3, 4, 6).double()
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2, 1:4] = 1
    part = standardise(features[:, :, :2, 1:4])
    assert torch.allclose(standardise(features, mask)[:, :, :2, 1:4], part, rtol=1e-10)


def test_a_constant_channel_has_a_finite_gradient():
    student = torch.full((1, 2, 3, 3), 4.0).requires_grad_()
    loss = build(dict(type='PKDLoss'))(student, torch.randn(1, 2, 3, 3))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    one = torch.ones(1, 2, 1, 1).requires_grad_()
    build(dict(type='PKDLoss'))(one, torch.ones(1, 2, 1, 1)).backward()
    assert torch.isfinite(one.grad).all()
