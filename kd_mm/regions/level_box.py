"""Regions made of boxes, each on the one pyramid level that suits its size."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.checks import entries, positive
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import batch_boxes, input_shape


def box_level(boxes: Tensor, levels: int, scale: float = 56.0, border: float = 1.0) -> Tensor:
    """Level of each box by its size: ``clamp(floor(log2(sqrt(w * h) / scale)), 0, levels - 1)``.

    Args:
        boxes: (..., 4), pixels.
        levels: number of levels.
        scale: smallest edge of a box that would be on level 1, halved.
        border: added to ``x2 - x1`` and ``y2 - y1``.

    Returns:
        (...), whole numbers in the dtype of ``boxes``.

    Example:
        >>> box_level(torch.tensor([[0., 0., 31., 31.], [0., 0., 127., 127.]]), 3).tolist()
        [0.0, 1.0]
    """
    width, height = boxes[..., 2] - boxes[..., 0] + border, boxes[..., 3] - boxes[..., 1] + border
    edge = (width * height).clamp(min=0).sqrt()
    return (edge / scale + 1e-6).log2().floor().clamp(min=0, max=levels - 1)


def inner_cells(boxes: Tensor, stride: Tuple[float, float], size: Tuple[int, int]) -> Tensor:
    """Cells of boxes, both corners cut down to whole cells: first cell included, last one not.

    A box that would be empty gets the one cell of its upper left corner.

    Args:
        boxes: (N, M, 4), pixels.
        stride: pixels per cell, down and across.
        size: (H, W) of the map.

    Returns:
        (N, M, 4) as x1, y1, x2, y2.

    Example:
        >>> inner_cells(torch.tensor([[[8., 8., 30., 12.]]]), (8, 8), (4, 4)).tolist()
        [[[1.0, 1.0, 2.0, 2.0]]]
    """
    height, width = size
    down, across = stride
    cells = (boxes / boxes.new_tensor([across, down, across, down])).trunc()
    x1, y1 = cells[..., 0].clamp(min=0), cells[..., 1].clamp(min=0)
    x2, y2 = cells[..., 2].clamp(max=width), cells[..., 3].clamp(max=height)
    empty = (x2 <= x1) | (y2 <= y1)
    # Beyond the last cell the original would index out of range.
    x1 = torch.where(empty, x1.clamp(max=width - 1), x1)
    y1 = torch.where(empty, y1.clamp(max=height - 1), y1)
    return torch.stack([x1, y1, torch.where(empty, x1 + 1, x2), torch.where(empty, y1 + 1, y2)], dim=-1)


@MODELS.register_module()
class LevelBoxRegion(RegionMask):
    """Cells of the ground-truth boxes, every box on the one level that the FPN rule gives it (DeFeat).

    Args:
        strides: pixels per cell, one a level. Default None: input size over map size.
        scale: boxes of up to twice this edge are on the first level, up to four times on the second, ... Default 56
            [C: DeFeat, for any strides]; it is meant for levels from stride 4 on.

    Returns:
        L tensors (N, 1, H, W) of 0 and 1.

    Raises:
        ValueError: ``scale`` is not positive, the data has no boxes, or not as many strides as levels.

    Example:
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8., 8., 24., 24.]])])
        >>> first, second = LevelBoxRegion()((torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2)), batch)
        >>> first.sum().item(), second.sum().item()
        (4.0, 0.0)
    """

    needs_boxes = True

    def __init__(self, strides: Optional[Sequence[float]] = None, scale: float = 56.0):
        super().__init__()
        self.strides = None if strides is None else entries('LevelBoxRegion', 'strides', strides, positive)
        self.scale = positive('LevelBoxRegion', 'scale', scale)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        if self.strides is not None and len(self.strides) != len(features):
            raise ValueError(f'LevelBoxRegion: {len(self.strides)} strides for {len(features)} levels')
        boxes, real, _ = batch_boxes(batch, 'input', features[0])
        frame = input_shape(batch)
        level_of = box_level(boxes, len(features), self.scale)
        masks = []
        for level, tensor in enumerate(features):
            size = (tensor.shape[2], tensor.shape[3])
            stride = ((frame[0] / size[0], frame[1] / size[1]) if self.strides is None
                      else (self.strides[level], self.strides[level]))
            cells = inner_cells(boxes, stride, size)
            rows = torch.arange(size[0], device=boxes.device, dtype=boxes.dtype)
            columns = torch.arange(size[1], device=boxes.device, dtype=boxes.dtype)
            here = (real & (level_of == level))[..., None]
            in_rows = (rows >= cells[..., 1:2]) & (rows < cells[..., 3:4]) & here
            in_columns = (columns >= cells[..., 0:1]) & (columns < cells[..., 2:3])
            covered = torch.einsum('nmh,nmw->nhw', in_rows.to(boxes.dtype), in_columns.to(boxes.dtype))
            masks.append((covered > 0).to(boxes.dtype)[:, None])
        return tuple(masks)
