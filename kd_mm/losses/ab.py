"""Distillation of activation boundaries."""

from typing import Any, Optional

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of, positive
from kd_mm.ops.functional import apply_weights, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

REDUCTIONS = ('mean', 'batch_mean')


def boundary_gap(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Squared hinge of each neuron: the student must be beyond ``margin`` on the teacher's side of zero.

    ``(s - margin)^2`` where ``t > 0`` and ``s <= margin``; ``(s + margin)^2`` where ``t <= 0`` and ``s > -margin``; 0
    elsewhere.

    Example:
        >>> boundary_gap(torch.tensor([0., 0., 2.]), torch.tensor([5., -5., 5.]), 1.0)
        tensor([1., 1., 0.])
    """
    return torch.where(teacher > 0, (margin - student).clamp(min=0), (student + margin).clamp(min=0)).square()


@MODELS.register_module()
class ABLoss(KDLoss):
    """Activation boundaries (Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons, AAAI 2019).

    Mean over the elements of :func:`boundary_gap`: what counts of the teacher is whether a neuron is active, not how
    much.  It means something for features **before a ReLU** only (``...conv`` of mmcv's ConvModule, the last
    convolution or norm of a block), and the student usually comes through a convolution with normalisation
    (``ConvAdapter(always=True, norm=True)``, mmrazor's connector).  It is not 0 for equal inputs, unless every neuron
    is beyond the margin.

    As published: torchdistill is ``reduction='batch_mean', loss_weight=1``; mmrazor the same with 3 / 1000 hard-coded
    in front, so ``loss_weight=0.003`` times its own weight (1, 1/2, 1/4, 1/8 from the last stage to the first).

    Args:
        margin: above 0. Default 1 [C: mmrazor, torchdistill].
        reduction: 'mean' over elements or 'batch_mean' (sum / N, which grows with resolution and width). Default
            'mean'.
        loss_weight: see :class:`KDLoss`. Default 1; no published weight is for the mean.

    A region weights the cells.

    Returns:
        Reduction: per level; mean over elements
        By default; summed over levels.

    Raises:
        ValueError: ``margin`` is not positive, or ``reduction`` is not among its choices.

    Example:
        >>> from kd_mm.registry import build
        >>> build(dict(type='ABLoss'))(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
        tensor(1.)
    """

    takes = (2, 3, 4)

    def __init__(self, margin: float = 1.0, reduction: str = 'mean', loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.margin = positive('ABLoss', 'margin', margin)
        self.reduction = one_of('ABLoss', 'reduction', reduction, REDUCTIONS)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        gap = boundary_gap(student, teacher, self.margin)
        if self.reduction == 'mean':
            return weighted_mean(gap, mask)
        return apply_weights(gap, mask).sum() / max(student.shape[0], 1)
