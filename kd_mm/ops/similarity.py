"""How alike two models are at a place, as one number: cheap, without gradient, and without drawing anything."""

from typing import Sequence, Tuple

import torch
from torch import Tensor

#: Cells of a batch whose features are compared: more say little more and cost their square.
CELLS = 256


def grid(maps: Tuple[Tensor, Tensor], most: int) -> Tuple[Tensor, Tensor]:
    """The channels at the same places of two maps.

    The places are those of one regular grid over each image, as fine as the smaller map and ``most`` allow.

    Args:
        maps: (N, C1, H1, W1) and (N, C2, H2, W2).
        most: number of places of all images together; at least one an image.

    Returns:
        (M, C1) and (M, C2); no rows where there are no images (the RoIs of a batch without objects).

    Example:
        >>> fine, coarse = torch.arange(16.).view(1, 1, 4, 4), torch.arange(4.).view(1, 1, 2, 2)
        >>> [rows.flatten().tolist() for rows in grid((fine, coarse), 4)]
        [[5.0, 7.0, 13.0, 15.0], [0.0, 1.0, 2.0, 3.0]]
    """
    height, width = (min(tensor.shape[axis] for tensor in maps) for axis in (2, 3))
    shrink = min((most / max(maps[0].shape[0] * height * width, 1))**0.5, 1.0)
    counts = [max(int(count * shrink), 1) for count in (height, width)]
    found = []
    for tensor in maps:
        for axis, count in zip((2, 3), counts):
            length = tensor.shape[axis]
            centres = (torch.arange(count, device=tensor.device) * 2 + 1) * length // (2 * count)
            tensor = tensor.index_select(axis, centres)
        found.append(tensor.permute(0, 2, 3, 1).flatten(0, 2))
    return found[0], found[1]


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear centered kernel alignment of two representations of the same M things (Kornblith et al., ICML 2019).

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with the Gram matrices K and L and the unbiased estimate of HSIC (Song
    et al., JMLR 2012), so that few things with many channels do not look alike by chance.  It knows no units: a
    rotation, a factor and a shift of either side change nothing, and the channels need not be the same.

    Args:
        first: (M, C1).
        second: (M, C2).

    Returns:
        A scalar: 1 for the same up to those, around 0 (and slightly below) for unrelated ones; NaN where M < 4 or one
        side is constant.

    Example:
        >>> features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(features, 3 * features.flip(1) + 5).item(), 4)
        1.0
    """
    count = first.shape[0]
    if count < 4:
        return first.new_full((), float('nan'), dtype=torch.float32)
    grams = []
    for rows in (first, second):
        rows = rows.detach().float()
        rows = rows - rows.mean(dim=0)
        rows = rows / rows.abs().max()  # a constant side becomes NaN, as it should
        gram = (rows @ rows.T).double()
        grams.append(gram.fill_diagonal_(0.0))

    def hsic(one: Tensor, two: Tensor) -> Tensor:
        crossed = (one.sum(dim=0) * two.sum(dim=0)).sum()
        return (one * two).sum() + one.sum() * two.sum() / ((count - 1) * (count - 2)) - 2 * crossed / (count - 2)

    alike = hsic(*grams)
    scale = hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])
    return (alike / scale.clamp(min=0).sqrt()).float()


def same_class(first: Tensor, second: Tensor) -> Tensor:
    """Share of rows whose largest entry is the same one.

    Args:
        first, second: (M, K) logits.

    Returns:
        A scalar from 0 to 1; NaN for no rows.

    Example:
        >>> same_class(torch.eye(4), torch.eye(4).roll(1, 0)).item(), same_class(torch.eye(4), torch.ones(4, 4)).item()
        (0.0, 0.25)
    """
    return (first.argmax(dim=1) == second.argmax(dim=1)).float().mean()


def same_best(first: Sequence[Tensor], second: Sequence[Tensor], most: int = 100) -> Tensor:
    """Share of each image's best numbers that are the best of the other side too.

    For scores of their own (a sigmoid each), where most rows are background and their largest class says nothing.

    Args:
        first, second: L tensors (N, ...), the scores of all classes at all places of each image.
        most: how many of all levels are the best. Default 100, the objects an image that COCO's evaluation looks at;
            at most a tenth of all.

    Returns:
        A scalar from 0 to 1.

    Example:
        >>> scores = torch.arange(100.).view(1, 100)
        >>> same_best([scores], [2 * scores]).item(), same_best([scores], [-scores]).item()
        (1.0, 0.0)
    """
    count = max(min(most, sum(level[0].numel() for level in first) // 10), 1)
    best = []
    for side in (first, second):
        values, places, before = [], [], 0
        for level in side:  # each by itself: all of them in one piece would be a copy of the logits
            flat = level.flatten(1)
            top = flat.topk(min(count, flat.shape[1]), dim=1)
            values.append(top.values.float())
            places.append(top.indices + before)
            before += flat.shape[1]
        order = torch.cat(values, dim=1).topk(count, dim=1).indices
        best.append(torch.cat(places, dim=1).gather(1, order))
    return (best[0][:, :, None] == best[1][:, None, :]).any(dim=2).float().mean()


def same_side(first: Tensor, second: Tensor) -> Tensor:
    """Share of numbers with the same sign: of logits of one class, that say the same.

    Example:
        >>> same_side(torch.tensor([1., -1.]), torch.tensor([2., 3.])).item()
        0.5
    """
    return ((first > 0) == (second > 0)).float().mean()
