"""Distillation between transformers: patch embeddings and fused stage features."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean, entries, from_zero, one_of, whole
from kd_mm.ops.functional import nonzero, parameter_options, weighted_mean
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import images

EMBEDDINGS = ('linear', 'mixer', 'assistant')


def hierarchical_distance(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None,
                          sizes: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Mean squared difference of two maps and of their average poolings to ``l x l`` cells, averaged.

    Weight 1 for the maps, then 1/2, 1/4, ... for the sizes l below the height of the maps, divided by their sum.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        mask: weights of the cells (N, 1, H, W); they multiply the differences.
        sizes: l, from large to small.

    Returns:
        A scalar.

    Example:
        >>> hierarchical_distance(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
        tensor(1.)
    """
    gap = student - teacher
    share = gap.new_ones(())
    if mask is not None:
        mask = mask.to(gap.dtype)
        gap, share = gap * mask, nonzero(mask.mean())
    total, weight, weights = gap.square().mean(), 1.0, 1.0
    for size in sizes:
        if size < student.shape[2]:
            weight /= 2
            total = total + weight * F.adaptive_avg_pool2d(gap, size).square().mean()
            weights += weight
    return total / (weights * share)


def tokens_of(features: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H*W, C)."""
    return features.flatten(2).transpose(1, 2)


def batch_norm(channels: int, **options: Any) -> BatchNorm:
    """By the batch's own statistics always: these parts are used in training only."""
    return BatchNorm(channels, track_running_stats=False, **options)


