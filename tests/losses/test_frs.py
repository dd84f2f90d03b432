import math

import pytest
import torch

from kd_mm.regions import TeacherScoreRegion
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def test_closed_form():
    # Scores 3/4 and 1/4; squared gaps of 3 channels: 4 and 16.
    logits = torch.tensor([[math.log(3), -math.log(3)], [-9.0, -9.0]], dtype=torch.float64).view(1, 2, 1, 2)
    student = torch.tensor([2.0, 4.0]).double().view(1, 1, 1, 2).expand(1, 3, 1, 2)
    loss = build(dict(type='FRSLoss', loss_weight=1.0))
    found = loss(student, torch.zeros_like(student), KDBatch(teacher_logits=(logits, )), TeacherScoreRegion('head'))
    assert found.item() == pytest.approx(3 * (4 * 0.75 + 16 * 0.25) / 1.0, rel=1e-12)


def test_without_region_all_cells_count_the_same():
    student = torch.full((2, 3, 4, 4), 2.0)
    assert build(dict(type='FRSLoss'))(student, torch.zeros_like(student)).item() == pytest.approx(0.005 * 12)
