"""Zero- and first-order distillation of segmentation logits."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.functional import nonzero, positive, weighted_mean
from kd_mm.losses.base import KDLoss, labelled
from kd_mm.registry import MODELS
from kd_mm.types import KDBatch

#: one of each two opposite directions to the 8 neighbours: down, right.
DIRECTIONS = ((0, 1), (1, -1), (1, 0), (1, 1))


def _pair(maps: Tensor, down: int, right: int) -> Tuple[Tensor, Tensor]:
    """The parts of the maps whose cells are each other's neighbours, as views."""
    height, width = maps.shape[2] - down, maps.shape[3]
    return (maps[:, :, :height, max(-right, 0):width - max(right, 0)],
            maps[:, :, down:, max(right, 0):width - max(-right, 0)])


class _NeighbourDistance(torch.autograd.Function):
    """Keeps the logits alone, where autograd would keep a difference of their size for each direction."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, down: int, right: int) -> Tensor:
        first, second = _pair(logits, down, right)
        distance = (first - second).square().sum(dim=1, keepdim=True).sqrt()
        ctx.save_for_backward(logits, distance)
        ctx.direction = (down, right)
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, distance = ctx.saved_tensors
        first, second = _pair(logits, *ctx.direction)
        # Equal logits have gradient 0.
        towards = (first - second) * (grads[0] / nonzero(distance))
        result = torch.zeros_like(logits)
        plus, minus = _pair(result, *ctx.direction)
        plus += towards
        minus -= towards
        return result, None, None


def neighbour_distance(logits: Tensor, down: int, right: int) -> Tensor:
    """Euclidean distance between the logits of each cell and of its neighbour, (N, 1, H - down, W - |right|).

    Differentiable once.

    Example:
        >>> neighbour_distance(torch.tensor([0., 2., 5.]).view(1, 1, 1, 3), 0, 1).flatten()
        tensor([2., 3.])
    """
    return _NeighbourDistance.apply(logits, down, right)


def consistency_map(logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Mean distance of each cell's logits to those of its (up to 8) neighbours.

    Args:
        logits: (N, K, H, W).
        mask: (N, 1, H, W) or None; cells of weight 0 are nobody's neighbours.

    Returns:
        (N, 1, H, W), 0 for a cell without neighbours.

    Example:
        >>> consistency_map(torch.tensor([0., 2., 5.]).view(1, 1, 1, 3)).flatten()
        tensor([2.0000, 2.5000, 3.0000])
    """
    inside = (torch.ones_like(logits[:, :1]) if mask is None else (mask > 0).to(logits.dtype))
    total, count = torch.zeros_like(inside), torch.zeros_like(inside)
    height, width = logits.shape[2:]
    for down, right in DIRECTIONS:
        if down >= height or abs(right) >= width:
            continue
        distance = neighbour_distance(logits, down, right)
        left, after = max(-right, 0), max(right, 0)
        first, second = (left, after, 0, down), (after, left, down, 0)  # padding that puts them into place
        for place, other in ((first, second), (second, first)):
            near = inside[:, :, other[2]:height - other[3], other[0]:width - other[1]]  # of the other one
            total = total + F.pad(distance * near, place)
            count = count + F.pad(near, place)
    return total / nonzero(count)


@MODELS.register_module()
class ZeroFirstOrderLoss(KDLoss):
    """Zero- and first-order distillation (Xie et al., Improving Fast Segmentation With Teacher-student Learning, BMVC
    2018).

    ``zero * mean over pixels of |p_s - p_t|^2 + first * mean over pixels of (c_s - c_t)^2``: p are the class
    probabilities (summed over the classes), ``c`` is how much the logits of a pixel differ from those of its 8
    neighbours, see :func:`consistency_map`.  No labels are needed.

    A re-implementation from the description; no code was seen, and the weights are not known to us.  The description
    sums over the neighbours; here it is their mean, so that pixels at the border and beside ignored ones count alike.

    Args:
        zero: weight of the first term, not negative. Default 1; not tuned.
        first: weight of the second, not negative. Default 1; not tuned.
        tau: temperature of the probabilities, above 0. Default 1.
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels. Default True.
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    A region weighs the pixels, and pixels outside are nobody's neighbours.

    Returns:
        A scalar per level, per pixel; summed over levels.

    Raises:
        ValueError: an option has a bad value, or RoI rows.

    Example:
        >>> from kd_mm.registry import build
        >>> z = torch.randn(2, 5, 8, 8)
        >>> build(dict(type='ZeroFirstOrderLoss'))(z, z).item()
        0.0
    """

    logits = True

    def __init__(self, zero: float = 1.0, first: float = 1.0, tau: float = 1.0, mask_ignored: bool = True,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        for name, value in (('zero', zero), ('first', first)):
            if not value >= 0:
                raise ValueError(f'ZeroFirstOrderLoss: {name}={value!r} must not be negative')
        self.zero, self.first = zero, first
        self.tau = positive('ZeroFirstOrderLoss', 'tau', tau)
        self.mask_ignored = mask_ignored

    def terms(self, student: Tensor, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Dict[str, Tensor]:
        """The two terms without their weights: zero and first."""
        if student.dim() != 4:
            raise ValueError(f'ZeroFirstOrderLoss needs maps (N, K, H, W), not {tuple(student.shape)}')
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        gap = ((student / self.tau).softmax(dim=1) - (teacher / self.tau).softmax(dim=1)).square()
        slope = (consistency_map(student, mask) - consistency_map(teacher, mask)).square()
        return {'zero': weighted_mean(gap, mask) * student.shape[1],
                'first': weighted_mean(slope, mask)}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        terms = self.terms(student, teacher, batch, mask)
        return self.zero * terms['zero'] + self.first * terms['first']
