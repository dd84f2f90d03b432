"""Pair-wise part of structured knowledge distillation."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops.checks import boolean, from_zero, positive, whole
from kd_mm.ops.functional import nonzero, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

#: most numbers of a block of affinities, of all images of the batch together.
BLOCK = 2**21


def pooled_nodes(features: Tensor, kernel: Tuple[int, int],
                 mask: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
    """Maximum over windows that do not overlap (those at the border may be smaller), as nodes.

    Args:
        features: (N, C, H, W).
        kernel: height and width of a window, in cells.
        mask: (N, 1, H, W) or None; cells of weight 0 take no part, and a node weighs as much as its heaviest cell.

    Returns:
        (N, C, P), and the weights (N, P) or None.

    Example:
        >>> nodes, _ = pooled_nodes(torch.arange(6.).view(1, 1, 2, 3), (2, 2))
        >>> nodes
        tensor([[[4., 5.]]])
    """
    if mask is None:
        return F.max_pool2d(features, kernel, kernel, ceil_mode=True).flatten(2), None
    weights = F.max_pool2d(mask.to(features.dtype), kernel, kernel, ceil_mode=True).flatten(2)
    lowest = torch.finfo(features.dtype).min
    pooled = F.max_pool2d(features.masked_fill(mask <= 0, lowest), kernel, kernel, ceil_mode=True).flatten(2)
    return torch.where(weights > 0, pooled, torch.zeros_like(pooled)), weights[:, 0]


class _AffinityGap(torch.autograd.Function):
    """``sum_ij w_i w_j (s_i.s_j - t_i.t_j)^2`` a block of rows at a time; the gradient is found on the way."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, block: int) -> Tensor:
        count, _, nodes = student.shape
        rows = max(block // max(count * nodes, 1), 1)
        wanted = ctx.needs_input_grad[0]
        total, gradient = student.new_zeros(()), torch.zeros_like(student) if wanted else None
        for start in range(0, nodes, rows):
            part = slice(start, start + rows)
            gap = student[:, :, part].transpose(1, 2) @ student
            gap.baddbmm_(teacher[:, :, part].transpose(1, 2), teacher, alpha=-1)
            weighted = gap * weights[:, part, None] * weights[:, None, :]
            total = total + (weighted * gap).sum()
            if gradient is not None:
                gradient[:, :, part] = 4 * student @ weighted.transpose(1, 2)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient, = ctx.saved_tensors
        return (None if gradient is None else gradient * grads[0]), None, None, None


def affinity_gap(student: Tensor, teacher: Tensor, weights: Optional[Tensor] = None, block: int = BLOCK) -> Tensor:
    """Mean over pairs of nodes of ``(s_i . s_j - t_i . t_j)^2``, without all pairs in memory at once.

    Args:
        student: (N, Cs, P) vectors of the nodes.
        teacher: (N, Ct, P).
        weights: (N, P) or None; a pair's weight is the product of its nodes.
        block: most affinities held at a time, though at least one row of each image.

    Returns:
        A scalar, differentiable once by ``student``.

    Example:
        >>> x = torch.eye(2)[None]
        >>> affinity_gap(x, torch.ones(1, 1, 2)).item()
        0.5
    """
    if weights is None:
        weights = student.new_ones(student.shape[0], student.shape[2])
    weights = weights.to(student.dtype)
    pairs = weights.sum(dim=1).square().sum()
    return _AffinityGap.apply(student, teacher, weights, block) / nonzero(pairs)


@MODELS.register_module()
class SKDPairwiseLoss(KDLoss):
    """Pair-wise part of SKD (Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019).

    The map is max-pooled to a grid of nodes ``f_i``, brought to length 1 over the channels, and the cosines of all
    pairs of nodes of an image are compared: ``mean over i, j of (f_i . f_j |_s - f_i . f_j |_t)^2``.  Channels need not
    agree, and no adapter is used.

    As published, under one name, two methods with other numbers of nodes:

    ==================  ===============================================================================================
    CIRKD               windows of 2x2 cells, thousands of nodes: the defaults, with weight 10
    SKD                 windows of half the map, a grid of 2x2 or 3x3 nodes: ``scale=0.5, detach_norm=True, eps=1e-8``,
                        with weight 1 (0.5 in the script that trains). Without gradient through the length a node may
                        also grow, which the loss cannot see.
    ==================  ===============================================================================================

    Affinities are computed in blocks of rows with their gradient, so neither pass holds ``P * P`` numbers an image.

    Args:
        kernel: height and width of a window in cells. Default 2 [C: CIRKD].
        scale: windows of this part of the map, in 0..1, instead of ``kernel``. Default None.
        detach_norm: no gradient through the length. Default False.
        eps: added to the length. Default 0.
        loss_weight: see :class:`KDLoss`. Default 10 [C: CIRKD].

    A region leaves cells out of the windows, weights the nodes, and the mean is over the pairs that are left.

    Returns:
        Reduction: per level; mean over pairs
        0 to 4; summed over levels.

    Raises:
        ValueError: an option has a bad value, or the student has one channel only (but for ``detach_norm``).

    Example:
        >>> from kd_mm.registry import build
        >>> build(dict(type='SKDPairwiseLoss'))(torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)).shape
        torch.Size([])
    """

    takes = (4, )
    same_channels = False

    def __init__(self, kernel: int = 2, scale: Optional[float] = None, detach_norm: bool = False, eps: float = 0.0,
                 loss_weight: Any = 10.0):
        super().__init__(loss_weight)
        self.kernel = whole('SKDPairwiseLoss', 'kernel', kernel)
        self.scale = None if scale is None else positive('SKDPairwiseLoss', 'scale', scale, 1)
        self.detach_norm = boolean('SKDPairwiseLoss', 'detach_norm', detach_norm)
        self.eps = from_zero('SKDPairwiseLoss', 'eps', eps)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if not self.detach_norm:
            needs_channels('SKDPairwiseLoss', student, 2,
                           'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def nodes(self, features: Tensor, mask: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        """Unit vectors (N, C, P) of the nodes, and their weights."""
        kernel = (self.kernel, self.kernel)
        if self.scale is not None:
            kernel = (max(int(features.shape[2] * self.scale), 1), max(int(features.shape[3] * self.scale), 1))
        nodes, weights = pooled_nodes(features, kernel, mask)
        if self.detach_norm:
            norm = nodes.detach().square().sum(dim=1, keepdim=True).sqrt()
            return nodes / (nonzero(norm) + self.eps), weights
        return unit_vectors(nodes, 1, self.eps), weights

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        nodes, weights = self.nodes(student, mask)
        return affinity_gap(nodes, self.nodes(teacher, mask)[0], weights)
