"""Regions that fade from the centre of a box outwards."""

from typing import Optional, Sequence

import torch

from kd_mm.ops.checks import boolean, class_indices, positive
from kd_mm.ops.functional import nonzero
from kd_mm.regions.base import RegionMask
from kd_mm.regions.gt_box import BLOCK
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import batch_boxes, input_shape


@MODELS.register_module()
class GaussianBoxRegion(RegionMask):
    """``exp(-((x - cx)^2 / (2 sx^2) + (y - cy)^2 / (2 sy^2)))`` around each box, the largest one where several overlap.

    ``(cx, cy)`` is the centre of the box, ``sx`` and ``sy`` are ``spread`` times its width and height.  Places are the
    middles of cells, so that a small box always has a value close to 1 on a fine level.

    Args:
        spread: standard deviation in parts of the box, above 0. Default 0.25: the box is two deviations to each side.
        inside: 0 outside of the boxes' cells, whose middle is not in a box. Default True.
        classes: class indices of the boxes that count; None for all.

    Returns:
        L tensors (N, 1, H, W) in 0..1.

    Raises:
        ValueError: ``spread`` is not positive, or the data has no boxes (or labels, with ``classes``).

    Example:
        >>> batch = KDBatch(input_shape=(24, 24), boxes=[torch.tensor([[0., 0., 24., 24.]])])
        >>> GaussianBoxRegion()((torch.zeros(1, 8, 3, 3), ), batch)[0][0, 0, 1, 1].item()
        1.0
    """

    needs_boxes = True

    def __init__(self, spread: float = 0.25, inside: bool = True, classes: Optional[Sequence[int]] = None):
        super().__init__()
        self.spread = positive('GaussianBoxRegion', 'spread', spread)
        self.inside = boolean('GaussianBoxRegion', 'inside', inside)
        self.classes = class_indices('GaussianBoxRegion', 'classes', classes)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        boxes, real, _ = batch_boxes(batch, 'input', features[0], self.classes)
        frame, masks = input_shape(batch), []
        for tensor in features:
            result = boxes.new_zeros(boxes.shape[0], tensor.shape[2], tensor.shape[3])
            for start in range(0, boxes.shape[1], BLOCK):
                part, sides = boxes[:, start:start + BLOCK], []
                for low, axis in ((1, 2), (0, 3)):  # rows, then columns
                    cell = frame[axis - 2] / tensor.shape[axis]
                    places = (torch.arange(tensor.shape[axis], device=part.device, dtype=part.dtype) + 0.5) * cell
                    first, last = part[..., low:low + 1], part[..., low + 2:low + 3]
                    deviation = nonzero(self.spread * (last - first))
                    value = (-((places - (first + last) / 2) / deviation).square() / 2).exp()
                    sides.append(value * ((places >= first) & (places <= last)) if self.inside else value)
                both = sides[0][..., :, None] * sides[1][..., None, :] * real[:, start:start + BLOCK, None, None]
                result = torch.maximum(result, both.amax(dim=1))
            masks.append(result[:, None])
        return tuple(masks)
