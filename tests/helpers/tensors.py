"""What the tests of losses share: drawn tensors, a region that is given, a gradient by differences."""

import pytest
import torch

from kd_mm.regions.base import RegionMask
from kd_mm.types.batch import KDBatch


class Given(RegionMask):
    """The same mask, (N, 1, H, W), on every level."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, features, batch):
        return (self.mask, ) * len(features)


def draw(*shape, seed=0):
    """Normal numbers in float64, the same for the same seed and shape whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def random_rows(*shape):
    """Normal numbers in float64 from the generator of torch."""
    return torch.randn(*shape).double()


def by_differences(function, inputs, step=1e-5):
    """Gradient of a function of one tensor by central differences."""
    values = inputs.detach()
    result = torch.zeros_like(values)
    for index in range(values.numel()):
        ends = []
        for sign in (1, -1):
            moved = values.clone()
            moved.view(-1)[index] += sign * step
            ends.append(function(moved).item())
        result.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return result


def check_samples_and_limit(value):
    """A loss on relations: samples are images or cells, and a limit draws other cells in every step.

    Args:
        value: function of student, teacher, batch and options of the loss.
    """
    student, teacher = random_rows(3, 4, 2, 2), random_rows(3, 6, 2, 2)
    assert value(student, teacher, samples='image') == pytest.approx(value(student.flatten(1), teacher.flatten(1)))
    cells = student.permute(0, 2, 3, 1).reshape(12, 4), teacher.permute(0, 2, 3, 1).reshape(12, 6)
    assert value(student, teacher) == pytest.approx(value(*cells), rel=1e-12)
    drawn = {value(*cells, KDBatch(step=step), limit=5) for step in range(4)}
    assert len(drawn) == 4 and value(*cells, limit=12) == pytest.approx(value(*cells))
