"""Softmax knowledge distillation of class logits."""

from typing import Any, Optional, Tuple

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_classes
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, one_of, positive
from kd_mm.ops.divergences import softmax_divergence
from kd_mm.ops.functional import apply_weights, nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

REDUCTIONS = ('pixel_mean', 'element_mean', 'batch_mean', 'spatial_mean', 'sum')
DIVERGENCES = ('kl', 'cross_entropy')


def mean_divergence(student: Tensor, teacher: Tensor, mask: Optional[Tensor], tau: float = 1.0, divergence: str = 'kl',
                    reduction: str = 'pixel_mean', standardise: bool = False) -> Tensor:
    """Sum of :func:`softmax_divergence` over classes and pixels, weighted by ``mask`` (N, 1, H, W), divided by:

    ===============  ==============================================================================================
    pixel_mean       the sum of the pixel weights (N*H*W without mask; M for rows)
    element_mean     the sum of the pixel weights times the K classes
    batch_mean       the N images (M rows)
    spatial_mean     H*W, so that it grows with the batch size (1 for rows)
    sum              1
    ===============  ==============================================================================================

    In blocks of pixels: the gradient is the only tensor of the size of the logits.

    Example:
        >>> import torch
        >>> mean_divergence(torch.zeros(2, 2, 4, 5), torch.zeros(2, 2, 4, 5), None, divergence='cross_entropy')
        tensor(0.6931)
    """
    def total_of(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor]:
        return (apply_weights(softmax_divergence(one, other, tau, divergence, standardise), weights).sum(), )

    total, = sum_in_blocks(total_of, 'cells', student, teacher, mask)
    count, classes = student.shape[:2]
    if reduction in ('pixel_mean', 'element_mean'):
        rows = total.new_tensor(float(student[:, 0].numel())) if mask is None else mask.to(total.dtype).sum()
        return total / (nonzero(rows) * (classes if reduction == 'element_mean' else 1))
    if reduction == 'batch_mean':
        return total / max(count, 1)
    return total / (student[0, 0].numel() if reduction == 'spatial_mean' and count else 1)


@MODELS.register_module()
class SoftmaxKDLoss(KDLoss):
    """Distillation of softmax class scores, per pixel or per RoI (Hinton et al., Distilling the Knowledge in a Neural
    Network, NIPS-W 2014; pixel-wise part of Liu et al., Structured Knowledge Distillation, CVPR 2019).

    ``tau^2 * mean over pixels of sum_k p_t log(p_t / p_s)``, ``p = softmax(z / tau)`` over the K classes.  For heads
    whose classes are independent sigmoids use :class:`SigmoidKDLoss`.

    The published codes differ by factors of K, N and H*W under one name, so weights do not carry over.  As options:

    ==================================  ===========================================================================
    CIRKD, DIST; mdistiller             the defaults, with ``mask_ignored=False``
    TorchDistiller, norm 'spatial'      the defaults, with ``mask_ignored=False``
    mmrazor 'batchmean' / 'sum' /       ``reduction='batch_mean'`` / ``'sum'`` / ``'element_mean'``,
    'mean'                              ``mask_ignored=False``
    TorchDistiller, IFVD                ``reduction='element_mean', tau_squared=False, mask_ignored=False``
    SKD                                 ``reduction='spatial_mean', divergence='cross_entropy', mask_ignored=False``
    ==================================  ===========================================================================

    Args:
        tau: temperature, above 0. Default 1 [C: CIRKD's scripts].
        reduction: see :func:`mean_divergence`. Default 'pixel_mean': the size of the loss depends neither on the crop
            nor on the batch nor on the number of classes.
        divergence: 'kl' (default, 0 for equal inputs) or 'cross_entropy' (same gradient, plus the teacher's entropy).
        tau_squared: multiply by tau squared, which keeps the size of the gradient when tau changes. Default True.
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels (no reference does; the
            student is not supervised there and the teacher was not either). Default True.
        standardise: mean and deviation of a cell's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False; True with tau=2 and loss_weight=9 [C:
            logit-standardization-KD, classification].
        loss_weight: see :class:`KDLoss`. Default 1 [C: CIRKD's lambda_kd].

    Inputs are logits (N, K, H, W) or (M, K).  A region weights the pixels; RoI rows take none.

    Returns:
        Reduction: per level; mean over cells
        By default, over the valid pixels; summed over levels.

    Raises:
        ValueError: an option is not among its choices, tau is not positive, there is one class only (two with
            ``standardise``), or a region is given for RoI rows.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='SoftmaxKDLoss', tau=4.0))
        >>> z = torch.randn(2, 19, 8, 16)
        >>> bool(loss(z, z) < 1e-5)
        True
    """

    takes = (2, 4)
    logits = True
    competes = True

    def __init__(self, tau: float = 1.0, reduction: str = 'pixel_mean', divergence: str = 'kl',
                 tau_squared: bool = True, mask_ignored: bool = True, standardise: bool = False,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.tau = positive('SoftmaxKDLoss', 'tau', tau)
        self.reduction = one_of('SoftmaxKDLoss', 'reduction', reduction, REDUCTIONS)
        self.divergence = one_of('SoftmaxKDLoss', 'divergence', divergence, DIVERGENCES)
        self.factor = self.tau**2 if boolean('SoftmaxKDLoss', 'tau_squared', tau_squared) else 1.0
        self.mask_ignored = boolean('SoftmaxKDLoss', 'mask_ignored', mask_ignored)
        self.standardise = boolean('SoftmaxKDLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_classes('SoftmaxKDLoss', student, self.standardise, 'Use SigmoidKDLoss or CWDLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        return self.factor * mean_divergence(student, teacher, mask, self.tau, self.divergence, self.reduction,
                                             self.standardise)
