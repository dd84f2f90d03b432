"""Measures of likeness: their values by hand, and sides without anything to compare."""

import pytest
import torch

from kd_mm.ops.similarity import grid, linear_cka, same_class


@pytest.mark.parametrize('sizes', [((4, 4), (2, 2)), ((7, 7), (7, 7))])
def test_no_images_give_no_rows(sizes):
    """A rank whose images have no objects has no RoIs."""
    first, second = (torch.zeros(0, channels, *size) for channels, size in zip((3, 5), sizes))
    rows = grid((first, second), 64)
    assert [tuple(side.shape) for side in rows] == [(0, 3), (0, 5)]


def test_rotated_and_scaled_features_are_alike():
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    assert float(linear_cka(rows, 3 * rows @ turned)) == pytest.approx(1.0, abs=1e-4)
    other = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    assert abs(float(linear_cka(rows, other))) < 0.1


def test_the_share_of_equal_classes():
    own = torch.tensor([[1., 0.], [0., 1.], [2., 1.], [0., 3.]])
    theirs = torch.tensor([[1., 0.], [1., 0.], [5., 1.], [0., 1.]])
    assert float(same_class(own, theirs)) == 0.75
