"""Region masks: where on the feature map to imitate."""

from torch import nn

from kd_mm.types import Features, KDBatch


class RegionMask(nn.Module):
    """Weights per cell for each level: L tensors (N, 1, H, W), float32 or wider, not negative.

    A region made of objects is all zero for an image without any; its complement is then all one.  Losses turn a mean
    into a weighted mean and multiply the terms of a sum, so an empty region gives 0.

    Class attributes:
        needs_boxes, needs_seg_map: the targets the region is made of.
    """

    needs_boxes = False
    needs_seg_map = False

    def forward(self, features: Features, batch: KDBatch) -> Features:
        """Weights for ``features``, which only give sizes, device and dtype."""
        raise NotImplementedError
