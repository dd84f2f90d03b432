"""What all losses on whole heads ask of two heads."""

import pytest
import torch

from kd_mm.registry import build
from kd_mm.types.dense import Assignment, DenseView

AT = 'distances from the points at {} of a cell'


def view(place, sides=4, **more):
    return DenseView([torch.zeros(1, 2, 3)], distributions=[torch.randn(1, 2, sides, 9)],
                     quality=[torch.zeros(1, 2, 1)], measured=place and AT.format(place), **more)


@pytest.mark.parametrize('options', [
    dict(type='CrossKDLoss'), dict(type='ERDLoss'), dict(type='GOLSDLoss'), dict(type='LDLoss', valuable_weight=0)],
    ids=lambda options: options['type'])
def test_bins_that_do_not_mean_the_same_are_refused(options):
    """Of points that lie half a cell apart; and of an angle, but for the one loss that takes any distribution."""
    assignment = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], background=3)
    loss, student = build(options), view('0', assignment=assignment)
    with pytest.raises(ValueError, match='the same bin means another number'):
        loss.check_shapes(student, view('0.5'))
    if options['type'] != 'LDLoss':
        with pytest.raises(ValueError, match='are of an angle, and not of the sides of a box'):
            loss.check_shapes(view(None, 1, assignment=assignment), view(None, 1))
