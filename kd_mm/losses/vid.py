"""Variational information distillation."""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import positive
from kd_mm.ops.functional import parameter_options, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def gaussian_surprise(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """``0.5 * ((mean - target)^2 / variance + log variance)``: the negative log density, without ``0.5 log(2 pi)``.

    Args:
        mean: (N, C, H, W).
        variance: (C,), positive.
        target: (N, C, H, W).

    Example:
        >>> gaussian_surprise(torch.ones(1, 1, 1, 1), torch.ones(1), torch.zeros(1, 1, 1, 1)).item()
        0.5
    """
    variance = variance.view(1, -1, 1, 1)
    return 0.5 * ((mean - target).square() / variance + variance.log())


@MODELS.register_module()
class VIDLoss(KDLoss):
    """Variational information distillation (Ahn et al., Variational Information Distillation for Knowledge Transfer,
    CVPR 2019).

    The student predicts the teacher's features as a Gaussian, whose negative log likelihood is the loss::

        mean over elements of 0.5 * ((mu(F_s) - F_t)^2 / sigma_c^2 + log sigma_c^2)

    ``mu`` is three 1x1 convolutions without bias with ReLU between them, of the teacher's width; ``sigma_c^2 =
    log(1 + exp(a_c)) + eps`` has one trained number a channel.  Channels that the student cannot predict get a large
    variance and stop to pull.  The loss may be negative and is not 0 for equal inputs.

    As published, but for the variance: mdistiller keeps the numbers ``a`` out of the parameters that it hands to the
    optimizer, so that they stay at their start; here they are trained, as in the paper.

    Where the sizes differ, the larger map is averaged down to the smaller one, of either side and before ``mu`` [C:
    mdistiller, which pools to squares by the height alone; here height and width are matched each].

    Args:
        init_variance: variance of all channels at the start, above ``eps``. Default 5 [C].
        eps: smallest variance, above 0. Default 1e-5 [C].
        loss_weight: see :class:`KDLoss`. Default 1 [C: mdistiller, classification].

    A region weights the cells.

    Returns:
        Reduction: per level; mean over elements
        Summed over levels.

    Raises:
        ValueError: ``eps`` is not positive or ``init_variance`` not above it.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='VIDLoss'))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)).shape
        torch.Size([])
    """

    takes = (4, )
    same_channels = False
    same_size = False
    pools_to = 'smaller'

    def __init__(self, init_variance: float = 5.0, eps: float = 1e-5, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.eps = positive('VIDLoss', 'eps', eps)
        self.init_variance = positive('VIDLoss', 'init_variance', init_variance)
        if self.init_variance <= self.eps:
            raise ValueError(f'VIDLoss: init_variance={init_variance!r} must be above eps={eps!r}')
        self.regressors = nn.ModuleList()
        self.log_scales = nn.ParameterList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.regressors) > 0:
            return
        for s, t in zip(student, teacher):
            width, options = t.shape[1], parameter_options(s)
            self.regressors.append(nn.Sequential(
                nn.Conv2d(s.shape[1], width, 1, bias=False, **options), nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False, **options), nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False, **options)))
            # log(exp(v) - 1), the inverse of softplus, in the form that does not overflow.
            start = self.init_variance - self.eps
            start += math.log(-math.expm1(-start))
            self.log_scales.append(nn.Parameter(torch.full((width, ), start, **options)))

    def variance(self, level: int) -> Tensor:
        """(C,), the predicted variance of each channel of the teacher."""
        return F.softplus(self.log_scales[level]) + self.eps

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        mean = self.regressors[level](student)
        return weighted_mean(gaussian_surprise(mean, self.variance(level), teacher), mask)
