"""Convolution that brings the student to the teacher's channels."""

from typing import Tuple

import torch
from torch import nn

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops.checks import boolean, one_of
from kd_mm.ops.functional import lift, parameter_options
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features


@MODELS.register_module()
class ConvAdapter(Adapter):
    """One convolution a level on the student, Cs -> Ct; widths are found from the features.

    Args:
        kernel_size: 1 or 3 (padding 1). Default 1 [C: FGD, MGD, CWD, FitNet]; DeFeat, FGFI and FRS use 3 [C].
        bias: bias of the convolution. Default True [C: FGD, MGD]; CIRKD has none.
        always: also where the channels are equal already. Default False; CIRKD's FitNet does it always [C].
        norm: batch normalisation with affine and running statistics after it. Default False.
        relu: ReLU at the end [C: FGFI]. Default False.

    Raises:
        ValueError: another kernel size, inputs that are no maps, or widths other than the prepared ones.

    Example:
        >>> adapter = ConvAdapter()
        >>> student, teacher = adapter((torch.zeros(1, 4, 8, 8), ), (torch.zeros(1, 6, 8, 8), ))
        >>> student[0].shape
        torch.Size([1, 6, 8, 8])
    """

    def __init__(self, kernel_size: int = 1, bias: bool = True, always: bool = False, norm: bool = False,
                 relu: bool = False):
        super().__init__()
        self.kernel_size = one_of('ConvAdapter', 'kernel_size', kernel_size, (1, 3))
        self.bias = boolean('ConvAdapter', 'bias', bias)
        self.always = boolean('ConvAdapter', 'always', always)
        self.norm = boolean('ConvAdapter', 'norm', norm)
        self.relu = boolean('ConvAdapter', 'relu', relu)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.convs) > 0:
            return
        check_maps('ConvAdapter', student, teacher)
        for s, t in zip(student, teacher):
            needed = self.always or s.shape[1] != t.shape[1]
            options = parameter_options(s)
            self.convs.append(nn.Conv2d(s.shape[1], t.shape[1], self.kernel_size, padding=self.kernel_size // 2,
                                        bias=self.bias, **options) if needed else nn.Identity())
            self.norms.append(BatchNorm(t.shape[1], **options) if needed and self.norm else nn.Identity())

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        check_maps('ConvAdapter', student, teacher, len(self.convs))
        adapted = []
        with torch.autocast(student[0].device.type, enabled=False):
            for level, (tensor, conv, norm) in enumerate(zip(student, self.convs, self.norms)):
                if isinstance(conv, nn.Identity):
                    adapted.append(tensor)
                    continue
                if tensor.shape[1] != conv.in_channels:
                    raise ValueError(f'ConvAdapter, level {level}: student {tuple(tensor.shape)}, but it was prepared '
                                     f'for {conv.in_channels} channels. Build one adapter for each loss')
                tensor = norm(conv(lift(tensor)))
                adapted.append(tensor.relu() if self.relu else tensor)
        return tuple(adapted), teacher
