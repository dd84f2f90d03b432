"""Feature-based distillation for detectors: attention-guided and non-local."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import entries, from_zero, positive, whole
from kd_mm.ops.functional import apply_weights, nonzero, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def spatial_attention(features: Tensor, tau: float) -> Tensor:
    """``H*W * softmax_hw(mean_c |F| / tau)``: (N, 1, H, W), with the mean 1.

    Example:
        >>> spatial_attention(torch.ones(1, 4, 2, 4), 0.5).sum().item()
        8.0
    """
    count, _, height, width = features.shape
    weights = (features.abs().mean(dim=1).flatten(1) / tau).softmax(dim=1)
    return height * width * weights.view(count, 1, height, width)


class _SquareNorm(torch.autograd.Function):
    """One tensor of the size of the gap from forward to backward, where autograd would keep three."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, weights: Optional[Tensor]) -> Tensor:
        weighted = gap if weights is None else gap * weights
        norm = torch.einsum('ncp,ncp->nc', gap, weighted).sum().sqrt()
        ctx.save_for_backward(weighted, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tuple[Tensor, None]:
        weighted, norm = ctx.saved_tensors
        return weighted * (upstream[0] / nonzero(norm)), None


def batch_norm2(gap: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """L2 norm of everything in the batch, ``sqrt(sum weights * gap^2)``; its gradient at 0 is 0.

    Args:
        gap: (N, C, H, W), or cells in a row: (N, C, H*W).
        weights: (N, 1, H, W), not negative, or None. No gradient reaches them.

    Example:
        >>> batch_norm2(torch.tensor([3., 4.]).view(1, 1, 1, 2)).item()
        5.0
    """
    return _SquareNorm.apply(gap.flatten(2), None if weights is None else weights.flatten(2))


def identity_where_equal(layer: Union[nn.Conv2d, nn.Linear]) -> None:
    """Start a layer as the identity if its widths allow that; otherwise it keeps its random weights."""
    if layer.weight.shape[0] == layer.weight.shape[1]:
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.Linear):
            nn.init.eye_(layer.weight)
        else:
            nn.init.dirac_(layer.weight)


class NonLocalBlock(nn.Module):
    """``F + BN(conv(y))`` with ``y_i = (1 / n) sum_j (theta_i . phi_j) g_j`` over the ``n`` pooled cells.

    The product has no softmax, so it is taken from the right (``phi`` with ``g`` first): the matrix of all pairs of
    cells is never built.  The batch norm starts at 0, so that the block starts as the identity; it knows the
    statistics of the batch only.  As ``conv(y)`` is linear, they follow from mean and covariance of ``y``, and the
    norm folds into the weights of the convolution: ``conv(y)`` is not built either (see :meth:`residual`).

    Args:
        channels: of the features.
        reduction: the block works on ``channels // reduction`` channels.
        pool: edge of the max pooling of phi and g.
    """

    def __init__(self, channels: int, reduction: int, pool: int, **options: Any):
        super().__init__()
        middle = max(channels // reduction, 1)
        self.pool = pool
        self.g = nn.Conv2d(channels, middle, 1, **options)
        self.theta = nn.Conv2d(channels, middle, 1, **options)
        self.phi = nn.Conv2d(channels, middle, 1, **options)
        self.conv = nn.Conv2d(middle, channels, 1, bias=False, **options)
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False, **options)
        for part in (self.g, self.theta, self.phi):
            nn.init.normal_(part.weight, std=0.01)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
        nn.init.zeros_(self.norm.weight)

    def residual(self, features: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """``y`` (N, c, H*W), ``W`` (C, c) and ``b`` (C, 1) with ``BN(conv(y)) = W y + b``; c: the reduced channels."""
        edges = (min(self.pool, features.shape[2]), min(self.pool, features.shape[3]))
        parts = (self.g, self.phi, self.theta)
        # One convolution instead of three: the features are read once, and their gradient is written once.
        g, phi, theta = F.conv2d(
            features, torch.cat([part.weight for part in parts]),
            torch.cat([part.bias for part in parts if part.bias is not None])).chunk(3, dim=1)
        g, phi = (F.max_pool2d(part, edges).flatten(2) for part in (g, phi))
        context = torch.einsum('ncj,ndj->ncd', phi, g) / phi.shape[2]
        mixed = torch.einsum('nci,ncd->ndi', theta.flatten(2), context)
        weight = self.conv.weight.flatten(1)
        centre, variance = self.statistics(mixed, weight)
        scale = self.norm.weight / (variance + self.norm.eps).sqrt()
        return mixed, scale[:, None] * weight, (self.norm.bias - scale * centre)[:, None]

    def statistics(self, mixed: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and variance of ``weight @ mixed``, (C,) each: of the batch, or those that the norm was given."""
        if not self.norm.training and self.norm.running_mean is not None and self.norm.running_var is not None:
            return self.norm.running_mean, self.norm.running_var
        mean = mixed.mean(dim=(0, 2))
        centred = mixed - mean[:, None]
        covariance = torch.einsum('nci,ndi->cd', centred, centred) / (mixed.shape[0] * mixed.shape[2])
        return weight @ mean, torch.einsum('kc,cd,kd->k', weight, covariance, weight).clamp(min=0)

    def forward(self, features: Tensor) -> Tensor:
        mixed, weight, bias = self.residual(features)
        return features + (torch.matmul(weight, mixed) + bias).view_as(features)


@MODELS.register_module()
class FBKDLoss(KDLoss):
    """Feature-based distillation (Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation,
    ICLR 2021).

    Four L2 norms over the whole batch, for each level (sums of squares, **not** divided by the number of images)::

        feature  * ||(F_t - A(F_s)) sqrt(M)||              M: mean of both sides' H*W * softmax_hw(mean_c |F| / tau)
      + channel  * ||mean_hw F_t - L(mean_hw F_s)||        L: a linear layer
      + spatial  * ||mean_c F_t - K(mean_c F_s)||          K: a 3x3 convolution on one channel
      + nonlocal * ||B_t(F_t) - R(B_s(F_s))||              B: a :class:`NonLocalBlock` for each side; R: 1x1

    ``A``, ``L``, ``K``, ``R`` and both blocks are trained, the teacher's block too, so its target can drift (as
    published; the teacher itself gets no gradient).  M has no gradient.  Where the channels of both sides agree, the
    layers start as the identity (a student that equals the teacher then has the loss 0; published is a random start).
    The authors' repository has no code; numbers and weights here are mmrazor's.  Its channel attention is computed but
    not used, and is left out here.

    Args:
        feature, channel, spatial, nonlocal_: weights of the four terms, from 0. Default 7e-5, 4e-3, 4e-3, 7e-5 [C:
            mmrazor].
        tau: temperature of M, above 0. Default 0.5 [C: mmrazor].
        reduction: the non-local blocks work on C / reduction channels. Default 4 [C: mmrazor].
        pool: max-pool edge within the non-local blocks, a number or one a level. Default 4. mmrazor pools twice, by 2
            and by its ``maxpool_stride``: a stride of 8 on P2 [C] is ``pool=16`` here; without ``sub_sample`` it
            does not pool: ``pool=1``.
        loss_weight: see :class:`KDLoss`. Default 1 [C: mmrazor].

    With a region the squares are weighted by it and the channel means are over its cells; the non-local blocks and the
    3x3 convolution still look at the whole map.

    Returns:
        Reduction: per level; root of the sum over elements; not divided
        Parts: feature, channel, spatial, nonlocal
        Each of the four terms; summed over levels.

    Raises:
        ValueError: an option is negative or not positive, or ``pool`` has too few entries.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 8, 16, 16)
        >>> build(dict(type='FBKDLoss'))(x, x).item() < 1e-5
        True
    """

    takes = (4, )
    same_channels = False

    def __init__(self, feature: float = 7e-5, channel: float = 4e-3, spatial: float = 4e-3, nonlocal_: float = 7e-5,
                 tau: float = 0.5, reduction: int = 4, pool: Union[int, Sequence[int]] = 4, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        given = {'feature': feature, 'channel': channel, 'spatial': spatial, 'nonlocal_': nonlocal_}
        self.factors = {name.rstrip('_'): from_zero('FBKDLoss', name, value) for name, value in given.items()}
        self.tau = positive('FBKDLoss', 'tau', tau)
        self.reduction = whole('FBKDLoss', 'reduction', reduction)
        self.pool: Union[int, List[int]]
        if isinstance(pool, (list, tuple)):
            self.pool = entries('FBKDLoss', 'pool', pool, whole)
        else:
            self.pool = whole('FBKDLoss', 'pool', pool)
        self.adapters = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.adapters) > 0:
            return
        if not isinstance(self.pool, int) and len(self.pool) != len(student):
            raise ValueError(f'FBKDLoss: pool has {len(self.pool)} entries for {len(student)} levels')
        for level, (s, t) in enumerate(zip(student, teacher)):
            options, pool = parameter_options(t), self.pool if isinstance(self.pool, int) else self.pool[level]
            layers = nn.ModuleDict(dict(
                feature=nn.Conv2d(s.shape[1], t.shape[1], 1, **options),
                channel=nn.Linear(s.shape[1], t.shape[1], **options),
                spatial=nn.Conv2d(1, 1, 3, padding=1, **options),
                nonlocal_=nn.Conv2d(s.shape[1], t.shape[1], 1, **options)))
            for layer in layers.values():
                assert isinstance(layer, (nn.Conv2d, nn.Linear))
                identity_where_equal(layer)
            layers['block_s'] = NonLocalBlock(s.shape[1], self.reduction, pool, **options)
            layers['block_t'] = NonLocalBlock(t.shape[1], self.reduction, pool, **options)
            self.adapters.append(layers)

    def terms(self, level: int, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The four terms of one level without their weights."""
        layers: Any = self.adapters[level]
        region = None if mask is None else mask.to(teacher.dtype)
        with torch.no_grad():
            attention = (spatial_attention(student, self.tau) + spatial_attention(teacher, self.tau)) / 2
        means, size = self.channel_means(student, teacher, region)
        return {
            'feature': batch_norm2(self.projected_gap(layers['feature'], student, teacher),
                                   apply_weights(attention, region)),
            # An image without a cell of the region has no means to compare, only the bias of the linear layer.
            'channel': batch_norm2(((means[1] - layers['channel'](means[0])) * (size > 0))[..., None, None]),
            'spatial': batch_norm2(
                teacher.mean(dim=1, keepdim=True) - layers['spatial'](student.mean(dim=1, keepdim=True)), region),
            'nonlocal': batch_norm2(self.nonlocal_gap(layers, student, teacher), region),
        }

    @staticmethod
    def channel_means(student: Tensor, teacher: Tensor, region: Optional[Tensor]) -> Tuple[List[Tensor], Tensor]:
        """The mean of each channel over the region, (N, C) of each side, and the weights' sum (N, 1)."""
        if region is None:
            return [part.mean(dim=(2, 3)) for part in (student, teacher)], student.new_ones(student.shape[0], 1)
        size = region.sum(dim=(2, 3))
        return [torch.einsum('nchw,nhw->nc', part, region[:, 0]) / nonzero(size) for part in (student, teacher)], size

    @staticmethod
    def projected_gap(layer: nn.Conv2d, student: Tensor, teacher: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """``teacher - layer(student) + bias``, (N, C, H*W); written in place, and no view for autograd to copy."""
        assert layer.bias is not None
        weight = -layer.weight.flatten(1).expand(student.shape[0], -1, -1)
        bias = -layer.bias[:, None] if bias is None else bias - layer.bias[:, None]
        return torch.baddbmm(teacher.flatten(2), weight, student.flatten(2)).add_(bias)

    def nonlocal_gap(self, layers: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """``B_t(F_t) - R(B_s(F_s))``, (N, C, H*W); both blocks' residuals are added to the gap of their features."""
        layer = layers['nonlocal_']
        project = layer.weight.flatten(1)
        mixed_t, weight_t, bias_t = layers['block_t'].residual(teacher)
        mixed_s, weight_s, bias_s = layers['block_s'].residual(student)
        gap = self.projected_gap(layer, student, teacher, bias_t - project @ bias_s)
        for mixed, weight in ((mixed_t, weight_t), (mixed_s, -project @ weight_s)):
            gap = gap.baddbmm_(weight.expand(mixed.shape[0], -1, -1), mixed)
        return gap

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, mask)
