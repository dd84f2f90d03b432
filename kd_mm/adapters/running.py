"""Standardisation of the teacher by statistics that run over the training."""

from typing import List, Tuple

import torch
from torch import Tensor, nn

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops import distributed
from kd_mm.ops.checks import boolean, from_zero, one_of, positive
from kd_mm.ops.functional import lift, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features

SCALES = ('channel', 'global')


@MODELS.register_module()
class RunningStandardiseAdapter(Adapter):
    """The teacher's features with mean 0 and variance 1 over the training, the student after a 1x1 convolution.

    For several teachers of one student: the scale of a foundation model's features says nothing about how much it
    should count, and after this each teacher counts alike.  Every loss has an adapter, and so statistics, of its own.
    (In the spirit of PHI-S, Ranzinger et al., arXiv 2410.01680; written from the description.)

    Mean and variance of each channel over images and cells are the exact means over the first ``1 / momentum`` batches
    and exponential ones afterwards, averaged over the ranks and kept in checkpoints.  A batch is counted before it is
    standardised.  In evaluation nothing is counted.

    Args:
        scale: 'global': all channels are divided by one number, the root of their mean variance, so that their
            proportions stay (default; what PHI-S does, up to a rotation of the channels, which no squared or cosine
            loss sees); 'channel': each by its own.
        momentum: share of a new batch in the statistics in the long run, above 0 and at most 1. Default 0.01 [ours].
        eps: added to the variance. Default 1e-5 [ours].
        always: the convolution also where the channels are equal. Default True: the student has another scale.

    Raises:
        ValueError: an option has a bad value, inputs that are no maps, or widths other than the prepared ones.

    Example:
        >>> student, teacher = RunningStandardiseAdapter()((torch.randn(2, 4, 8, 8), ), (5 + torch.randn(2, 6, 8, 8), ))
        >>> student[0].shape, bool(teacher[0].mean().abs() < 1e-4)
        (torch.Size([2, 6, 8, 8]), True)
    """

    def __init__(self, scale: str = 'global', momentum: float = 0.01, eps: float = 1e-5, always: bool = True):
        super().__init__()
        self.scale = one_of('RunningStandardiseAdapter', 'scale', scale, SCALES)
        self.momentum = positive('RunningStandardiseAdapter', 'momentum', momentum, 1.0)
        self.eps = from_zero('RunningStandardiseAdapter', 'eps', eps)
        self.always = boolean('RunningStandardiseAdapter', 'always', always)
        self.convs = nn.ModuleList()
        self.statistics = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.convs):
            return
        check_maps('RunningStandardiseAdapter', student, teacher)
        for s, t in zip(student, teacher):
            needed = self.always or s.shape[1] != t.shape[1]
            self.convs.append(nn.Conv2d(s.shape[1], t.shape[1], 1, **parameter_options(s)) if needed else nn.Identity())
            self.statistics.append(RunningMoments(t))

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        check_maps('RunningStandardiseAdapter', student, teacher, len(self.convs))
        own: List[Tensor] = []
        theirs: List[Tensor] = []
        with torch.autocast(student[0].device.type, enabled=False):
            for level, (s, t) in enumerate(zip(student, teacher)):
                conv, moments = self.convs[level], self.statistics[level]
                assert isinstance(moments, RunningMoments)
                wanted = (conv.in_channels if isinstance(conv, nn.Conv2d) else s.shape[1], len(moments.mean))
                if (s.shape[1], t.shape[1]) != wanted:
                    raise ValueError(f'RunningStandardiseAdapter, level {level}: student {tuple(s.shape)} and teacher '
                                     f'{tuple(t.shape)}, but it was prepared for {wanted[0]} and {wanted[1]} channels. '
                                     'Build one adapter for each loss')
                own.append(conv(lift(s)))
                theirs.append(self._standardised(moments, lift(t.detach())))
        return tuple(own), tuple(theirs)

    def _standardised(self, moments: 'RunningMoments', features: Tensor) -> Tensor:
        if self.training and features.numel():
            moments.add(features, self.momentum)
        variance = moments.variance.mean().expand_as(moments.variance) if self.scale == 'global' else moments.variance
        scale = (variance + self.eps).rsqrt()
        return (features - moments.mean.to(features)[:, None, None]) * scale.to(features)[:, None, None]


class RunningMoments(nn.Module):
    """Mean and variance of each channel, (C,); 0 and 1 before anything was counted.

    Args:
        like: (N, C, ...); channels and device.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, like: Tensor):
        super().__init__()
        options = parameter_options(like)
        self.register_buffer('mean', torch.zeros(like.shape[1], **options))
        self.register_buffer('variance', torch.ones(like.shape[1], **options))
        self.register_buffer('batches', torch.zeros((), dtype=torch.long, device=like.device))

    @torch.no_grad()
    def add(self, features: Tensor, momentum: float) -> None:
        """Count a batch (N, C, H, W)."""
        mean = features.mean(dim=(0, 2, 3))
        spread = (features - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        # Of all ranks: the mean of the variances, and the variance of the means.
        both = distributed.mean(torch.stack([mean, spread + mean.square()]))
        mean, variance = both[0], (both[1] - both[0].square()).clamp(min=0) if distributed.world_size() > 1 else spread
        self.batches += 1
        share = (1.0 / self.batches.to(mean)).clamp(min=momentum)
        away = mean - self.mean
        self.variance.lerp_(variance, share).add_(share * (1 - share) * away.square())
        self.mean.add_(share * away)
