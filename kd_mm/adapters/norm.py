"""Normalisation of both sides by batch statistics."""

from typing import Tuple

import torch
from torch import nn

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops.checks import boolean, from_zero
from kd_mm.ops.functional import lift, parameter_options
from kd_mm.ops.norms import batch_standardise
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features


@MODELS.register_module()
class NormAdapter(Adapter):
    """Both sides normalised for each channel by the statistics of the batch, the student after a 1x1 convolution.

    The distillation recipe of RTMDet in MMYOLO [C]: no affine, no running statistics (the batch's own in evaluation
    too), so that only the pattern over images and cells is compared. One image of one cell has none: both sides are 0.

    Args:
        eps: added to the variance. Default 1e-5 [C].
        always: the convolution also where the channels are equal. Default True [C].
        bias: bias of the convolution; the normalisation removes it again, it is there to load published weights.
            Default True [C].

    Raises:
        ValueError: inputs that are no maps, or widths other than the prepared ones.

    Example:
        >>> student, teacher = NormAdapter()((torch.randn(2, 4, 8, 8), ), (torch.randn(2, 6, 8, 8), ))
        >>> student[0].shape, bool(teacher[0].mean().abs() < 1e-5)
        (torch.Size([2, 6, 8, 8]), True)
    """

    def __init__(self, eps: float = 1e-5, always: bool = True, bias: bool = True):
        super().__init__()
        self.eps = from_zero('NormAdapter', 'eps', eps)
        self.always = boolean('NormAdapter', 'always', always)
        self.bias = boolean('NormAdapter', 'bias', bias)
        self.convs = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.convs) > 0:
            return
        check_maps('NormAdapter', student, teacher)
        for s, t in zip(student, teacher):
            needed = self.always or s.shape[1] != t.shape[1]
            self.convs.append(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=self.bias, **parameter_options(s))
                              if needed else nn.Identity())

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        check_maps('NormAdapter', student, teacher, len(self.convs))
        adapted = []
        with torch.autocast(student[0].device.type, enabled=False):
            for level, (tensor, conv) in enumerate(zip(student, self.convs)):
                if isinstance(conv, nn.Conv2d) and tensor.shape[1] != conv.in_channels:
                    raise ValueError(f'NormAdapter, level {level}: student {tuple(tensor.shape)}, but it was prepared '
                                     f'for {conv.in_channels} channels. Build one adapter for each loss')
                adapted.append(batch_standardise(conv(lift(tensor)), self.eps))
            normed = tuple(batch_standardise(lift(tensor), self.eps) for tensor in teacher)
        return tuple(adapted), normed
