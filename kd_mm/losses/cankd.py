"""CanKD: the student's features ask all cells of the teacher before both are compared."""

from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean, positive, whole
from kd_mm.ops.functional import nonzero, parameter_options, weighted_mean
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def instance_standardise(features: Tensor, mask: Optional[Tensor] = None, eps: float = 1e-5) -> Tensor:
    """``(F - mean) / sqrt(var + eps)`` for each image and channel over its cells, with the biased variance.

    Args:
        features: (N, C, H, W).
        mask: (N, 1, H, W), not negative, or None; mean and variance are those of the weighted cells.
        eps: added to the variance.

    Example:
        >>> instance_standardise(torch.tensor([0., 2.]).view(1, 1, 1, 2)).flatten().round()
        tensor([-1.,  1.])
    """
    weights = torch.ones_like(features[:, :1]) if mask is None else mask.to(features.dtype)
    total = nonzero(weights.sum(dim=(2, 3), keepdim=True))
    centred = features - (features * weights).sum(dim=(2, 3), keepdim=True) / total
    variance = (centred.square() * weights).sum(dim=(2, 3), keepdim=True) / total
    return centred / (variance + eps).sqrt()


class CrossNonLocal(nn.Module):
    """``s + BN(W y)`` with ``y_p = (1 / Q) sum_q (theta(s)_p . phi(t)_q) g(t)_q`` over the ``Q`` cells of the teacher.

    ``theta``, ``phi``, ``g`` and ``W`` are 1x1 convolutions with bias.  The product has no softmax, so it is taken from
    the right: the matrix of all pairs of cells is never built.  The batch norm starts at 0, so that the block starts
    as the identity; it knows the statistics of the batch only.

    Args:
        channels: of student and teacher.
        inner: channels that theta, phi and g give.
        sub_sample: max-pool phi and g by 2 (an odd last row or column is dropped).
        eps: of the batch norm.
    """

    def __init__(self, channels: int, inner: int, sub_sample: bool, eps: float, **options: Any):
        super().__init__()
        self.sub_sample = sub_sample
        self.theta = nn.Conv2d(channels, inner, 1, **options)
        self.phi = nn.Conv2d(channels, inner, 1, **options)
        self.g = nn.Conv2d(channels, inner, 1, **options)
        self.conv = nn.Conv2d(inner, channels, 1, **options)
        self.norm = BatchNorm(channels, eps=eps, track_running_stats=False, **options)
        nn.init.zeros_(self.norm.weight)

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        keys, values = self.phi(teacher), self.g(teacher)
        if self.sub_sample:
            edges = (min(2, teacher.shape[2]), min(2, teacher.shape[3]))
            keys, values = F.max_pool2d(keys, edges), F.max_pool2d(values, edges)
        keys, values = keys.flatten(2), values.flatten(2)
        context = values @ keys.transpose(1, 2) / keys.shape[2]  # (N, inner, inner)
        mixed = (context @ self.theta(student).flatten(2)).view(
            student.shape[0], self.theta.out_channels, *student.shape[2:])
        return student + self._normed(self.conv(mixed), mask)

    def _normed(self, features: Tensor, mask: Optional[Tensor]) -> Tensor:
        if mask is None or self.norm.running_mean is not None:
            return self.norm(features)
        weights = mask.to(features.dtype)
        total = nonzero(weights.sum())
        centred = features - (features * weights).sum(dim=(0, 2, 3), keepdim=True) / total
        variance = (centred.square() * weights).sum(dim=(0, 2, 3), keepdim=True) / total
        scale = self.norm.weight[:, None, None] / (variance + self.norm.eps).sqrt()
        return centred * scale + self.norm.bias[:, None, None]


@MODELS.register_module()
class CanKDLoss(KDLoss):
    """CanKD (Sun et al., CanKD: Cross-Attention-based Non-local operation for Feature-based Knowledge Distillation,
    WACV 2026).

    ``1/2 * mean((IN(z) - IN(F_t))^2)``, ``z = F_s + BN(W y)``: each cell of the student asks all cells of the teacher,
    see :class:`CrossNonLocal`; ``IN`` standardises each image and channel over the cells, without affine.  Each level
    has a block of its own.

    The block shows the teacher's values to the student's side.  So a low value proves little about the student: what
    counts is the task's own metric.

    As published: detectors have equal channels; the segmentation recipe puts a 1x1 convolution with bias before the
    block (and before its skip connection), which is what the automatic adapter does.  The ``tau`` of the authors' class
    is used nowhere.

    Args:
        inner_channels: channels of theta, phi and g. Default None: half of the teacher's, at least 1 [C].
        sub_sample: max-pool the teacher's keys and values by 2. Default True [C].
        eps: added to the variances of ``IN``. Default 1e-5 [C].
        norm_eps: added to the variances of ``BN``. Default 1e-5 [C].
        loss_weight: see :class:`KDLoss`. Default 10 [C: FPN levels P3 to P6, and one map in segmentation; the tables of
            the authors count the half of it, "5"].

    With a region, statistics and mean are those of its cells; the teacher's cells can all be asked.

    Returns:
        Reduction: per level; mean over elements
        Half of it; 0 to 2; summed over levels.

    Raises:
        ValueError: an option has a bad value.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='CanKDLoss'))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> loss(x, x).item() < 1e-6
        True
    """

    takes = (4, )
    def __init__(self, inner_channels: Optional[int] = None, sub_sample: bool = True, eps: float = 1e-5,
                 norm_eps: float = 1e-5, loss_weight: Any = 10.0):
        super().__init__(loss_weight)
        self.inner_channels = None if inner_channels is None else whole('CanKDLoss', 'inner_channels', inner_channels)
        self.sub_sample = boolean('CanKDLoss', 'sub_sample', sub_sample)
        self.epsilon = positive('CanKDLoss', 'eps', eps)
        self.norm_eps = positive('CanKDLoss', 'norm_eps', norm_eps)
        self.blocks = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.blocks):
            return
        blocks: List[nn.Module] = []
        for tensor in teacher:
            if tensor.dim() != 4:
                raise ValueError(f'CanKDLoss needs maps (N, C, H, W), not {tuple(tensor.shape)}')
            channels = tensor.shape[1]
            blocks.append(CrossNonLocal(channels, self.inner_channels or max(channels // 2, 1), self.sub_sample,
                                        self.norm_eps, **parameter_options(tensor)))
        self.blocks.extend(blocks)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        asked = self.blocks[level](student, teacher, mask)
        gap = instance_standardise(asked, mask, self.epsilon) - instance_standardise(teacher, mask, self.epsilon)
        return 0.5 * weighted_mean(gap.square(), mask)
