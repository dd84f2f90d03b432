"""Adapters bring student and teacher features into one space; they exist during training only."""

from typing import Tuple

from torch import nn

from kd_mm.types import Features


class Adapter(nn.Module):
    """Maps a pair of feature tuples to a pair that a loss can compare.

    Both sides are passed because some recipes normalise both (RTMDet's); most adapters change the student alone.
    """

    def prepare(self, student: Features, teacher: Features) -> None:
        """Create the parameters, sized by one pair of features; called once, before the optimizer is given them."""

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        raise NotImplementedError
