"""Attention transfer."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import number, one_of
from kd_mm.ops.functional import attention_vector, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

REDUCTIONS = ('mean', 'cell_sum', 'norm')


def attention_gap(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None, p: float = 2.0,
                  reduction: str = 'mean') -> Tensor:
    """Distance of the attention vectors of two maps, see :func:`kd_mm.ops.functional.attention_vector`.

    Args:
        student: (N, Cs, H, W).
        teacher: (N, Ct, H, W).
        mask: (N, 1, H, W) or None.
        p: exponent, at least 1.
        reduction: 'mean' (squared difference, over images and cells), 'cell_sum' (its sum over cells, mean over
            images) or 'norm' (length of the difference, mean over images).

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 4, 4)
        >>> attention_gap(x, 5 * x.flip(1)).item() < 1e-12
        True
    """
    gap = (attention_vector(student, p, mask) - attention_vector(teacher, p, mask)).square()
    images = gap.new_tensor(float(max(gap.shape[0], 1)))
    cells = gap.new_tensor(float(max(gap.numel(), 1)))
    if mask is not None:
        inside = mask.flatten(1) > 0
        images = inside.any(dim=1).sum().clamp(min=1).to(gap.dtype)
        cells = inside.sum().clamp(min=1).to(gap.dtype)
    if reduction == 'norm':
        return safe_sqrt(gap.sum(dim=1)).sum() / images
    return gap.sum() / (cells if reduction == 'mean' else images)


@MODELS.register_module()
class ATLoss(KDLoss):
    """Attention transfer (Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017).

    ``mean((q_s - q_t)^2)`` over images and cells with ``q = a / |a|``, ``a_i = mean_c |F_ci|^p``, the length over the
    cells of an image.  Channels need not agree, and no adapter is used.

    As published: mmrazor, CIRKD, mdistiller and torchdistill have this formula.  The vectors have length 1, so this
    mean shrinks with the number of cells: a weight that is right for 32x32 cells is four times too small for 64x64.
    ``reduction='cell_sum'`` does not depend on it.  The paper's own Eq. 2 is ``reduction='norm'``.

    Args:
        p: exponent, at least 1. Default 2 [C].
        reduction: 'mean' (default [C]), 'cell_sum' or 'norm', see :func:`attention_gap`.
        loss_weight: see :class:`KDLoss`. Default 10000 [C: CIRKD, segmentation]; 1000 in classification [C].

    Where the sizes differ, the larger map is averaged down to the smaller one [C: mdistiller, which looks at the
    height alone].  With a region the attention is that of its cells.

    Returns:
        Reduction: per level; mean over cells
        By default; summed over levels.

    Raises:
        ValueError: ``p`` below 1, or ``reduction`` is not among its choices.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='ATLoss'))(torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)).shape
        torch.Size([])
    """

    takes = (4, )
    same_channels = False
    same_size = False
    pools_to = 'smaller'

    def __init__(self, p: float = 2.0, reduction: str = 'mean', loss_weight: Any = 10000.0):
        super().__init__(loss_weight)
        self.p = number('ATLoss', 'p', p, 1)
        self.reduction = one_of('ATLoss', 'reduction', reduction, REDUCTIONS)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        return attention_gap(student, teacher, mask, self.p, self.reduction)
