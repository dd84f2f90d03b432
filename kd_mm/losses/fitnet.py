"""Hint loss: squared or absolute difference of features."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean, one_of, positive
from kd_mm.ops.functional import apply_weights, safe_sqrt, unit_norm, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

DISTANCES = ('l2', 'l1')
REDUCTIONS = ('mean', 'batch_mean', 'sum', 'norm')


def hint_loss(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None, distance: str = 'l2',
              reduction: str = 'mean') -> Tensor:
    """Distance between two feature maps.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        mask: weights (N, 1, H, W) or None.
        distance: 'l2' (squared differences) or 'l1'.
        reduction: 'mean' over all elements (weighted by ``mask``), 'batch_mean' (sum / N), 'sum', or 'norm' (square
            root of the sum over the whole batch).

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> hint_loss(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), reduction='sum')
        tensor(8.)
    """
    gap = student - teacher
    gap = gap.square() if distance == 'l2' else gap.abs()
    if reduction == 'mean':
        return weighted_mean(gap, mask)
    total = apply_weights(gap, mask).sum()
    if reduction == 'norm':
        return safe_sqrt(total)
    return total / (max(student.shape[0], 1) if reduction == 'batch_mean' else 1)


@MODELS.register_module()
class FitNetLoss(KDLoss):
    """Hint loss (Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015).

    ``mean((F_s - F_t)^2)`` over all elements, ``F_s`` after the adapter.  The scale of the teacher's features is the
    scale of the loss; :class:`PKDLoss` is free of that.

    As published: CIRKD is the default with ``ConvAdapter(bias=False, always=True)``; mmrazor's L2Loss is
    ``normalize=True, reduction='batch_mean'`` (its default), ``reduction='batch_mean'`` (normalize=False),
    ``reduction='mean'`` (div_element) and ``reduction='norm'`` (dist); its L1Loss is ``distance='l1'`` with
    ``reduction='mean'`` or ``'sum'``.

    Args:
        distance: 'l2' or 'l1'. Default 'l2' (the paper).
        reduction: 'mean', 'batch_mean', 'sum' or 'norm', see :func:`hint_loss`. Default 'mean'.
        normalize: divide each image's features by their L2 norm first. Default False.
        mult: factor of the normalised features. Default 1 [C: mmrazor].
        loss_weight: see :class:`KDLoss`. Default 10 [C: CIRKD, segmentation]; the detection hints of the LD repository
            use 2 [C].

    Returns:
        Reduction: per level; mean over elements
        By default; summed over levels.

    Raises:
        ValueError: an option is not among its choices.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='FitNetLoss', loss_weight=2.0))(torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))
        tensor(2.)
    """

    takes = (2, 3, 4)

    def __init__(self, distance: str = 'l2', reduction: str = 'mean', normalize: bool = False, mult: float = 1.0,
                 loss_weight: Any = 10.0):
        super().__init__(loss_weight)
        self.distance = one_of('FitNetLoss', 'distance', distance, DISTANCES)
        self.reduction = one_of('FitNetLoss', 'reduction', reduction, REDUCTIONS)
        self.normalize = boolean('FitNetLoss', 'normalize', normalize)
        self.mult = positive('FitNetLoss', 'mult', mult)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self.normalize:
            student, teacher = unit_norm(student) * self.mult, unit_norm(teacher) * self.mult
        return hint_loss(student, teacher, mask, self.distance, self.reduction)
