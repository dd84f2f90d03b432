"""Overhaul of feature distillation: features before the ReLU, and a margin for the teacher's negative ones."""

import math
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of
from kd_mm.ops.functional import apply_weights, nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

MARGINS = ('auto', 'norm', 'batch')


def negative_mean(scale: Tensor, shift: Tensor) -> Tensor:
    """``E[x | x < 0]`` for ``x ~ Normal(shift, |scale|)``, one a channel: what a batch norm says of its own output.

    ``shift - |scale| * pdf(z) / cdf(z)`` with ``z = -shift / |scale|``; ``-3 |scale|`` where negative values are rare
    (probability up to 0.001), as published.

    Args:
        scale: weight of the batch norm, (C,).
        shift: bias of the batch norm, (C,).

    Returns:
        (C,), not positive.

    Example:
        >>> round(negative_mean(torch.ones(1), torch.zeros(1)).item(), 4)
        -0.7979
    """
    wide = scale.double().abs()
    z = -shift.double() / nonzero(wide)
    below = 0.5 * torch.erfc(-z / math.sqrt(2))
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    mean = shift.double() - wide * density / nonzero(below)
    mean = torch.where(below > 0.001, mean, -3 * wide)
    return torch.where(wide > 0, mean, shift.double()).clamp(max=0).to(scale.dtype)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """``(s - t')^2`` with ``t' = max(t, margin)``; 0 where ``s <= t' <= 0``.

    A response that the teacher's ReLU cuts off need not be matched, only kept below it.

    Args:
        student: (N, C, H, W), before the ReLU.
        teacher: (N, C, H, W), before the ReLU.
        margin: (1, C, 1, 1), not positive.

    Example:
        >>> t = torch.tensor([-5., -5., 1.]).view(1, 3, 1, 1)
        >>> s = torch.tensor([-3., 0., 0.]).view(1, 3, 1, 1)
        >>> partial_distance(s, t, torch.full((1, 3, 1, 1), -2.)).flatten()
        tensor([0., 4., 1.])
    """
    target = torch.maximum(teacher, margin)
    counts = (student > target) | (target > 0)
    return (student - target).square() * counts


def batch_margin(teacher: Tensor) -> Tensor:
    """Mean of the negative responses of each channel, (C,); 0 for a channel without any.

    Example:
        >>> batch_margin(torch.tensor([[-1., -3.], [2., 4.]]).view(1, 2, 1, 2))
        tensor([-2.,  0.])
    """
    below = (teacher < 0).to(teacher.dtype)
    return (teacher * below).sum(dim=(0, 2, 3)) / nonzero(below.sum(dim=(0, 2, 3)))


@MODELS.register_module()
class OFDLoss(KDLoss):
    """Overhauled feature distillation (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).

    ``(1 / N) * sum over C, H, W of (F_s - max(F_t, m))^2``, without the places where the teacher's ReLU is shut and the
    student is below: see :func:`partial_distance`.  The features are those **before** a ReLU, and the margin ``m`` of
    a channel is the mean of the teacher's negative responses, which a batch norm in front of the ReLU knows by its
    weight and bias (:func:`negative_mean`).

    Tap the batch norm itself, such as ``decode_head.bottleneck.bn``: its output is the feature, and the distiller
    hands the module to :meth:`bind`.  Or, as published, the sum that a residual block gives its last ReLU,
    ``'backbone.layer4.2:pre_relu'``, with the margin of the block's last batch norm.
    The published connector is ``ConvAdapter(bias=False, always=True, norm=True)``.

    As published (authors, mdistiller): level ``i`` of ``L`` has the weight ``2^(i+1-L)``, which is
    ``loss_weight=[.25e-3, .5e-3, 1e-3]`` for three.  mmrazor divides by 1000 inside (its weight 1 is 1e-3 here) and
    gives all levels one weight.

    Args:
        margin: 'norm' (from the tapped teacher batch norm), 'batch' (mean of the negative values of this batch), or
            'auto' (default): 'norm' where a batch norm is tapped, else 'batch'.
        loss_weight: see :class:`KDLoss`. Default 1e-3 [C: mdistiller, the last level].

    Where the sizes differ, the teacher is averaged to the size that the student has after the connector, by adaptive
    average pooling [C: mdistiller]; a smaller teacher's cells are repeated.

    A region weights the squares.  :meth:`set_margins` gives margins by hand.

    Returns:
        Reduction: per level; sum over elements; divided by images
        Summed over levels.

    Raises:
        ValueError: ``margin`` is not among its choices, or is 'norm' and no batch norm is tapped.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='OFDLoss', margin='batch', loss_weight=1.0))
        >>> loss(torch.full((1, 2, 1, 1), 3.0), torch.ones(1, 2, 1, 1)).item()
        8.0
    """

    takes = (4, )
    same_size = False
    pools_to = 'student'

    def __init__(self, margin: str = 'auto', loss_weight: Any = 1e-3):
        super().__init__(loss_weight)
        self.margin = one_of('OFDLoss', 'margin', margin, MARGINS)

    def set_margins(self, margins: Dict[int, Tensor]) -> None:
        """Margins (C,) of some levels; they are kept in checkpoints."""
        for level, margin in margins.items():
            self.register_buffer(f'margin_{level}', margin.detach().clone())

    def bind(self, student: Sequence[Any], teacher: Sequence[Any]) -> None:
        if self.margin == 'batch':
            return
        for level, module in enumerate(teacher):
            norms = [part for part in module.children() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
            if norms and isinstance(getattr(module, 'relu', None), nn.Module):
                module = norms[-1]  # of a residual block the one before the shortcut is added, as published
            scale, shift = getattr(module, 'weight', None), getattr(module, 'bias', None)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and scale is not None and shift is not None:
                self.set_margins({level: negative_mean(scale.detach(), shift.detach())})
            elif self.margin == 'norm':
                raise ValueError(f"OFDLoss, level {level}: margin='norm' needs an affine batch norm at the teacher's "
                                 f"tap, not {type(module).__name__}. Tap the batch norm before the ReLU, or use "
                                 "margin='batch'")

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        margin = getattr(self, f'margin_{level}', None)
        if margin is None:
            if self.margin == 'norm':
                raise ValueError(f"OFDLoss, level {level}: margin='norm', but no batch norm is known. Use "
                                 "set_margins, or margin='batch'")
            margin = batch_margin(teacher)
        if margin.numel() != teacher.shape[1]:
            raise ValueError(f'OFDLoss, level {level}: {margin.numel()} margins for {teacher.shape[1]} channels')
        gap = partial_distance(student, teacher, margin.to(teacher).view(1, -1, 1, 1))
        return apply_weights(gap, mask).sum() / max(teacher.shape[0], 1)
