"""Regions made of segmentation labels."""

from typing import Optional, Sequence

import torch

from kd_mm.ops.checks import class_indices
from kd_mm.ops.functional import parameter_options
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import seg_map, valid_pixels


@MODELS.register_module()
class SegClassRegion(RegionMask):
    """Cells whose label (nearest pixel) is among some classes; ignored pixels never are.

    Args:
        classes: class indices; None (default) for every labelled pixel, which keeps the ignored ones out of a feature
            loss.

    Returns:
        L tensors (N, 1, H, W) of 0 and 1.

    Raises:
        ValueError: ``classes`` is empty, or the data has no segmentation map.

    Example:
        >>> batch = KDBatch(seg_map=torch.tensor([[[0, 1], [255, 1]]]))
        >>> SegClassRegion(classes=[1])((torch.zeros(1, 8, 2, 2), ), batch)[0].flatten()
        tensor([0., 1., 0., 1.])
    """

    needs_seg_map = True

    def __init__(self, classes: Optional[Sequence[int]] = None):
        super().__init__()
        self.classes = class_indices('SegClassRegion', 'classes', classes)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        masks = []
        for tensor in features:
            size = (tensor.shape[2], tensor.shape[3])
            labels = seg_map(batch, size)
            chosen = valid_pixels(batch, size)
            assert chosen is not None
            if self.classes is not None:
                chosen = chosen & torch.isin(labels, torch.tensor(self.classes, device=labels.device))
            masks.append(chosen[:, None].to(**parameter_options(tensor)))
        return tuple(masks)
