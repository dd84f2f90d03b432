"""Regions made of anchors near an object."""

import math
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.checks import boolean, entries, number, positive
from kd_mm.ops.functional import nonzero
from kd_mm.regions.base import RegionMask
from kd_mm.regions.gt_box import BLOCK
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import batch_boxes


def anchor_shapes(stride: float, scales: Sequence[float], ratios: Sequence[float],
                  rounded: bool = False) -> Tuple[Tuple[float, float], ...]:
    """(width, height) of the anchors of a cell: area ``(stride * scale)^2``, height / width = ratio.

    Args:
        stride: pixels per cell.
        scales: edge of the square anchor in cells.
        ratios: height over width.
        rounded: round the shapes of scale 1 to whole pixels first, as Faster R-CNN's first code did.

    Example:
        >>> anchor_shapes(16, [2], [1, 4])
        ((32.0, 32.0), (16.0, 64.0))
    """
    shapes: List[Tuple[float, float]] = []
    for ratio in ratios:
        width = stride / math.sqrt(ratio)
        height = width * ratio
        if rounded:
            width = float(round(math.sqrt(stride * stride / ratio)))
            height = float(round(width * ratio))
        shapes.extend((width * scale, height * scale) for scale in scales)
    return tuple(shapes)


def cell_overlap(boxes: Tensor, size: Tuple[int, int], stride: float, shapes: Sequence[Tuple[float, float]],
                 offset: float = 0.0, border: float = 0.0) -> Tensor:
    """Largest IoU of each box with the anchors of each cell: (N, M, H, W).

    Anchors are centred at ``stride * cell + offset``.  An intersection is a product of a width that depends on the
    column and a height that depends on the row, so no list of all anchors is built.

    Args:
        boxes: (N, M, 4), pixels.
        size: (H, W) of the map.
        stride: pixels per cell.
        shapes: (width, height) of the anchors.
        offset: of the first anchor's centre, in pixels.
        border: added to ``x2 - x1``: 1 for boxes that include their last pixel.

    Example:
        >>> cell_overlap(torch.tensor([[[-4., -4., 4., 4.]]]), (1, 2), 8, [(8., 8.)]).flatten().tolist()
        [1.0, 0.0]
    """
    best = boxes.new_zeros(*boxes.shape[:2], *size)
    columns = (torch.arange(size[1], device=boxes.device, dtype=boxes.dtype) * stride + offset)[None, None]
    rows = (torch.arange(size[0], device=boxes.device, dtype=boxes.dtype) * stride + offset)[None, None]
    area = ((boxes[..., 2] - boxes[..., 0] + border) * (boxes[..., 3] - boxes[..., 1] + border))[..., None, None]
    for width, height in shapes:
        half = ((width - border) / 2, (height - border) / 2)
        across = (torch.minimum(columns + half[0], boxes[..., 2:3])
                  - torch.maximum(columns - half[0], boxes[..., 0:1]) + border).clamp(min=0)
        down = (torch.minimum(rows + half[1], boxes[..., 3:4])
                - torch.maximum(rows - half[1], boxes[..., 1:2]) + border).clamp(min=0)
        both = down[..., :, None] * across[..., None, :]
        best = torch.maximum(best, both / nonzero(width * height + area - both))
    return best


@MODELS.register_module()
class FineGrainedRegion(RegionMask):
    """Cells with an anchor whose IoU with a box is above ``iou_factor`` times the best IoU of that box (FGFI).

    The best IoU is over the anchors of all levels, those beyond the image included: a box has cells on the levels whose
    anchors fit it, and always some.  The original has one level.  Anchors are upright: of a rotated box (MMRotate) the
    upright box around it counts.

    Args:
        strides: pixels per cell, one a level, such as ``[8, 16, 32, 64, 128]``.
        scales: edges of the square anchors in cells. Default those of RetinaNet, ``4 * 2^(i/3)``.
        ratios: height over width of the anchors. Default (0.5, 1, 2) [C].
        iou_factor: part of the best IoU, in 0..1. Default 0.5 [C].
        legacy: the original's geometry: anchors centred at the middle of the first cell's pixels and rounded, boxes
            that include their last pixel. Default False: mmdet's anchors, centred at the corner of the cell.

    Returns:
        L tensors (N, 1, H, W) of 0 and 1.

    Raises:
        ValueError: an option is out of range, the data has no boxes, or not as many strides as levels.

    Example:
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[-8., -8., 24., 24.]])])
        >>> region = FineGrainedRegion(strides=[8], scales=[4], ratios=[1])
        >>> region((torch.zeros(1, 8, 4, 4), ), batch)[0].sum().item()
        5.0
    """

    needs_boxes = True

    def __init__(self, strides: Sequence[float], scales: Sequence[float] = (4, 4 * 2**(1 / 3), 4 * 2**(2 / 3)),
                 ratios: Sequence[float] = (0.5, 1, 2), iou_factor: float = 0.5, legacy: bool = False):
        super().__init__()
        self.strides = entries('FineGrainedRegion', 'strides', strides, positive)
        self.scales = entries('FineGrainedRegion', 'scales', scales, positive)
        self.ratios = entries('FineGrainedRegion', 'ratios', ratios, positive)
        self.iou_factor = number('FineGrainedRegion', 'iou_factor', iou_factor, 0, 1)
        self.legacy = boolean('FineGrainedRegion', 'legacy', legacy)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        if len(self.strides) != len(features):
            raise ValueError(f'FineGrainedRegion: {len(self.strides)} strides for {len(features)} levels')
        boxes, real, _ = batch_boxes(batch, 'input', features[0])
        masks = [boxes.new_zeros(tensor.shape[0], *tensor.shape[2:]) for tensor in features]
        for start in range(0, boxes.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            overlaps = [cell_overlap(boxes[:, part], (tensor.shape[2], tensor.shape[3]), stride,
                                     anchor_shapes(stride, self.scales, self.ratios, self.legacy),
                                     *(((stride - 1) / 2, 1.0) if self.legacy else (0.0, 0.0)))
                        * real[:, part, None, None]
                        for tensor, stride in zip(features, self.strides)]
            best = torch.stack([overlap.amax(dim=(2, 3)) for overlap in overlaps]).amax(dim=0)
            for mask, overlap in zip(masks, overlaps):
                near = (overlap > self.iou_factor * best[..., None, None]).any(dim=1)
                mask.copy_(torch.maximum(mask, near.to(mask.dtype)))
        return tuple(mask[:, None] for mask in masks)
