"""Frequency distillation with semantic prompts."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.learner import Learner, load_learned, read_learned
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import whole
from kd_mm.ops.functional import apply_weights, dice_similarity, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def haar_step(features: Tensor) -> Tuple[Tensor, Tensor]:
    """One level of the orthonormal Haar wavelet transform; odd edges are filled up with zeros.

    For each block ``a b / c d`` of 2x2 cells: the mean part ``(a + b + c + d) / 2``, and the differences of rows
    ``(a + b - c - d) / 2``, of columns ``(a - b + c - d) / 2`` and of diagonals ``(a - b - c + d) / 2``.

    Args:
        features: (N, C, H, W).

    Returns:
        the low band (N, C, h, w) and the high bands (N, C, 3, h, w), h and w half of H and W, rounded up.

    Example:
        >>> low, high = haar_step(torch.ones(1, 1, 2, 2))
        >>> low.item(), high.abs().sum().item()
        (2.0, 0.0)
    """
    features = F.pad(features, (0, features.shape[3] % 2, 0, features.shape[2] % 2))
    a, b = features[:, :, 0::2, 0::2], features[:, :, 0::2, 1::2]
    c, d = features[:, :, 1::2, 0::2], features[:, :, 1::2, 1::2]
    high = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], dim=2)
    return (a + b + c + d) / 2, high / 2


def haar_join(low: Tensor, high: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of :func:`haar_step`, cut to ``size`` = (H, W).

    Example:
        >>> x = torch.randn(1, 2, 5, 4)
        >>> torch.allclose(haar_join(*haar_step(x), (5, 4)), x, atol=1e-5)
        True
    """
    rows, columns, diagonals = high.unbind(dim=2)
    corners = [low + rows + columns + diagonals, low + rows - columns - diagonals,
               low - rows + columns - diagonals, low - rows - columns + diagonals]
    # (N, 4C, h, w) with the four corners of a cell next to each other is what pixel_shuffle takes.
    return F.pixel_shuffle(torch.stack(corners, dim=2).flatten(1, 2) / 2, 2)[:, :, :size[0], :size[1]]


def haar_bands(features: Tensor, depth: int) -> List[Tensor]:
    """High bands of ``depth`` levels, from the finest: tensors (N, C, 3, h, w).

    Example:
        >>> [band.shape[-1] for band in haar_bands(torch.zeros(1, 1, 16, 16), 3)]
        [8, 4, 2]
    """
    bands = []
    for _ in range(depth):
        features, high = haar_step(features)
        bands.append(high)
    return bands


def prompt_masks(bands: Tensor, tokens: Tensor) -> Tensor:
    """``sigmoid(token . sum over the three bands)``: (N, T, h, w).

    Args:
        bands: the teacher's high bands, (N, C, 3, h, w).
        tokens: (T, C).

    Example:
        >>> prompt_masks(torch.zeros(1, 4, 3, 2, 2), torch.ones(2, 4)).unique()
        tensor([0.5000])
    """
    return torch.einsum('tc,nchw->nthw', tokens, bands.sum(dim=2)).sigmoid()


class PromptLearner(Learner):
    """First stage of FreeKD: tokens whose masks let the teacher's own losses stay low, and differ from each other.

    The teacher goes on with its feature put together again from the low band and the high bands, each multiplied by
    the mean of its masks; the loss of its own is the Dice coefficient between the masks, averaged over the
    decompositions.  Re-implementation from the description: the authors' code of this stage was not seen.

    Args:
        depth: number of decompositions.
        tokens: masks of a decomposition.
    """

    def __init__(self, depth: int, tokens: int):
        super().__init__()
        self.depth, self.count = depth, tokens
        self.tokens = nn.ParameterList()

    def prepare(self, teacher: Features) -> None:
        if len(self.tokens) == 0:
            for tensor in teacher:
                self.tokens.append(nn.Parameter(
                    0.01 * torch.randn(self.depth + 1, self.count, tensor.shape[1], **parameter_options(tensor))))

    def forward(self, level: int, teacher: Tensor) -> Tuple[Tensor, Tensor]:
        low, bands, sizes = teacher, [], []
        for _ in range(self.depth):
            sizes.append(low.shape[2:])
            low, high = haar_step(low)
            bands.append(high)
        overlaps = []
        for index in reversed(range(self.depth)):
            masks = prompt_masks(bands[index], self.tokens[level][index + 1])
            overlaps.append(dice_similarity(masks))
            low = haar_join(low, bands[index] * masks.mean(dim=1)[:, None, None], sizes[index])
        return low, torch.stack(overlaps).mean()