class SelectiveFusion(nn.Module):
    """A stage with the deeper one: ``mid = a * BN(conv1x1 F) + (1 - a) * up(mid_deeper)``, out ``BN(conv3x3 mid)``.

    ``a`` is one number an image and channel: the first of a softmax over two, made of the mean over cells of the sum
    of both.
    """

    def __init__(self, width: int, middle: int, out: int, deepest: bool, **options: Any):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, middle, 1, bias=False, **options), batch_norm(middle, **options))
        self.leave = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False, **options),
                                   batch_norm(out, **options))
        self.squeeze, self.select = None, None
        if not deepest:
            length = max(middle // 16, 32)
            self.squeeze = nn.Sequential(nn.Conv2d(middle, length, 1, bias=False, **options),
                                         batch_norm(length, **options), nn.ReLU())
            self.select = nn.ModuleList(nn.Conv2d(length, middle, 1, **options) for _ in range(2))

    def forward(self, features: Tensor, deeper: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        mid = self.enter(features)
        if self.squeeze is not None and self.select is not None and deeper is not None:
            deeper = F.interpolate(deeper, mid.shape[2:], mode='nearest')
            # A batch norm cannot look at one value; with one image it is left out.
            steps = [step for step in self.squeeze if mid.shape[0] > 1 or not isinstance(step, BatchNorm)]
            summary = nn.Sequential(*steps)(F.adaptive_avg_pool2d(mid + deeper, 1))
            share = torch.stack([branch(summary) for branch in self.select]).softmax(dim=0)
            mid = share[0] * mid + share[1] * deeper
        return self.leave(mid), mid


class Mixer(nn.Module):
    """Tokens by attention and by gated convolution: ``a * MHSA(e) + c * conv(e) * sigmoid(conv(e)) + e``."""

    def __init__(self, width: int, heads: int, add: bool, **options: Any):
        super().__init__()
        self.heads, self.add = heads, add
        self.qkv = nn.Linear(width, 3 * width, bias=False, **options)
        self.proj = nn.Linear(width, width, **options)
        self.value, self.gate = (nn.Conv1d(width, width, 3, padding=1, **options) for _ in range(2))
        self.attention_weight, self.conv_weight = (nn.Parameter(torch.full((1, ), 0.5, **options)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(count, length, width)
        line = tokens.transpose(1, 2)
        gated = (self.value(line) * self.gate(line).sigmoid()).transpose(1, 2)
        mixed = self.attention_weight * self.proj(attended) + self.conv_weight * gated
        return mixed + tokens if self.add else mixed


class Assistant(nn.Module):
    """A patch embedding at the teacher's width: of the image (7x7, stride 4), or of a stage (3x3, stride 2)."""

    def __init__(self, width: int, out: int, first: bool, **options: Any):
        super().__init__()
        size, stride = (7, 4) if first else (3, 2)
        self.conv = nn.Conv2d(width, out, size, stride, size // 2, **options)
        self.norm = nn.LayerNorm(out, **options)

    def forward(self, source: Tensor) -> Tensor:
        return self.norm(tokens_of(self.conv(source)))


@MODELS.register_module()
class TransKDLoss(KDLoss):
    """Transformer distillation (Liu et al., TransKD: Transformer Knowledge Distillation for Efficient Semantic
    Segmentation, arXiv 2202.13393).

    ``feature_weight * sum_i H(fused_i, F_t_i) + sum_i w_i * mean((E_i - e_t_i)^2)`` over the stages i.  ``fused`` are
    the student's stages, each joined with the deeper ones by a :class:`SelectiveFusion`; ``H`` is
    :func:`hierarchical_distance`.  ``E_i`` is the student's patch embedding brought to the teacher's width:

    ==============  ===================================================================================================
    'linear'        a linear layer (TransKD-Base)
    'mixer'         at the last stage a :class:`Mixer` before it (TransKD-GL)
    'assistant'     ``u_i * linear + v_i * assistant_i``: an :class:`Assistant` embeds the student's stage before, the
                    image for the first stage (TransKD-EA). It needs ``KDBatch.images``.
    ==============  ===================================================================================================

    The taps give the L stage features first and then the L patch embeddings, as maps:
    ``at=['backbone', 'backbone.layers.*.0']`` for mmseg's SegFormer.

    As published, but that batch norms keep no running statistics, and that with one image the norm on the mean over
    cells is left out (the code has a second layer for that case).  The published mixer leaves its two factors
    uninitialised; here they start at 0.5, as do those of the assistants.

    Args:
        middle: channels of the fusion. Default 64 [C].
        feature_weight: factor of the feature term. Default 1 [C].
        embed_weights: w, one a stage. Default (0.1, 0.1, 0.5, 1) [C].
        embedding: 'linear', 'mixer' or 'assistant'. Default 'linear'.
        heads: attention heads of the mixer; they divide the student's last width. Default 4.
        add: the mixer adds its input. Default True [C].
        loss_weight: factor of everything, see :class:`KDLoss`. Default 1.

    A region multiplies the differences of the features and weights the cells of the embeddings.

    Returns:
        Reduction: all levels; mean over elements
        Parts: feature, embedding
        Features and embeddings; summed over levels.

    Raises:
        ValueError: an option has a bad value, the levels are not two of each stage, or ``embed_weights`` has another
            length than the stages.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='TransKDLoss', embed_weights=[1.0]))
        >>> student = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> loss(student, (torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8))) > 0
        tensor(True)
    """

    takes = (4, )
    joint = True
    same_channels = False

    def __init__(self, middle: int = 64, feature_weight: float = 1.0,
                 embed_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0), embedding: str = 'linear', heads: int = 4,
                 add: bool = True, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.embedding = one_of('TransKDLoss', 'embedding', embedding, EMBEDDINGS)
        self.middle, self.heads = whole('TransKDLoss', 'middle', middle), whole('TransKDLoss', 'heads', heads)
        self.add = boolean('TransKDLoss', 'add', add)
        self.embed_weights = entries('TransKDLoss', 'embed_weights', embed_weights, from_zero)
        self.factors = {'feature': from_zero('TransKDLoss', 'feature_weight', feature_weight)}
        self.fusions = nn.ModuleList()  # the deepest first
        self.linears = nn.ModuleList()
        self.mixer: Optional[nn.Module] = None
        self.assistants = nn.ModuleList()
        self.shares = nn.ParameterList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.fusions) > 0:
            return
        stages = len(student) // 2
        if len(student) % 2 or stages != len(self.embed_weights):
            raise ValueError(f'TransKDLoss: {len(student)} levels for {len(self.embed_weights)} embed_weights; it '
                             'needs the features of each stage and then their patch embeddings, '
                             "at=['backbone', 'backbone.layers.*.0'], and a weight for each stage")
        for s, t in zip(reversed(student[:stages]), reversed(teacher[:stages])):
            self.fusions.append(SelectiveFusion(s.shape[1], self.middle, t.shape[1], len(self.fusions) == 0,
                                                **parameter_options(t)))
        for index, (s, t) in enumerate(zip(student[stages:], teacher[stages:])):
            options = parameter_options(t)
            self.linears.append(nn.Linear(s.shape[1], t.shape[1], **options))
            if self.embedding == 'assistant':
                width = 3 if index == 0 else student[index - 1].shape[1]
                self.assistants.append(Assistant(width, t.shape[1], index == 0, **options))
        if self.embedding == 'assistant':
            self.shares.extend(nn.Parameter(torch.full((1, ), 0.5, **parameter_options(teacher[0])))
                               for _ in range(2 * stages))
        if self.embedding == 'mixer':
            width = student[-1].shape[1]
            if width % self.heads:
                raise ValueError(f'TransKDLoss: heads={self.heads} does not divide the {width} channels of the last '
                                 'patch embedding')
            self.mixer = Mixer(width, self.heads, self.add, **parameter_options(teacher[-1]))

    def fused(self, features: Features) -> List[Tensor]:
        """The student's stages at the teacher's widths, shallow to deep."""
        results: List[Tensor] = []
        deeper: Optional[Tensor] = None
        for fusion, tensor in zip(self.fusions, reversed(features)):
            out, deeper = fusion(tensor, deeper)
            results.append(out)
        return results[::-1]

    def embedded(self, embeddings: Features, features: Features, batch: KDBatch) -> List[Tensor]:
        """The student's patch embeddings (N, H*W, Ct) at the teacher's widths."""
        results = []
        for index, (tensor, linear) in enumerate(zip(embeddings, self.linears)):
            tokens = tokens_of(tensor)
            if self.mixer is not None and index == len(embeddings) - 1:
                tokens = self.mixer(tokens)
            tokens = linear(tokens)
            if self.embedding == 'assistant':
                helped = self.assistants[index](images(batch).to(tensor) if index == 0 else features[index - 1])
                if helped.shape != tokens.shape:
                    raise ValueError(f'TransKDLoss, stage {index}: the assistant makes {tuple(helped.shape)} tokens, '
                                     f"the embeddings have {tuple(tokens.shape)}; embedding='assistant' is for strides "
                                     '4, 2, 2, 2')
                tokens = self.shares[index] * tokens + self.shares[index + len(embeddings)] * helped
            results.append(tokens)
        return results

    def terms(self, student: Features, teacher: Features, batch: KDBatch,
              masks: Sequence[Optional[Tensor]]) -> Dict[str, List[Tensor]]:
        """The terms without their weights, a list over the stages each: feature and embedding."""
        stages = len(student) // 2
        found: Dict[str, List[Tensor]] = {'feature': [], 'embedding': []}
        for ours, theirs, mask in zip(self.fused(student[:stages]), teacher, masks):
            found['feature'].append(hierarchical_distance(ours, theirs, mask))
        tokens = self.embedded(student[stages:], student[:stages], batch)
        for ours, theirs, mask in zip(tokens, teacher[stages:], masks[stages:]):
            gap = (ours.transpose(1, 2).reshape(theirs.shape) - theirs).square()
            found['embedding'].append(weighted_mean(gap, mask))
        return found

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        terms = self.terms(student, teacher, batch, masks)
        # A weight for each stage is no factor of the whole: the embeddings are added with theirs.
        embedding = torch.stack([weight * term for weight, term in zip(self.embed_weights, terms['embedding'])]).sum()
        return {'feature': torch.stack(terms['feature']).sum(), 'embedding': embedding}
