"""Boxes: overlaps, formats, points."""

from typing import Any, Sequence, Tuple

import torch
from torch import Tensor


def intersection(boxes: Tensor, others: Tensor) -> Tuple[Tensor, Tensor]:
    """Area of the overlap and of the union of boxes, element by element (or broadcast).

    Args:
        boxes, others: (..., 4), x1 y1 x2 y2. One that is inside out (some heads predict such) has no area.

    Example:
        >>> overlap, union = intersection(torch.tensor([0., 0., 2., 2.]), torch.tensor([1., 1., 3., 3.]))
        >>> overlap.item(), union.item()
        (1.0, 7.0)
    """
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(part[..., 2:] - part[..., :2]).clamp(min=0).prod(dim=-1) for part in (boxes, others)]
    return overlap, areas[0] + areas[1] - overlap


def giou_loss(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """``1 - GIoU`` of paired boxes (Rezatofighi et al., CVPR 2019), from 0 (equal) to 2: (...,).

    ``GIoU = overlap / union - (hull - union) / hull`` with the smallest box around both as hull.

    Args:
        boxes, others: (..., 4), x1 y1 x2 y2.
        eps: smallest area that is divided by.

    Example:
        >>> giou_loss(torch.tensor([0., 0., 2., 2.]), torch.tensor([0., 0., 2., 2.])).item()
        0.0
    """
    overlap, union = intersection(boxes, others)
    union = union.clamp(min=eps)
    low, high = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1).clamp(min=eps)
    return 1 - (overlap / union - (hull - union) / hull)


def centers(priors: Tensor) -> Tensor:
    """(P, 2) of anchors (P, 4) or points (P, 2)."""
    return priors if priors.shape[-1] == 2 else (priors[..., :2] + priors[..., 2:]) / 2


def around(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes from distances left, top, right, bottom of points.

    Example:
        >>> around(torch.tensor([[5., 5.]]), torch.tensor([[1., 2., 3., 4.]]))
        tensor([[4., 3., 8., 9.]])
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def _tensor(boxes: Any) -> Tensor:
    return boxes.tensor if hasattr(boxes, 'tensor') else boxes


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2).

    Example:
        >>> to_corners(torch.tensor([4., 4., 2., 4.]))
        tensor([3., 2., 5., 6.])
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_centre(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) to (cx, cy, w, h).

    Example:
        >>> to_centre(torch.tensor([3., 2., 5., 6.]))
        tensor([4., 4., 2., 4.])
    """
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def frames(shapes: Sequence[Tuple[int, int]], like: Tensor) -> Tensor:
    """(w, h, w, h) of every image, (N, 1, 4): what turns parts of an image into pixels.

    Example:
        >>> frames([(480, 640)], torch.zeros(1)).flatten().tolist()
        [640.0, 480.0, 640.0, 480.0]
    """
    return like.new_tensor([[(w, h, w, h)] for h, w in shapes])


def envelope(boxes: Tensor) -> Tensor:
    """The upright boxes (..., 4), x1 y1 x2 y2, around boxes in another form.

    Args:
        boxes: (..., 4) as they are; (..., 5) rotated ones, centre, width, height and the angle of the width in radians,
            clockwise in the picture; (..., 8) corners of quadrilaterals.

    Example:
        >>> envelope(torch.tensor([4., 4., 4., 2., torch.pi / 2]))
        tensor([3., 2., 5., 6.])
    """
    if boxes.shape[-1] == 8:
        corners = boxes.unflatten(-1, (4, 2))
        return torch.cat([corners.amin(dim=-2), corners.amax(dim=-2)], dim=-1)
    if boxes.shape[-1] != 5:
        return boxes[..., :4]
    cosine, sine = boxes[..., 4].cos().abs(), boxes[..., 4].sin().abs()
    width, height = boxes[..., 2], boxes[..., 3]
    size = torch.stack([width * cosine + height * sine, width * sine + height * cosine], dim=-1)
    return to_corners(torch.cat([boxes[..., :2], size], dim=-1))
