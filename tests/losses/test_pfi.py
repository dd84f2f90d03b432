import math

import pytest
import torch

from kd_mm.regions import PredictionGapRegion
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def test_closed_form():
    # Two classes; the first cell's scores are 3/4 against 1/2 in one class, the second cell's agree.
    ours, theirs = torch.zeros(1, 2, 1, 2).double(), torch.zeros(1, 2, 1, 2).double()
    theirs[0, 0, 0, 0] = math.log(3)
    student = torch.tensor([2.0, 4.0]).double().view(1, 1, 1, 2).expand(1, 3, 1, 2)
    batch = KDBatch(student_logits=(ours, ), teacher_logits=(theirs, ))
    found = build(dict(type='PFILoss', loss_weight=1.0))(student, torch.zeros_like(student), batch,
                                                         PredictionGapRegion('head'))
    assert found.item() == pytest.approx((1 / 16 / 2) * 4 / 2, rel=1e-12)


def test_it_fades_with_the_gap_and_gives_the_logits_no_gradient():
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    ours, theirs = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    loss, region = build(dict(type='PFILoss')), PredictionGapRegion('head')
    near = ours.detach() + 0.01 * (theirs - ours.detach())
    far = KDBatch(student_logits=(ours, ), teacher_logits=(theirs, ))
    close = KDBatch(student_logits=(ours, ), teacher_logits=(near, ))
    assert loss(student, teacher, close, region) < 1e-3 * loss(student, teacher, far, region)
    assert not loss(student, teacher, far, region).requires_grad


def test_without_region_it_is_the_mean_square():
    student = torch.full((2, 3, 4, 4), 2.0)
    assert build(dict(type='PFILoss'))(student, torch.zeros_like(student)).item() == pytest.approx(6.0)
