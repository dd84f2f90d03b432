"""Flow of the solution procedure."""

from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of
from kd_mm.ops.functional import nonzero, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

DISTANCES = ('squared', 'column_norm')


def pool_to(features: Tensor, mask: Optional[Tensor], size: Tuple[int, int]) -> Tuple[Tensor, Optional[Tensor]]:
    """Largest value of the cells below each cell of a coarser map, of those in the region if there is one.

    Returns:
        The features, 0 where no cell of the region is; and the largest weight, or None without region.

    Example:
        >>> pool_to(torch.tensor([1., 9., 3., 2.]).view(1, 1, 1, 4), None, (1, 2))[0].flatten()
        tensor([9., 3.])
    """
    if mask is None:
        return F.adaptive_max_pool2d(features, size), None
    mask = mask.to(features.dtype)
    pooled = F.adaptive_max_pool2d(features.masked_fill(mask == 0, torch.finfo(features.dtype).min), size)
    weights = F.adaptive_max_pool2d(mask, size)
    return pooled.masked_fill(weights == 0, 0.0), weights


def flow_matrix(first: Tensor, second: Tensor, first_mask: Optional[Tensor] = None,
                second_mask: Optional[Tensor] = None) -> Tensor:
    """Mean over the cells of the products of two layers' channels: (N, C1, C2).

    The larger map is max-pooled to the smaller height and width.  With masks it is the mean weighted by the product of
    both; 0 for an image without weights.

    Example:
        >>> flow_matrix(torch.full((1, 2, 4, 4), 3.0), torch.ones(1, 1, 2, 2)).flatten()
        tensor([3., 3.])
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, first_mask = pool_to(first, first_mask, size)
    second, second_mask = pool_to(second, second_mask, size)
    cells: Any = max(size[0] * size[1], 1)
    if first_mask is not None and second_mask is not None:
        weights = first_mask * second_mask
        first, cells = first * weights, nonzero(weights.sum(dim=(2, 3)))[:, :, None]
    return torch.bmm(first.flatten(2), second.flatten(2).transpose(1, 2)) / cells


@MODELS.register_module()
class FSPLoss(KDLoss):
    """Flow of the solution procedure (Yim et al., A Gift from Knowledge Distillation: Fast Optimization, Network
    Minimization and Transfer Learning, CVPR 2017).

    For each two levels that follow each other, ``G = F1 F2^T / (H W)``, the products of the channels of one layer with
    those of the next one, and ``sum((G_s - G_t)^2) / N``; summed over the pairs.  It needs two levels at least, such as
    the stages of a backbone, with the teacher's channels (an adapter sees to it).

    As published: torchdistill is ``distance='column_norm'``, the sum over the columns of the L2 norm, divided by N; the
    paper squares.

    Memory: N * C1 * C2 a pair, whatever the number of cells.

    Args:
        distance: 'squared' (the sum of squares) or 'column_norm'. Default 'squared' [P].
        loss_weight: see :class:`KDLoss`; one weight for all pairs. Default 1 [C: torchdistill].

    A region weights the cells; the pooling looks at its cells alone.

    Returns:
        Reduction: all levels; sum over pairs; divided by images
        Pairs of channels; summed over the pairs of levels.

    Raises:
        ValueError: ``distance`` is not among its choices, or there are fewer than two levels or they are no maps.

    Example:
        >>> from kd_mm.registry import build
        >>> maps = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
        >>> build(dict(type='FSPLoss'))(maps, maps).item() < 1e-6
        True
    """

    takes = (4, )
    joint = True

    def __init__(self, distance: str = 'squared', loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.distance = one_of('FSPLoss', 'distance', distance, DISTANCES)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if len(student) < 2 or any(tensor.dim() != 4 for tensor in student):
            raise ValueError(f'FSPLoss: {len(student)} level(s) {[tuple(tensor.shape) for tensor in student]}; it '
                             'relates two layers or more, maps (N, C, H, W). Give `at` a list of paths or a module '
                             "with several outputs ('backbone')")

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Tensor:
        total = student[0].new_zeros(())
        for first in range(len(student) - 1):
            pair = slice(first, first + 2)
            gap = flow_matrix(*student[pair], *masks[pair]) - flow_matrix(*teacher[pair], *masks[pair])
            squares = gap.square()
            total = total + (squares if self.distance == 'squared' else safe_sqrt(squares.sum(dim=1))).sum()
        return total / max(student[0].shape[0], 1)
