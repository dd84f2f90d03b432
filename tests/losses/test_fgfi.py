import pytest
import torch

from kd_mm.regions import FineGrainedRegion
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def test_closed_form():
    # 3 channels, gaps 2 in one cell and 0 in another, 5 elsewhere but outside of the region.
    student = torch.full((1, 3, 2, 2), 5.0)
    student[:, :, 0, 0], student[:, :, 0, 1] = 2.0, 0.0
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    loss = build(dict(type='FGFILoss', loss_weight=1.0))
    found = loss.level_loss(0, student, torch.zeros_like(student), KDBatch(), mask)
    assert found.item() == pytest.approx(3 * 4 / (2 * 2))
    assert build(dict(type='FGFILoss'))(torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).item() == pytest.approx(0.02)


def test_with_its_region_and_no_boxes():
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    batch = KDBatch(input_shape=(32, 32), boxes=[torch.zeros(0, 4)])
    total = build(dict(type='FGFILoss'))(student, torch.randn(1, 3, 4, 4), batch, FineGrainedRegion(strides=[8]))
    total.backward()
    assert total.item() == 0 and student.grad.abs().sum() == 0
