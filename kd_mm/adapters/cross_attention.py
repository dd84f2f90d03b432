"""Each cell of the teacher's grid asks the student's cells for its feature."""

import math
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops.checks import positive, whole
from kd_mm.ops.functional import lift, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features


def grid_code(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the places of a grid, which do not depend on how fine it is: (H*W, C).

    A cell's place is that of its centre in 0..1.  A quarter of the channels each are sines and cosines of the two
    coordinates, of periods from 2 down to 2 / 64; what is left over is 0.

    Example:
        >>> grid_code(2, 3, 9, torch.zeros(1)).shape
        torch.Size([6, 9])
    """
    count = channels // 4
    code = like.new_zeros(height * width, channels)
    if not count:
        return code
    rates = math.pi * 64 ** (torch.arange(count, device=like.device, dtype=like.dtype) / max(count - 1, 1))
    y, x = ((torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side for side in (height, width))
    for index, place in enumerate((y[:, None].expand(height, width), x.expand(height, width))):
        angle = place.reshape(-1, 1) * rates
        code[:, 2 * index * count:(2 * index + 1) * count] = angle.sin()
        code[:, (2 * index + 1) * count:(2 * index + 2) * count] = angle.cos()
    return code


@MODELS.register_module()
class CrossAttentionAdapter(Adapter):
    """The student on the teacher's grid and in its channels, by cross-attention (the projector of Fan et al., ScaleKD:
    Strong Vision Transformers Could Be Excellent Teachers, NeurIPS 2024; written from the description).

    A convolution sees its own cell, a transformer teacher sees everything.  So every cell of the *teacher's* grid asks
    all cells of the student: queries are a trained vector and the place of the cell, keys and values the student's
    cells after a linear layer, with their place; then a feed-forward layer, both with a residual::

        y = x + MHA(norm(q), norm(x_all), norm(x_all)),   z = y + FFN(norm(y)),   out = linear(z)

    ``x`` is the student's cell at that place (the map is resized, bilinearly).  Height and width may differ, and may
    change from step to step: places are sines and cosines of 0..1, see :func:`grid_code`.

    Args:
        channels: width inside, a multiple of ``heads``. Default 256 [ours].
        heads: of the attention. Default 8 [ours].
        ratio: width of the feed-forward layer in ``channels``, above 0. Default 2 [ours].

    Raises:
        ValueError: an option has a bad value, inputs that are no maps, or widths other than the prepared ones.

    Example:
        >>> adapter = CrossAttentionAdapter(channels=8, heads=2)
        >>> student, teacher = adapter((torch.randn(2, 4, 8, 8), ), (torch.randn(2, 6, 5, 7), ))
        >>> student[0].shape
        torch.Size([2, 6, 5, 7])
    """

    def __init__(self, channels: int = 256, heads: int = 8, ratio: float = 2.0):
        super().__init__()
        self.channels = whole('CrossAttentionAdapter', 'channels', channels)
        self.heads = whole('CrossAttentionAdapter', 'heads', heads)
        if self.channels % self.heads:
            raise ValueError(f'CrossAttentionAdapter: channels={channels!r} must be a multiple of heads={heads!r}')
        self.ratio = positive('CrossAttentionAdapter', 'ratio', ratio)
        self.projectors = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.projectors):
            return
        check_maps('CrossAttentionAdapter', student, teacher)
        for s, t in zip(student, teacher):
            self.projectors.append(CrossAttentionProjector(
                s.shape[1], t.shape[1], self.channels, self.heads, max(int(self.channels * self.ratio), 1),
                **parameter_options(s)))

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        check_maps('CrossAttentionAdapter', student, teacher, len(self.projectors))
        adapted = []
        with torch.autocast(student[0].device.type, enabled=False):
            for level, (s, t, projector) in enumerate(zip(student, teacher, self.projectors)):
                assert isinstance(projector, CrossAttentionProjector)
                wanted = projector.enter.in_features, projector.leave.out_features
                if (s.shape[1], t.shape[1]) != wanted:
                    raise ValueError(f'CrossAttentionAdapter, level {level}: student {tuple(s.shape)} and teacher '
                                     f'{tuple(t.shape)}, but it was prepared for {wanted[0]} and {wanted[1]} channels. '
                                     'Build one adapter for each loss')
                adapted.append(projector(lift(s), (t.shape[2], t.shape[3])))
        return tuple(adapted), teacher


class CrossAttentionProjector(nn.Module):
    """One level of :class:`CrossAttentionAdapter`.

    Args:
        student, teacher: channels of both sides.
        width: inside.
        heads: of the attention.
        hidden: of the feed-forward layer.
    """

    def __init__(self, student: int, teacher: int, width: int, heads: int, hidden: int, **options: Any):
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(student, width, **options)
        self.question = nn.Parameter(torch.zeros(width, **options))
        nn.init.trunc_normal_(self.question, std=0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width, **options) for _ in range(3))
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, **options) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, hidden, **options), nn.GELU(), nn.Linear(hidden, width, **options))
        self.leave = nn.Linear(width, teacher, **options)

    def forward(self, student: Tensor, size: Tuple[int, int]) -> Tensor:
        """(N, Cs, H, W) to (N, Ct, H, W) of ``size``."""
        count, _, height, width = student.shape
        cells = self.enter(student.flatten(2).transpose(1, 2))  # (N, H*W, D)
        inside = cells.shape[2]
        places = [grid_code(*grid, inside, cells) for grid in ((height, width), size)]
        maps = cells.transpose(1, 2).reshape(count, inside, height, width)
        here = F.interpolate(maps, size=size, mode='bilinear', align_corners=False).flatten(2).transpose(1, 2)
        asked = self.norms[1](cells)
        parts = (self.query(self.norms[0](here + self.question) + places[1]), self.key(asked + places[0]),
                 self.value(asked))
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]
        found = F.scaled_dot_product_attention(split[0], split[1], split[2])
        here = here + self.mix(found.transpose(1, 2).flatten(2))
        here = here + self.feed(self.norms[2](here))
        return self.leave(here).transpose(1, 2).reshape(count, self.leave.out_features, *size)
