"""Relations between cells on the way from student to teacher."""

from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops.checks import boolean
from kd_mm.ops.functional import lift, parameter_options
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features

#: Largest logit of a relation: float32 tells logits of 1/8 apart there.
LARGEST_RELATION = 2.0**20


class GraphBlock(nn.Module):
    """Every cell adds what all cells say to it: ``ReLU(BN(W [F, ReLU(BN(U sum_j a_ij V F_j))]))``.

    ``a_ij`` is the softmax over j of ``(Q F_i) . (K F_j) / sqrt(C / 2)``; Q, K, V map C to C / 2 channels.
    """

    def __init__(self, channels: int, **options: Any):
        super().__init__()
        middle = max(channels // 2, 1)
        self.query, self.key, self.value = (nn.Conv2d(channels, middle, 1, bias=False, **options) for _ in range(3))
        self.spread = nn.Sequential(nn.Conv2d(middle, channels, 1, bias=False, **options),
                                    BatchNorm(channels, track_running_stats=False, **options), nn.ReLU())
        self.fuse = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, bias=False, **options),
                                  BatchNorm(channels, track_running_stats=False, **options), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        # The fused kernel, which never holds the (H*W)^2 relations, takes contiguous rows only.
        query, key, value = (conv(features).flatten(2).transpose(1, 2).contiguous()
                             for conv in (self.query, self.key, self.value))
        # On the fused kernel's way back the exponentials of relations beyond 2^24 overflow, for want of digits. A
        # softmax over such has been one cell's long before.
        with torch.no_grad():
            largest = query.norm(dim=2).amax(dim=1) * key.norm(dim=2).amax(dim=1) / query.shape[2]**0.5
            share = (LARGEST_RELATION / largest.clamp(min=LARGEST_RELATION))[:, None, None]
        query = query * share
        context = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        context = context.transpose(1, 2).unflatten(2, features.shape[2:])
        return self.fuse(torch.cat([features, self.spread(context)], dim=1))


@MODELS.register_module()
class GraphAdapter(Adapter):
    """One :class:`GraphBlock` a level on the student, after a 1x1 convolution where its channels are not the teacher's.

    CIRKD's second version compares features by FitNet after such a block [C]; its batch norms have no running
    statistics, since an adapter is used in training only.

    Args:
        bias: bias of the 1x1 convolution. Default False.

    Raises:
        ValueError: inputs that are no maps, or widths other than the prepared ones.

    Example:
        >>> student, teacher = GraphAdapter()((torch.zeros(1, 4, 8, 8), ), (torch.zeros(1, 6, 8, 8), ))
        >>> student[0].shape
        torch.Size([1, 6, 8, 8])
    """

    def __init__(self, bias: bool = False):
        super().__init__()
        self.bias = boolean('GraphAdapter', 'bias', bias)
        self.convs = nn.ModuleList()
        self.blocks = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.blocks) > 0:
            return
        check_maps('GraphAdapter', student, teacher)
        for s, t in zip(student, teacher):
            options = parameter_options(s)
            self.convs.append(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=self.bias, **options)
                              if s.shape[1] != t.shape[1] else nn.Identity())
            self.blocks.append(GraphBlock(t.shape[1], **options))

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        check_maps('GraphAdapter', student, teacher, len(self.blocks))
        adapted = []
        with torch.autocast(student[0].device.type, enabled=False):
            for level, (tensor, conv, block) in enumerate(zip(student, self.convs, self.blocks)):
                if isinstance(conv, nn.Conv2d) and tensor.shape[1] != conv.in_channels:
                    raise ValueError(f'GraphAdapter, level {level}: student {tuple(tensor.shape)}, but it was prepared '
                                     f'for {conv.in_channels} channels. Build one adapter for each loss')
                adapted.append(block(conv(lift(tensor))))
        return tuple(adapted), teacher
