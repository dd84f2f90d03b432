"""Seeded draws and the cells that a relation is made of."""

import hashlib
from typing import Optional, Tuple

import torch
from torch import Tensor

from kd_mm.ops.functional import apply_weights, resize


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU random generator that depends on ``numbers`` alone; the global one is not touched.

    Example:
        >>> first, second = (torch.rand(3, generator=seeded_generator(1, 2)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    digest = hashlib.blake2b(','.join(map(str, numbers)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'big'))


def draw(weights: Tensor, limit: Optional[int], generator: torch.Generator) -> Tensor:
    """Indices of at most ``limit`` entries, drawn without replacement; the larger the weight, the likelier.

    An entry of weight 0 is never drawn.  Where ``limit`` entries or fewer have a weight they all are taken, in order.

    Args:
        weights: (M,), not negative.
        limit: the most to draw; None for no bound.
        generator: a CPU generator; what it draws depends on M alone, so that weights of 1 everywhere are no weights.

    Example:
        >>> draw(torch.tensor([1., 0., 1.]), 5, seeded_generator(0))
        tensor([0, 2])
        >>> draw(torch.ones(100), 5, seeded_generator(0)).unique().numel()
        5
    """
    inside = weights.nonzero()[:, 0]
    if limit is None or inside.numel() <= limit:
        return inside
    # The largest log(u) / w are a weighted draw without replacement (Efraimidis and Spirakis).
    keys = torch.rand(weights.numel(), generator=generator).clamp(min=1e-30).log().to(weights.device) / weights.float()
    return keys.topk(limit).indices  # a weight of 0 made the key -inf


#: What the relations of a map (N, C, H, W) are between: see :func:`relation_rows`.
SAMPLES = ('cell', 'image')


def relation_rows(student: Tensor, teacher: Tensor, mask: Optional[Tensor], samples: str, limit: Optional[int],
                  generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """The samples whose relations a loss compares, one a row, the same ones on both sides.

    Args:
        student: rows (M, Cs), or maps (N, Cs, H, W).
        teacher: rows (M, Ct), or maps (N, Ct, H, W); of another H and W only with 'image'.
        mask: region weights (N, 1, H, W) of the teacher's size, or None. Cells are drawn by their weight, and never
            where it is 0. With 'image' it multiplies the maps, and images where it is 0 everywhere are left out.
        samples: what a map gives: 'cell' (each cell of each image is a sample of C numbers) or 'image' (each entry of
            the first dimension, image or RoI, is one sample of C*H*W numbers).
        limit: the most samples; more are drawn at random. None for all.
        generator: of the draw.

    Returns:
        Rows (M', Ds) and (M', Dt), M' at most ``limit``.

    Example:
        >>> x = torch.randn(2, 8, 4, 5)
        >>> relation_rows(x, x, None, 'cell', 30, seeded_generator(0))[0].shape
        torch.Size([30, 8])
        >>> relation_rows(x, x, None, 'image', 30, seeded_generator(0))[0].shape
        torch.Size([2, 160])
    """
    if samples == 'cell' and teacher.dim() == 4:
        count, _, height, width = teacher.shape
        weights = teacher.new_ones(count * height * width) if mask is None else mask.flatten()
        chosen = draw(weights, limit, generator)
        image, cell = chosen // (height * width), chosen % (height * width)
        return student.flatten(2)[image, :, cell], teacher.flatten(2)[image, :, cell]
    weights = teacher.new_ones(teacher.shape[0]) if mask is None else (mask > 0).flatten(1).any(dim=1).to(teacher.dtype)
    if mask is not None:
        student = apply_weights(student, resize(mask, (student.shape[2], student.shape[3])))
        teacher = apply_weights(teacher, mask)
    chosen = draw(weights, limit, generator)
    return student.flatten(1)[chosen], teacher.flatten(1)[chosen]


def keep_mask(uniform: Tensor, mask_ratio: float) -> Tensor:
    """1 where a uniform number in [0, 1) keeps its place, 0 where it is masked out (above ``1 - mask_ratio``).

    Example:
        >>> keep_mask(torch.tensor([0.1, 0.9]), 0.5)
        tensor([1., 0.])
    """
    return (uniform <= 1 - mask_ratio).to(uniform.dtype)
