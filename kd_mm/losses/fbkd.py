"""Feature-based distillation for detectors: attention-guided and non-local."""

from typing import Any, Dict, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.functional import apply_weights, nonzero, parameter_options, positive, safe_sqrt
from kd_mm.losses.base import KDLoss
from kd_mm.registry import MODELS
from kd_mm.types import Features, KDBatch


def spatial_attention(features: Tensor, tau: float) -> Tensor:
    """``H*W * softmax_hw(mean_c |F| / tau)``: (N, 1, H, W), with the mean 1.

    Example:
        >>> spatial_attention(torch.ones(1, 4, 2, 3), 0.5).sum().item()
        6.0
    """
    count, _, height, width = features.shape
    weights = (features.abs().mean(dim=1).flatten(1) / tau).softmax(dim=1)
    return height * width * weights.view(count, 1, height, width)


def batch_norm2(gap: Tensor) -> Tensor:
    """L2 norm of everything in the batch; its gradient at 0 is 0.

    Example:
        >>> batch_norm2(torch.tensor([3., 4.])).item()
        5.0
    """
    return safe_sqrt(gap.square().sum())


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
    statistics of the batch only.

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

    def forward(self, features: Tensor) -> Tensor:
        edges = (min(self.pool, features.shape[2]), min(self.pool, features.shape[3]))
        g, phi = (F.max_pool2d(part(features), edges).flatten(2) for part in (self.g, self.phi))
        context = torch.einsum('ncj,ndj->ncd', phi, g) / phi.shape[2]
        mixed = torch.einsum('nci,ncd->ndi', self.theta(features).flatten(2), context)
        return features + self.norm(self.conv(mixed.view(features.shape[0], -1, *features.shape[2:])))


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
            and by its ``maxpool_stride``: a stride of 8 on P2 [C] is ``pool=16`` here.
        loss_weight: see :class:`KDLoss`. Default 1 [C: mmrazor].

    With a region the squares are weighted by it and the channel means are over its cells; the non-local blocks and the
    3x3 convolution still look at the whole map.

    Returns:
        A scalar per level; summed over levels.

    Raises:
        ValueError: an option is negative or not positive, or ``pool`` has too few entries.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 8, 16, 16)
        >>> build(dict(type='FBKDLoss'))(x, x).item()
        0.0
    """

    same_channels = False

    def __init__(self, feature: float = 7e-5, channel: float = 4e-3, spatial: float = 4e-3, nonlocal_: float = 7e-5,
                 tau: float = 0.5, reduction: int = 4, pool: Union[int, Sequence[int]] = 4, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.weights = {'feature': feature, 'channel': channel, 'spatial': spatial, 'nonlocal_': nonlocal_}
        for name, value in self.weights.items():
            if not value >= 0:
                raise ValueError(f'FBKDLoss: {name}={value!r} must not be negative')
        self.tau = positive('FBKDLoss', 'tau', tau)
        self.reduction = int(positive('FBKDLoss', 'reduction', reduction))
        self.pool = pool if isinstance(pool, int) else list(pool)
        for edge in [pool] if isinstance(pool, int) else pool:
            positive('FBKDLoss', 'pool', edge)
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
        root = None if mask is None else mask.to(teacher.dtype).sqrt()
        with torch.no_grad():
            attention = (spatial_attention(student, self.tau) + spatial_attention(teacher, self.tau)) / 2
        cells = torch.ones_like(teacher[:, :1]) if mask is None else mask.to(teacher.dtype)
        size = cells.sum(dim=(2, 3))
        means = [(part * cells).sum(dim=(2, 3)) / nonzero(size) for part in (student, teacher)]
        return {
            'feature': batch_norm2(apply_weights((teacher - layers['feature'](student)) * attention.sqrt(), root)),
            # An image without a cell of the region has no means to compare, only the bias of the linear layer.
            'channel': batch_norm2((means[1] - layers['channel'](means[0])) * (size > 0)),
            'spatial': batch_norm2(apply_weights(
                teacher.mean(dim=1, keepdim=True) - layers['spatial'](student.mean(dim=1, keepdim=True)), root)),
            'nonlocal_': batch_norm2(apply_weights(
                layers['block_t'](teacher) - layers['nonlocal_'](layers['block_s'](student)), root)),
        }

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        terms = self.terms(level, student, teacher, mask)
        return sum((self.weights[name] * term for name, term in terms.items()), student.new_zeros(()))
