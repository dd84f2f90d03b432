import math

import pytest
import torch

from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

#: KL of (3/4, 1/4) to (1/2, 1/2), and the entropy of (3/4, 1/4)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
ENTROPY = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


class First(RegionMask):
    """Weights 1 and 3 for the first two cells of every image, 0 for the others."""

    def forward(self, features, batch):
        masks = []
        for tensor in features:
            mask = torch.zeros_like(tensor[:, :1]).flatten(1)
            mask[:, 0], mask[:, 1] = 1, 3
            masks.append(mask.view_as(tensor[:, :1]))
        return tuple(masks)


def logits(count=2, height=3, width=4):
    """Student undecided between two classes, teacher three to one, in every pixel."""
    teacher = torch.zeros(count, 2, height, width, dtype=torch.float64)
    teacher[:, 0] = math.log(3)
    return torch.zeros_like(teacher), teacher


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='SoftmaxKDLoss', **options))(student, teacher, batch, region).item()


@pytest.mark.parametrize('reduction, expected', [
    ('pixel_mean', KL), ('element_mean', KL / 2), ('batch_mean', 12 * KL), ('spatial_mean', 2 * KL), ('sum', 24 * KL)])
def test_closed_form_of_the_reductions(reduction, expected):
    assert value(*logits(), reduction=reduction) == pytest.approx(expected, rel=1e-12)


def test_closed_form_of_rows():
    student, teacher = torch.zeros(5, 2).double(), torch.tensor([[math.log(3), 0.0]] * 5).double()
    assert value(student, teacher) == pytest.approx(KL, rel=1e-7)
    assert value(student, teacher, reduction='batch_mean') == pytest.approx(KL, rel=1e-7)
    empty = student[:0].requires_grad_()
    assert value(empty, teacher[:0]) == 0.0
    with pytest.raises(ValueError, match='region needs maps'):
        value(student, teacher, KDBatch(), First())


def test_cross_entropy_adds_the_teachers_entropy():
    assert value(*logits(), divergence='cross_entropy') == pytest.approx(KL + ENTROPY, rel=1e-12)


def test_temperature():
    student, teacher = logits()
    assert value(student, 4 * teacher, tau=4.0) == pytest.approx(16 * KL, rel=1e-12)
    assert value(student, 4 * teacher, tau=4.0, tau_squared=False) == pytest.approx(KL, rel=1e-12)


def test_ignored_pixels_are_left_out():
    student, teacher = logits(count=1)
    teacher[0, :, 0, 0] = 100 * torch.tensor([1.0, -1.0])
    seg_map = torch.zeros(1, 6, 8, dtype=torch.uint8)
    seg_map[0, 0, 0] = 255  # cell (0, 0) of the 3 x 4 logits reads pixel (0, 0)
    batch = KDBatch(seg_map=seg_map)
    assert value(student, teacher, batch) == pytest.approx(KL, rel=1e-12)
    assert value(student, teacher, batch, mask_ignored=False) > 1.01 * KL
    assert value(student, teacher) > 1.01 * KL
    batch.targets.ignore_index = 0
    seg_map[:] = 0
    assert value(student, teacher, batch) == 0.0


def test_region_and_labels_together():
    student, teacher = logits(count=1, height=1)
    student[0, :, 0, 1] = teacher[0, :, 0, 1]
    assert value(student, teacher, KDBatch(), First()) == pytest.approx(KL / 4, rel=1e-12)
    seg_map = torch.tensor([[[0, 255, 0, 0]]])
    assert value(student, teacher, KDBatch(seg_map=seg_map), First()) == pytest.approx(KL, rel=1e-12)


def test_invariant_to_a_constant_in_each_pixel():
    student, teacher = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3, 4).double()
    moved = student + torch.randn(2, 1, 3, 4).double()
    assert value(moved, teacher) == pytest.approx(value(student, teacher), rel=1e-10)


@pytest.mark.parametrize('options, message', [
    (dict(reduction='mean'), "reduction='mean' is not one of 'pixel_mean'"),
    (dict(divergence='js'), "divergence='js'"), (dict(tau=0), 'tau=0 must be above 0')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        value(*logits(), **options)
