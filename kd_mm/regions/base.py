"""Region masks: where on the feature map to imitate."""

from torch import nn

from kd_mm.types import Features, KDBatch


class RegionMask(nn.Module):
    """Weights per cell for each level: L tensors (N, 1, H, W), float32 or wider; all zero for an image without boxes.

    Class attributes:
        needs_boxes, needs_seg_map: the targets the region is made of.
    """

    needs_boxes = False
    needs_seg_map = False

    def forward(self, features: Features, batch: KDBatch) -> Features:
        raise NotImplementedError
