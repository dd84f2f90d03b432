"""Knowledge review: each teacher level teaches the student's level and all deeper ones."""

from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import entries, whole
from kd_mm.ops.functional import nonzero, parameter_options, weighted_mean
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def hierarchical_context_loss(student: Tensor, teacher: Tensor, pools: Sequence[int] = (4, 2, 1),
                              mask: Optional[Tensor] = None) -> Tensor:
    """Mean squared difference of the maps and of their averages over coarser and coarser grids.

    ``(mse + mse_4 / 2 + mse_2 / 4 + mse_1 / 8) / (1 + 1/2 + 1/4 + 1/8)``, where ``mse_l`` compares adaptive averages
    over ``l x l`` parts.  A grid that is not smaller than the map's height is left out, and so is its weight.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        pools: edges of the grids, each with half the weight of the one before.
        mask: region (N, 1, H, W): averages are weighted by it, and so is each part by what it has of the region.

    Returns:
        A scalar.

    Example:
        >>> hierarchical_context_loss(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)).item()
        1.0
    """
    gap = student - teacher  # pooling is linear: the difference is pooled once
    total, weight, weights = weighted_mean(gap.square(), mask), 1.0, 1.0
    for edge in pools:
        if edge >= gap.shape[2]:
            continue
        weight /= 2
        weights += weight
        if mask is None:
            part, share = F.adaptive_avg_pool2d(gap, edge), None
        else:
            share = F.adaptive_avg_pool2d(mask.to(gap.dtype), edge)
            part = F.adaptive_avg_pool2d(gap * mask.to(gap.dtype), edge) / nonzero(share)
        total = total + weight * weighted_mean(part.square(), share)
    return total / weights


class FusionBlock(nn.Module):
    """Attention-based fusion of a student level with what comes from the deeper ones.

    ``x = BN(conv1x1(F))``; with something deeper ``y`` (resized to x by nearest neighbour), ``x = a_0 x + a_1 y`` with
    two maps ``a = sigmoid(conv1x1([x, y]))``.  The output is ``BN(conv3x3(x))``; ``x`` goes on to the next level.
    Batch norms know the statistics of the batch only.
    """

    def __init__(self, channels: int, middle: int, out: int, fuse: bool, **options: Any):
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1, bias=False, **options)
        self.reduce_norm = BatchNorm(middle, track_running_stats=False, **options)
        self.expand = nn.Conv2d(middle, out, 3, padding=1, bias=False, **options)
        self.expand_norm = BatchNorm(out, track_running_stats=False, **options)
        self.attention = nn.Conv2d(2 * middle, 2, 1, **options) if fuse else None
        for conv in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Tensor, deeper: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        fused = self.reduce_norm(self.reduce(features))
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, size=fused.shape[2:], mode='nearest')
            shares = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        return self.expand_norm(self.expand(fused)), fused


@MODELS.register_module()
class ReviewKDLoss(KDLoss):
    """Knowledge review (Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021).

    From the last level to the first, :class:`FusionBlock` merges each student level with the merged deeper ones, and
    the result is compared with the teacher's level by :func:`hierarchical_context_loss`; the losses of the levels are
    added.  The first levels must be the fine ones, as in an FPN or in the stages of a backbone.

    The blocks are trained jointly and replace an adapter, so channels may differ; they always stand between, so equal
    features do not give 0.  As published, but that the batch norms keep no running statistics, which a loss never uses.

    Args:
        channels: width of the fusion. Default None: that of the last student level, at most 512. The detection code of
            the authors and of mdistiller uses 256, which is the FPN's width [C].
        pools: grids of the loss. Default (4, 2, 1) [C].
        loss_weight: see :class:`KDLoss`; one number for all levels. Default 1 [C: mdistiller, Faster R-CNN R50]; 1.2
            for R18 [C].

    A region weights the comparison; the fusion looks at the whole map.

    Returns:
        Reduction: all levels; mean over elements
        Summed over levels.

    Raises:
        ValueError: ``channels`` or an entry of ``pools`` is not positive.

    Example:
        >>> from kd_mm.registry import build
        >>> student = [torch.randn(2, 4, 16, 16), torch.randn(2, 8, 8, 8)]
        >>> teacher = [torch.randn(2, 6, 16, 16), torch.randn(2, 6, 8, 8)]
        >>> build(dict(type='ReviewKDLoss'))(student, teacher).shape
        torch.Size([])
    """

    takes = (4, )
    joint = True
    same_channels = False

    def __init__(self, channels: Optional[int] = None, pools: Sequence[int] = (4, 2, 1), loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.channels = None if channels is None else whole('ReviewKDLoss', 'channels', channels)
        self.pools = entries('ReviewKDLoss', 'pools', pools, whole)
        self.blocks = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.blocks) > 0:
            return
        middle = min(student[-1].shape[1], 512) if self.channels is None else self.channels
        for level, (s, t) in enumerate(zip(student, teacher)):
            self.blocks.append(FusionBlock(s.shape[1], middle, t.shape[1], level < len(student) - 1,
                                           **parameter_options(t)))

    def fuse(self, student: Features) -> List[Tensor]:
        """The merged student levels, comparable with the teacher's."""
        outputs: List[Tensor] = []
        deeper: Optional[Tensor] = None
        for block, features in zip(reversed(list(self.blocks)), reversed(student)):
            output, deeper = block(features, deeper)
            outputs.insert(0, output)
        return outputs

    def level_terms(self, student: Features, teacher: Features, masks: Sequence[Optional[Tensor]]) -> List[Tensor]:
        """The loss of every level."""
        return [hierarchical_context_loss(fused, t, self.pools, mask)
                for fused, t, mask in zip(self.fuse(student), teacher, masks)]

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Tensor:
        return torch.stack(self.level_terms(student, teacher, masks)).sum()