@MODELS.register_module()
class FreeKDLoss(KDLoss):
    """Frequency distillation (Zhang et al., FreeKD: Knowledge Distillation via Semantic Frequency Prompt, CVPR 2024).

    Both maps are taken apart by the Haar wavelets.  For each of ``depth`` decompositions, the mean over T tokens,
    channels, the three high bands and cells of ``m_t * |B_s - B_t|``, where ``m_t = sigmoid(token . B_t)`` says where
    in the teacher's band a token finds what it stands for; the decompositions are added.  Low bands are not compared
    (the paper describes it, in the authors' code it is commented out).

    The tokens are learned from the teacher alone, once, by ``python tools/learn_tokens.py CONFIG``, and are frozen
    here.  Without tokens every place of a band counts fully, and the loss is an L1 distance of the high frequencies.

    Args:
        depth: number of decompositions, at least 1. Default 3 [C].
        tokens: file that ``tools/learn_tokens.py`` wrote (or writes), a state dict, ``'random'`` (tests), or the
            tensors themselves: (depth + 1, T, C), one a level; row 0 is for the low band and unused, row 1 for the
            finest. Default None: no tokens.
        num_tokens: T, masks of a decomposition. Default 4 [C].
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    The authors' configs add a squared hint on the neck with the weight 5 and a smooth L1 on the box head's outputs with
    the weight 1 [C]; these are losses of their own here (:class:`FitNetLoss`).

    Tokens are kept in checkpoints and not trained with the student.  A region weights the difference of the maps before
    they are taken apart; the mean is over the whole map.

    Returns:
        Reduction: per level; mean over elements
        Summed over decompositions and levels.

    Raises:
        ValueError: an option has a bad value, there is no such file, or its tokens belong to another teacher.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(1, 4, 8, 8)
        >>> build(dict(type='FreeKDLoss'))(x + 3, x).item() < 1e-6
        True
    """

    takes = (4, )
    learned = 'tokens'

    def __init__(self, depth: int = 3, tokens: Any = None, num_tokens: int = 4, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.depth = whole('FreeKDLoss', 'depth', depth)
        self.num_tokens = whole('FreeKDLoss', 'num_tokens', num_tokens)
        self.given: Optional[Dict[str, Tensor]] = None
        self.prompts: Optional[PromptLearner] = None
        if tokens is None:
            return
        if isinstance(tokens, (list, tuple)):
            values = [torch.as_tensor(level) for level in tokens]
            for level, value in enumerate(values):
                if value.dim() != 3 or value.shape[0] != self.depth + 1:
                    raise ValueError(f'FreeKDLoss: tokens, level {level}: {tuple(value.shape)} is not (depth + 1, '
                                     f'tokens, channels) with depth={self.depth}')
            self.num_tokens = values[0].shape[1] if values else self.num_tokens
            self.given = {f'tokens.{level}': value for level, value in enumerate(values)}
        else:
            self.given = read_learned('FreeKDLoss', 'tokens', tokens)
        self.prompts = self.learner()

    def learner(self) -> PromptLearner:
        return PromptLearner(self.depth, self.num_tokens)

    def prepare(self, student: Features, teacher: Features) -> None:
        if self.prompts is not None and len(self.prompts.tokens) == 0:
            self.prompts.prepare(teacher)
            load_learned('FreeKDLoss', 'tokens', self.prompts, self.given)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        # The transform is linear: the difference is taken apart once.
        gaps = haar_bands(apply_weights(student - teacher, mask), self.depth)
        theirs = haar_bands(teacher, self.depth) if self.prompts is not None else []
        total = student.new_zeros(())
        for index, gap in enumerate(gaps):
            size = gap.abs().sum(dim=(1, 2))
            if self.prompts is not None:
                # Masks are not negative, so that |m B_s - m B_t| = m |B_s - B_t|: the mean over tokens comes first.
                size = prompt_masks(theirs[index], self.prompts.tokens[level][index + 1]).mean(dim=1) * size
            total = total + size.sum() / max(gap.numel(), 1)
        return total
