"""Zero- and first-order distillation of segmentation logits."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_classes
from kd_mm.ops.blocks import BLOCK, sum_in_blocks
from kd_mm.ops.checks import boolean, from_zero, positive
from kd_mm.ops.divergences import standardise_logits
from kd_mm.ops.functional import apply_weights, nonzero, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

#: one of each two opposite directions to the 8 neighbours: down, right.
DIRECTIONS = ((0, 1), (1, -1), (1, 0), (1, 1))


def _pair(maps: Tensor, down: int, right: int) -> Tuple[Tensor, Tensor]:
    """The parts of the maps whose cells are each other's neighbours, as views."""
    height, width = maps.shape[2] - down, maps.shape[3]
    return (maps[:, :, :height, max(-right, 0):width - max(right, 0)],
            maps[:, :, down:, max(right, 0):width - max(-right, 0)])


class _NeighbourDistances(torch.autograd.Function):
    """Keeps the logits alone and goes through them a few classes at a time; autograd would keep four differences."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, directions: Any) -> Any:
        found = []
        for direction in directions:
            squares: Any = 0
            for part in _classes(logits):
                first, second = _pair(part, *direction)
                squares = squares + (first - second).square_().sum(dim=1, keepdim=True)
            found.append(squares.sqrt())
        ctx.save_for_backward(logits, *found)
        ctx.directions = directions
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        logits, *found = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for direction, distance, grad in zip(ctx.directions, found, upstream):
            # Equal logits have gradient 0.
            factor = grad / nonzero(distance)
            for part, target in zip(_classes(logits), _classes(result)):
                first, second = _pair(part, *direction)
                towards = (first - second).mul_(factor)
                plus, minus = _pair(target, *direction)
                plus += towards
                minus -= towards
        return result, None


def _classes(maps: Tensor) -> Tuple[Tensor, ...]:
    """Views of so many classes as make a block."""
    return maps.split(max(BLOCK // max(maps[:, :1].numel(), 1), 1), dim=1)


def neighbour_distances(logits: Tensor, directions: Sequence[Tuple[int, int]]) -> Tuple[Tensor, ...]:
    """Euclidean distances between the logits of each cell and of its neighbours.

    Args:
        logits: (N, K, H, W).
        directions: where the neighbours are: rows down, columns to the right (negative: to the left).

    Returns:
        ``(N, 1, H - down, W - |right|)`` for each direction; differentiable once.

    Example:
        >>> neighbour_distances(torch.tensor([0., 2., 5.]).view(1, 1, 1, 3), [(0, 1)])[0].flatten()
        tensor([2., 3.])
    """
    return _NeighbourDistances.apply(logits, tuple(directions))


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
    directions = [(down, right) for down, right in DIRECTIONS if down < height and abs(right) < width]
    for (down, right), distance in zip(directions, neighbour_distances(logits, directions)):
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
        first: weight of the second, not negative. Default 0.1, ours: on the small benchmark (configs/seg/README.md)
            1 loses against the plain student, and 0 gains most.
        tau: temperature of the probabilities, above 0. Default 1.
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels. Default True.
        standardise: mean and deviation of a cell's logits in the first term are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    A region weights the pixels, and pixels outside are nobody's neighbours.

    Returns:
        Reduction: per level; mean over cells
        Parts: zero, first
        Each of the two terms; summed over levels.

    Raises:
        ValueError: an option has a bad value, one class only without the second term, or RoI rows.

    Example:
        >>> from kd_mm.registry import build
        >>> z = torch.randn(2, 5, 8, 8)
        >>> build(dict(type='ZeroFirstOrderLoss'))(z, z).item() < 1e-6
        True
    """

    takes = (4, )
    logits = True

    def __init__(self, zero: float = 1.0, first: float = 0.1, tau: float = 1.0, mask_ignored: bool = True,
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'zero': from_zero('ZeroFirstOrderLoss', 'zero', zero),
                        'first': from_zero('ZeroFirstOrderLoss', 'first', first)}
        self.competes = self.factors['zero'] > 0
        self.tau = positive('ZeroFirstOrderLoss', 'tau', tau)
        self.mask_ignored = boolean('ZeroFirstOrderLoss', 'mask_ignored', mask_ignored)
        self.standardise = boolean('ZeroFirstOrderLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if not self.factors['first']:
            needs_classes('ZeroFirstOrderLoss', student, self.standardise, 'Use first above 0 or SigmoidKDLoss')

    def terms(self, student: Tensor, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Dict[str, Tensor]:
        """The two terms without their weights: zero and first."""
        if student.dim() != 4:
            raise ValueError(f'ZeroFirstOrderLoss needs maps (N, K, H, W), not {tuple(student.shape)}')
        if self.mask_ignored:
            mask = labelled(student, batch, mask)

        def zero_sum(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor]:
            if self.standardise:
                one, other = standardise_logits(one), standardise_logits(other)
            gap = ((one / self.tau).softmax(dim=1) - (other / self.tau).softmax(dim=1)).square()
            return (apply_weights(gap, weights).sum(), )

        zero, = sum_in_blocks(zero_sum, 'cells', student, teacher, mask)
        cells = zero.new_tensor(float(student[:, :1].numel())) if mask is None else mask.to(zero.dtype).sum()
        slope = (consistency_map(student, mask) - consistency_map(teacher, mask)).square()
        return {'zero': zero / nonzero(cells), 'first': weighted_mean(slope, mask)}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(student, teacher, batch, mask)
