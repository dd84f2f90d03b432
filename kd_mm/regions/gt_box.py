"""Regions made of ground-truth boxes."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.checks import class_indices, one_of
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import FRAMES, batch_boxes

MODES = ('foreground', 'background', 'scale')
#: boxes of an image handled at once by scale_mask: bounds its memory at N * 64 * H * W numbers.
BLOCK = 64


def box_cells(boxes: Tensor, frames: Tensor, size: Tuple[int, int]) -> Tensor:
    """Boxes in feature cells: ``floor`` of the upper left and ``ceil`` of the lower right corner, **both included**.

    That is FGD's rule; it may add a row and a column.  Not clipped to the map.

    Args:
        boxes: (N, M, 4), pixels.
        frames: (N, 2), height and width in pixels that the map covers.
        size: (H, W) of the map.

    Returns:
        (N, M, 4), whole numbers x1, y1, x2, y2 in the dtype of ``boxes``.

    Example:
        >>> box_cells(torch.tensor([[[8., 8., 20., 16.]]]), torch.tensor([[32., 32.]]), (4, 4))
        tensor([[[1., 1., 3., 2.]]])
    """
    height, width = size
    extent = frames.flip(1).repeat(1, 2)[:, None]
    cells = boxes / extent * boxes.new_tensor([width, height, width, height])
    return torch.cat([cells[..., :2].floor(), cells[..., 2:].ceil()], dim=-1)


def _spans(cells: Tensor, real: Tensor, size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    """Which rows (N, M, H) and which columns (N, M, W) each box covers; none for a filler."""
    rows = torch.arange(size[0], device=cells.device, dtype=cells.dtype)
    columns = torch.arange(size[1], device=cells.device, dtype=cells.dtype)
    in_rows = (rows >= cells[..., 1:2]) & (rows <= cells[..., 3:4]) & real[..., None]
    in_columns = (columns >= cells[..., 0:1]) & (columns <= cells[..., 2:3])
    return in_rows, in_columns


def rotated_cells(boxes: Tensor, real: Tensor, frames: Tensor, size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    """Which cells (N, M, H, W) each rotated box covers, and how many it covers where the map has no edge (N, M).

    A cell is covered if its centre is inside of the box, or at most half a cell outside of an edge: about what
    :func:`box_cells` does, which includes both ends, and no box is without a cell [ours].

    Args:
        boxes: (N, M, 5), centre, width and height in pixels, and the angle of the width in radians.
        real, frames: as :func:`batch_boxes` returns them.
        size: (H, W) of the map.

    Example:
        >>> box, real = torch.tensor([[[16., 16., 32., 8., torch.pi / 4]]]), torch.tensor([[True]])
        >>> covered, _ = rotated_cells(box, real, torch.tensor([[32., 32.]]), (4, 4))
        >>> covered[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    height, width = size
    stride = frames / frames.new_tensor([height, width])  # (N, 2): down, across
    rows = (torch.arange(height, device=boxes.device, dtype=boxes.dtype) + 0.5)[:, None] * stride[:, 0, None, None]
    columns = (torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5)[None] * stride[:, 1, None, None]
    down, across = rows[:, None] - boxes[..., 1, None, None], columns[:, None] - boxes[..., 0, None, None]
    cosine, sine = boxes[..., 4].cos()[..., None, None], boxes[..., 4].sin()[..., None, None]
    cell = stride.amin(dim=1)[:, None]
    half = [(boxes[..., axis] + cell) / 2 for axis in (2, 3)]
    inside = ((across * cosine + down * sine).abs() <= half[0][..., None, None]) & (
        (down * cosine - across * sine).abs() <= half[1][..., None, None])
    return inside & real[..., None, None], (4 * half[0] * half[1] / stride.prod(dim=1)[:, None]).clamp(min=1)


def _rotated_mask(boxes: Tensor, real: Tensor, frames: Tensor, size: Tuple[int, int], scaled: bool) -> Tensor:
    result = boxes.new_zeros(boxes.shape[0], *size)
    for start in range(0, boxes.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        inside, area = rotated_cells(boxes[:, part], real[:, part], frames, size)
        value = inside / area[..., None, None] if scaled else inside.to(result.dtype)
        result = torch.maximum(result, value.amax(dim=1))
    return result[:, None]


def foreground_mask(boxes: Tensor, real: Tensor, frames: Tensor, size: Tuple[int, int]) -> Tensor:
    """1 in the cells of any box, 0 elsewhere: (N, 1, H, W).

    Args:
        boxes, real, frames: as :func:`batch_boxes` returns them; rotated boxes (N, M, 5) too, see
            :func:`rotated_cells`.
        size: (H, W) of the map.

    Example:
        >>> boxes, real = torch.tensor([[[8., 8., 16., 16.]]]), torch.tensor([[True]])
        >>> foreground_mask(boxes, real, torch.tensor([[32., 32.]]), (4, 4)).sum().item()
        4.0
    """
    if boxes.shape[-1] == 5:
        return _rotated_mask(boxes, real, frames, size, False)
    in_rows, in_columns = _spans(box_cells(boxes, frames, size), real, size)
    covered = torch.einsum('nmh,nmw->nhw', in_rows.to(boxes.dtype), in_columns.to(boxes.dtype))
    return (covered > 0).to(boxes.dtype)[:, None]


def scale_mask(boxes: Tensor, real: Tensor, frames: Tensor, size: Tuple[int, int]) -> Tensor:
    """``1 / (cells of the box)`` in the cells of a box, of the smallest one where several overlap: (N, 1, H, W).

    Every box then counts the same, whatever its size (FGD).  The area is that of :func:`box_cells` before clipping.

    Args:
        boxes, real, frames: as :func:`batch_boxes` returns them; rotated boxes (N, M, 5) too, see
            :func:`rotated_cells`.
        size: (H, W) of the map.

    Example:
        >>> boxes, real = torch.tensor([[[8., 8., 16., 16.]]]), torch.tensor([[True]])
        >>> scale_mask(boxes, real, torch.tensor([[32., 32.]]), (4, 4)).max().item()
        0.25
    """
    if boxes.shape[-1] == 5:
        return _rotated_mask(boxes, real, frames, size, True)
    cells = box_cells(boxes, frames, size)
    in_rows, in_columns = _spans(cells, real, size)
    value = 1 / ((cells[..., 2] - cells[..., 0] + 1) * (cells[..., 3] - cells[..., 1] + 1)).clamp(min=1)
    result = boxes.new_zeros(boxes.shape[0], *size)
    for start in range(0, boxes.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        inside = in_rows[:, part, :, None] & in_columns[:, part, None, :]
        result = torch.maximum(result, (inside * value[:, part, None, None]).amax(dim=1))
    return result[:, None]


def background_mask(foreground: Tensor) -> Tensor:
    """1 where ``foreground`` (any foreground mask) is 0.

    Example:
        >>> background_mask(torch.tensor([0., 0.25]))
        tensor([1., 0.])
    """
    return (foreground == 0).to(foreground.dtype)


@MODELS.register_module()
class GTBoxRegion(RegionMask):
    """Cells of the ground-truth boxes, or those outside them.

    Args:
        mode: 'foreground' (1 inside any box; default), 'background' (1 outside all boxes, padding included; all of an
            image without boxes) or 'scale' (1 / number of cells of the box, the smallest one counts: FGD's mask).
        frame: 'input' (default: boxes refer to the padded input) or 'image' (to the image before padding, as in FGD's
            published code, which stretches boxes in padded batches).
        classes: class indices of the boxes that count; None for all.

    Rotated boxes (MMRotate) cover the cells of :func:`rotated_cells`, not those of the upright box around them.

    Returns:
        L tensors (N, 1, H, W).

    Raises:
        ValueError: an option is not among its choices, or the data has no boxes (or labels, with ``classes``).

    Example:
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8., 8., 16., 16.]])])
        >>> GTBoxRegion()((torch.zeros(1, 8, 4, 4), ), batch)[0].sum().item()
        4.0
    """

    needs_boxes = True

    def __init__(self, mode: str = 'foreground', frame: str = 'input', classes: Optional[Sequence[int]] = None):
        super().__init__()
        self.mode = one_of('GTBoxRegion', 'mode', mode, MODES)
        self.frame = one_of('GTBoxRegion', 'frame', frame, FRAMES)
        self.classes = class_indices('GTBoxRegion', 'classes', classes)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        boxes, real, frames = batch_boxes(batch, self.frame, features[0], self.classes, rotated=True)
        make = scale_mask if self.mode == 'scale' else foreground_mask
        masks = tuple(make(boxes, real, frames, (tensor.shape[2], tensor.shape[3])) for tensor in features)
        return tuple(background_mask(mask) for mask in masks) if self.mode == 'background' else masks
