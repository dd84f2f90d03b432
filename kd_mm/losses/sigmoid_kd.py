"""Knowledge distillation of independent sigmoid class scores, as dense detection heads have them."""

from typing import Any, Optional

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled
from kd_mm.ops.checks import boolean, one_of, positive
from kd_mm.ops.divergences import quality_focal, sigmoid_divergence_sum
from kd_mm.ops.functional import apply_weights, nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

REDUCTIONS = ('cell_mean', 'teacher_score', 'batch_mean', 'sum')


@MODELS.register_module()
class SigmoidKDLoss(KDLoss):
    """Distillation of sigmoid class scores of a dense head (Hinton et al., NIPS-W 2014, with one Bernoulli a class).

    ``tau^2 * (1 / cells) * sum |sigma_t - sigma_s|^beta * KL(Bernoulli_t || Bernoulli_s)``, summed over the A*K
    channels of a cell, ``sigma = sigmoid(z / tau)``.  A softmax over independent sigmoids would only compare the
    classes with one another and lose how sure the teacher is that there is an object at all.

    As published:

    ==================================  ===========================================================================
    CrossKD, BCKD, class term           ``beta=1, divergence='cross_entropy', reduction='sum'``, divided by the number
                                        of positives (by their code; ``loss_weight=1``)
    FRS, class term                     ``divergence='cross_entropy', reduction='teacher_score'``; ``loss_weight`` 0.02
                                        RetinaNet, 0.1 Faster R-CNN, 0.05 FCOS and GFL [C]
    ==================================  ===========================================================================

    Args:
        tau: temperature, above 0. Default 1 [C: the four losses above have none].
        beta: exponent of the quality-focal factor, 0 or at least 1. Default 0: plain BCE, a proper divergence.
        divergence: 'kl' (default: BCE minus its minimum, the teacher's entropy, so that equal inputs give 0) or
            'cross_entropy'. The gradients are equal for beta=0.
        reduction: 'cell_mean' (default: mean over cells, sum over channels; independent of batch and image size),
            'teacher_score' (mean over cells weighted by the teacher's highest score, so that the many empty cells do
            not dominate), 'batch_mean' (sum / N) or 'sum'.
        mask_ignored: leave out the pixels whose label is ignored, where the data has segmentation labels. Default True.
        loss_weight: see :class:`KDLoss`. Default 1 [C: CrossKD, BCKD].

    Inputs are logits (N, A*K, H, W) or (M, K).  A region weights the cells; RoI rows take none.

    Returns:
        Reduction: per level; mean over cells
        By default, a sum over channels in each cell; summed over levels.

    Raises:
        ValueError: an option is not among its choices, or a region is given for RoI rows.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='SigmoidKDLoss', reduction='teacher_score'))
        >>> z = torch.randn(2, 9, 8, 8)
        >>> abs(loss(z, z).item()) < 1e-5
        True
    """

    takes = (2, 4)
    logits = True

    def __init__(self, tau: float = 1.0, beta: float = 0.0, divergence: str = 'kl', reduction: str = 'cell_mean',
                 mask_ignored: bool = True, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.tau = positive('SigmoidKDLoss', 'tau', tau)
        self.beta, self.divergence = quality_focal('SigmoidKDLoss', beta, divergence)
        self.reduction = one_of('SigmoidKDLoss', 'reduction', reduction, REDUCTIONS)
        self.mask_ignored = boolean('SigmoidKDLoss', 'mask_ignored', mask_ignored)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        if self.reduction == 'teacher_score':
            score = teacher.amax(dim=1, keepdim=True).sigmoid()
            mask = apply_weights(score, mask)
        total = self.tau**2 * sigmoid_divergence_sum(student, teacher, mask, self.tau, self.beta, self.divergence)
        if self.reduction == 'sum':
            return total
        if self.reduction == 'batch_mean':
            return total / max(student.shape[0], 1)
        cells = torch.ones_like(student[:, :1]) if mask is None else mask.to(student.dtype)
        return total / nonzero(cells.sum())
