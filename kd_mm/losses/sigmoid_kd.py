"""Knowledge distillation of independent sigmoid class scores, as dense detection heads have them."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.blocks import sum_in_blocks
from kd_mm.checks import boolean, from_zero, one_of, positive
from kd_mm.functional import apply_weights, nonzero
from kd_mm.losses.base import KDLoss, labelled
from kd_mm.registry import MODELS
from kd_mm.types import KDBatch

REDUCTIONS = ('cell_mean', 'teacher_score', 'batch_mean', 'sum')
DIVERGENCES = ('kl', 'cross_entropy')


class _BernoulliKL(torch.autograd.Function):
    """Keeps the logits alone, where autograd would keep six more tensors of their size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        # By differences of logarithms and not of two entropies, whose rounding would leave negative numbers.
        inside = F.logsigmoid(teacher).sub_(F.logsigmoid(student))
        outside = F.logsigmoid(-teacher).sub_(F.logsigmoid(-student))
        return outside.lerp_(inside, teacher.sigmoid())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        student, teacher = ctx.saved_tensors
        target = teacher.sigmoid()
        to_teacher = target * (1 - target) * (teacher - student) * upstream if ctx.needs_input_grad[1] else None
        return (student.sigmoid() - target) * upstream, to_teacher


def sigmoid_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0, beta: float = 0.0,
                       divergence: str = 'kl') -> Tensor:
    """Terms of the divergence between Bernoulli distributions, one an element.

    With ``q = sigmoid(z_t / tau)`` and ``p = sigmoid(z_s / tau)``:
    ``|q - p|^beta * (BCE(z_s / tau, q) - [H(q) if divergence == 'kl'])``, where ``H(q) = min_z BCE(z, q)``.

    Args:
        student: logits of any shape.
        teacher: logits of the same shape.
        tau: temperature, above 0.
        beta: exponent of the quality-focal factor, 0 or at least 1; its gradient is kept, as published.
        divergence: 'kl' or 'cross_entropy'.

    Returns:
        Terms of the shape of ``student``, not multiplied by tau squared.

    Example:
        >>> round(sigmoid_divergence(torch.zeros(1), torch.zeros(1), divergence='cross_entropy').item(), 4)
        0.6931
    """
    if tau != 1:
        student, teacher = student / tau, teacher / tau
    if divergence == 'kl':
        terms = _BernoulliKL.apply(student, teacher.to(student))
    else:
        terms = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction='none')
    return terms if beta == 0 else terms * (teacher.sigmoid() - student.sigmoid()).abs().pow(beta)


def sigmoid_divergence_sum(student: Tensor, teacher: Tensor, weights: Optional[Tensor], tau: float = 1.0,
                           beta: float = 0.0, divergence: str = 'kl') -> Tensor:
    """Sum of :func:`sigmoid_divergence` over all elements, in blocks: the gradient is the only tensor of their number.

    Args:
        student, teacher, tau, beta, divergence: see :func:`sigmoid_divergence`; logits (N, C, H, W) or (M, K). No
            gradient reaches the teacher.
        weights: (N, 1, H, W) or (M, 1), or None.

    Example:
        >>> sigmoid_divergence_sum(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 1), divergence='cross_entropy')
        tensor(4.1589)
    """
    def total_of(one: Tensor, other: Tensor, weight: Optional[Tensor]) -> Tuple[Tensor]:
        return (apply_weights(sigmoid_divergence(one, other, tau, beta, divergence), weight).sum(), )

    total, = sum_in_blocks(total_of, 'cells', student, teacher, weights)
    return total


def quality_focal(owner: str, beta: float, divergence: str) -> Tuple[float, str]:
    """``beta`` and ``divergence`` of :func:`sigmoid_divergence`, checked.

    Raises:
        ValueError: one is not possible.

    Example:
        >>> quality_focal('BCKDLoss', 1, 'kl')
        (1.0, 'kl')
    """
    # Between 0 and 1 the gradient of |d|^beta is infinite at d = 0, where training is meant to arrive.
    beta = from_zero(owner, 'beta', beta)
    if 0 < beta < 1:
        raise ValueError(f'{owner}: beta={beta!r} must be 0 or at least 1')
    return beta, one_of(owner, 'divergence', divergence, DIVERGENCES)


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
