"""Frequency distillation with semantic prompts."""

from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.functional import apply_weights, parameter_options, positive
from kd_mm.losses.base import KDLoss
from kd_mm.registry import MODELS
from kd_mm.types import Features, KDBatch


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


def dice_overlap(masks: Tensor) -> Tensor:
    """Mean Dice coefficient ``2 m_i . m_j / (|m_i|^2 + |m_j|^2)`` over pairs of different masks of an image.

    Args:
        masks: (N, T, h, w), in 0..1.

    Returns:
        A scalar in 0..1; 0 for a single mask.

    Example:
        >>> dice_overlap(torch.ones(1, 2, 2, 2)).item()
        1.0
    """
    flat = masks.flatten(2)
    dots = torch.einsum('nti,nsi->nts', flat, flat)
    squares = dots.diagonal(dim1=1, dim2=2)
    dice = 2 * dots / (squares[:, :, None] + squares[:, None, :]).clamp(min=1e-12)
    count = masks.shape[1]
    off = dice.sum() - dice.diagonal(dim1=1, dim2=2).sum()
    return off / max(masks.shape[0] * count * (count - 1), 1)


@MODELS.register_module()
class FreeKDLoss(KDLoss):
    """Frequency distillation (Zhang et al., FreeKD: Knowledge Distillation via Semantic Frequency Prompt, CVPR 2024).

    Both maps are taken apart by the Haar wavelets.  For each of ``depth`` decompositions, the mean over T tokens,
    channels, the three high bands and cells of ``m_t * |B_s - B_t|``, where ``m_t = sigmoid(token . B_t)`` says where
    in the teacher's band a token finds what it stands for; the decompositions are added.  Low bands are not compared
    (the paper describes it, the authors' code has it commented out).

    Tokens belong to one teacher and are learned before, on the teacher alone, by :meth:`token_loss`.  Without tokens
    every place of a band counts fully, and the loss is an L1 distance of the high frequencies.

    Args:
        depth: number of decompositions, at least 1. Default 3 [C].
        tokens: file of learned tokens: a list with one tensor (depth + 1, T, C) a level, or a dict with that list under
            ``tokens``, saved by ``torch.save``; or the tensors themselves. Row 0 is for the low band and unused, row 1
            for the finest. Default None: no tokens.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    The authors' configs add a squared hint on the neck with the weight 5 and a smooth L1 on the box head's outputs with
    the weight 1 [C]; these are losses of their own here (:class:`FitNetLoss`).

    Tokens are buffers: they are kept in checkpoints and not trained with the student.  A region weighs the difference
    of the maps before they are taken apart; the mean is over the whole map.

    Returns:
        A scalar per level, per element; summed over levels.

    Raises:
        ValueError: ``depth`` is not positive, or the tokens do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(1, 4, 8, 8)
        >>> build(dict(type='FreeKDLoss'))(x + 3, x).item() < 1e-6
        True
    """

    def __init__(self, depth: int = 3, tokens: Union[None, str, Path, Sequence[Any]] = None, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.depth = int(positive('FreeKDLoss', 'depth', depth))
        self.levels = 0
        if tokens is not None:
            self.set_tokens(tokens)

    def set_tokens(self, tokens: Union[str, Path, Sequence[Any]]) -> None:
        """Use learned tokens, a file or one tensor a level.

        Raises:
            ValueError: a tensor is not (depth + 1, T, C).
        """
        where: str = 'tokens'
        found: Any = tokens
        if isinstance(tokens, (str, Path)):
            where, found = str(tokens), torch.load(tokens, map_location='cpu', weights_only=True)
            found = found['tokens'] if isinstance(found, dict) else found
        values = [torch.as_tensor(level) for level in found]
        for level, value in enumerate(values):
            if value.dim() != 3 or value.shape[0] != self.depth + 1:
                raise ValueError(f'FreeKDLoss: {where}, level {level}: {tuple(value.shape)} is not (depth + 1, tokens, '
                                 f'channels) with depth={self.depth}')
            self.register_buffer(f'tokens_{level}', value.detach().clone())
        self.levels = len(values)

    def prepare(self, student: Features, teacher: Features) -> None:
        if self.levels == 0:
            return
        if self.levels != len(teacher):
            raise ValueError(f'FreeKDLoss: tokens for {self.levels} levels, but there are {len(teacher)}')
        for level, tensor in enumerate(teacher):
            tokens = self.tokens(level)
            if tokens.shape[2] != tensor.shape[1]:
                raise ValueError(f'FreeKDLoss, level {level}: tokens of {tokens.shape[2]} channels for a teacher of '
                                 f'{tensor.shape[1]}: they were learned with another teacher or tap')
            self.register_buffer(f'tokens_{level}', tokens.to(**parameter_options(tensor)))

    def tokens(self, level: int) -> Tensor:
        """Tokens of one level, (depth + 1, T, C)."""
        return getattr(self, f'tokens_{level}')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        # The transform is linear: the difference is taken apart once.
        gaps = haar_bands(apply_weights(student - teacher, mask), self.depth)
        theirs = haar_bands(teacher, self.depth) if self.levels else []
        total = student.new_zeros(())
        for index, gap in enumerate(gaps):
            size = gap.abs().sum(dim=(1, 2))
            if self.levels:
                # Masks are not negative, so that |m B_s - m B_t| = m |B_s - B_t|: the mean over tokens comes first.
                size = prompt_masks(theirs[index], self.tokens(level)[index + 1]).mean(dim=1) * size
            total = total + size.sum() / max(gap.numel(), 1)
        return total

    @staticmethod
    def new_tokens(teacher: Features, count: int = 4, depth: int = 3, std: float = 1.0) -> nn.ParameterList:
        """Random tokens to be learned, one (depth + 1, count, C) a level.

        Example:
            >>> [tuple(level.shape) for level in FreeKDLoss.new_tokens((torch.zeros(1, 6, 8, 8), ))]
            [(4, 4, 6)]
        """
        return nn.ParameterList([
            nn.Parameter(torch.randn(depth + 1, count, tensor.shape[1], **parameter_options(tensor)) * std)
            for tensor in teacher])

    @staticmethod
    def token_loss(tokens: Sequence[Tensor], teacher: Features) -> Tensor:
        """Overlap of the masks, which tokens minimise so that they come to stand for different things.

        The mean over levels and decompositions of :func:`dice_overlap`. The authors learn tokens together with the
        frozen teacher's own task loss; re-implementation from the description, their code of it was not seen.

        Args:
            tokens: one (depth + 1, T, C) a level.
            teacher: L features.

        Example:
            >>> x = (torch.randn(1, 6, 8, 8), )
            >>> bool(0 <= FreeKDLoss.token_loss(FreeKDLoss.new_tokens(x), x) <= 1)
            True
        """
        losses = [dice_overlap(prompt_masks(bands, level[index + 1]))
                  for level, features in zip(tokens, teacher)
                  for index, bands in enumerate(haar_bands(features, level.shape[0] - 1))]
        return torch.stack(losses).mean()
