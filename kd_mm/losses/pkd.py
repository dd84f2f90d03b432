"""Distillation by the Pearson correlation of features."""

from typing import Any, Optional

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean, from_zero
from kd_mm.ops.functional import nonzero, resize, safe_sqrt, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


def standardise(features: Tensor, mask: Optional[Tensor] = None, eps: float = 1e-6) -> Tensor:
    """``(F - mean) / (std + eps)`` for each channel over images and cells, with the unbiased standard deviation.

    With a mask, mean and deviation are those of the weighted cells; ``n / (n - 1)`` counts the cells whose weight is
    not 0.  A constant channel becomes 0 and has gradient 0.

    Args:
        features: (N, C, H, W).
        mask: (N, 1, H, W), not negative, or None.
        eps: added to the deviation.

    Example:
        >>> standardise(torch.tensor([0., 2.]).view(1, 1, 1, 2)).flatten()
        tensor([-0.7071,  0.7071])
    """
    if mask is None:
        mask = torch.ones_like(features[:, :1])
    mask = mask.to(features.dtype)
    total, cells = nonzero(mask.sum()), (mask > 0).sum()
    centred = features - (features * mask).sum(dim=(0, 2, 3), keepdim=True) / total
    spread = (centred.square() * mask).sum(dim=(0, 2, 3), keepdim=True) / total
    return centred / (safe_sqrt(spread * cells / (cells - 1).clamp(min=1)) + eps)


@MODELS.register_module()
class PKDLoss(KDLoss):
    """Pearson distillation (Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient, NeurIPS 2022).

    ``0.5 * mean((f_s - f_t)^2)`` with ``f = (F - mean) / (std + 1e-6)`` for each channel over (N, H, W): up to
    ``(n - 1) / n`` it is ``1 - r``, r the mean correlation.  It does not change under ``F -> a F + b`` with ``a > 0``
    in each channel, so features of different detectors can be compared.

    Args:
        resize_student: where the sizes differ, resize the student to the teacher (bilinear); otherwise the teacher to
            the student. Default True [C: mmrazor, which looks at the height alone; here either side counts].
        eps: added to the standard deviation. Default 1e-6 [C].
        loss_weight: see :class:`KDLoss`. Default 6 [C: two-stage detectors]; 10 for RetinaNet from RetinaNet-X101 [C].

    Statistics are of the local batch and include padding, as published.  With a region they are those of the region.

    Returns:
        Reduction: per level; mean over elements
        0 to 2; summed over levels.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='PKDLoss'))(3 * x + 2, x) < 1e-6)
        True
    """

    takes = (4, )
    same_size = False

    def __init__(self, resize_student: bool = True, eps: float = 1e-6, loss_weight: Any = 6.0):
        super().__init__(loss_weight)
        self.resize_student = boolean('PKDLoss', 'resize_student', resize_student)
        self.eps = from_zero('PKDLoss', 'eps', eps)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self.resize_student:
            student = resize(student, (teacher.shape[2], teacher.shape[3]))
        else:
            teacher = resize(teacher, (student.shape[2], student.shape[3]))
        if mask is not None:
            mask = resize(mask, (student.shape[2], student.shape[3]))
        gap = standardise(student, mask, self.eps) - standardise(teacher, mask, self.eps)
        return 0.5 * weighted_mean(gap.square(), mask)
