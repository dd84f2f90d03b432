"""Instances: the features of boxes, pooled to one size."""

from typing import Tuple

import torch
from torch import Tensor

from kd_mm.ops.functional import parameter_options
from kd_mm.regions.level_box import box_level
from kd_mm.types.batch import KDBatch
from kd_mm.types.targets import gt_boxes


def instance_rows(batch: KDBatch, like: Tensor) -> Tensor:
    """Boxes of all images in one list: (M, 5), the index of the image and the box in input pixels.

    Those of ``batch.given.instances`` where it has any, else the ground truth.

    Example:
        >>> batch = KDBatch(boxes=[torch.zeros(0, 4), torch.tensor([[0., 0., 8., 4.]])])
        >>> instance_rows(batch, torch.zeros(2, 4, 4, 4)).tolist()
        [[1.0, 0.0, 0.0, 8.0, 4.0]]
    """
    options = parameter_options(like)
    found = gt_boxes(batch) if batch.given.instances is None else list(batch.given.instances)
    if len(found) != like.shape[0]:
        raise ValueError(f'boxes of {len(found)} images for features of {like.shape[0]} images')
    return torch.cat([torch.cat([torch.full((len(boxes), 1), float(index), **options),
                                 boxes.detach().to(**options).reshape(-1, 4)], dim=1)
                      for index, boxes in enumerate(found)])


def rows_of_level(rows: Tensor, level: int, levels: int, scale: float) -> Tensor:
    """The rows of :func:`instance_rows` whose box is on ``level`` by its size, see :func:`box_level`.

    Example:
        >>> rows = torch.tensor([[0., 0., 0., 32., 32.], [0., 0., 0., 120., 120.]])
        >>> [len(rows_of_level(rows, level, 2, 56.0)) for level in (0, 1)]
        [1, 1]
    """
    return rows[box_level(rows[:, 1:], levels, scale, border=0.0) == level]


def pool_instances(features: Tensor, rows: Tensor, frame: Tuple[int, int], size: int, samples: int = 2) -> Tensor:
    """RoIAlign of boxes: (M, C, size, size).

    Args:
        features: (N, C, H, W), which cover the frame.
        rows: (M, 5), see :func:`instance_rows`. A box that is inside out counts as its upper left corner.
        frame: (Hin, Win) in pixels.
        size: edge of the pooled grid.
        samples: samples along each edge of a part.

    Example:
        >>> rows = torch.tensor([[0., 8., 8., 24., 24.]])
        >>> pool_instances(torch.ones(1, 3, 4, 4), rows, (32, 32), 2).shape
        torch.Size([1, 3, 2, 2])
    """
    from mmcv.ops import roi_align
    down, across = features.shape[2] / frame[0], features.shape[3] / frame[1]
    cells = rows * rows.new_tensor([1.0, across, down, across, down])
    # RoIAlign stops at a box that is inside out; such a box is a point, as one without an area.
    cells = torch.cat([cells[:, :3], torch.maximum(cells[:, 1:3], cells[:, 3:])], dim=1)
    if not len(cells):
        return features[:0].sum(dim=(2, 3))[:, :, None, None].expand(0, features.shape[1], size, size)
    # mmcv's operator takes the channels for the outer ones, wherever they lie in memory.
    return roi_align(features.contiguous(), cells.to(features.dtype), (size, size), 1.0, samples, 'avg', True)
