"""Which student level is compared with which teacher level, and which classes of the two."""

from typing import List, Optional, Sequence, Tuple

from torch import Tensor

from kd_mm.ops.functional import lift, resize_part
from kd_mm.types.batch import Features
from kd_mm.types.records import Seen

Pairs = List[Tuple[int, int]]


def pair_levels(student: Features, teacher: Features, seen: Sequence[Optional[Seen]] = (None, None)) -> Optional[Pairs]:
    """Indices of the levels that belong together: those of equal stride, where both sides are pyramids.

    A pyramid from stride 4 to 64 and one from 8 to 128 have four levels in common; by index, every level would meet
    the next larger one.  Levels without a partner are left out.  Maps of one size each (a single level, the stages of
    a dilated backbone) and rows of RoIs are paired by index, whatever their sizes: an adapter resizes them.

    Args:
        student, teacher: the levels for the same input.
        seen: how each side saw it.  A level then counts as large as the part of it that shows the batch; where that
            says nothing about strides, levels are paired by index.

    Returns:
        Pairs (student index, teacher index) in the student's order; None if the two do not go together.

    Example:
        >>> import torch
        >>> sizes = lambda *edges: tuple(torch.zeros(1, 8, edge, edge) for edge in edges)
        >>> pair_levels(sizes(32, 16, 8, 4), sizes(64, 32, 16, 8))
        [(0, 1), (1, 2), (2, 3)]
        >>> pair_levels(sizes(32), sizes(16))
        [(0, 0)]
    """
    by_index = [(index, index) for index in range(len(student))] if len(student) == len(teacher) else None
    if any(how is not None and not how.strides for how in seen):
        return by_index
    sizes = [[_size(tensor, how) for tensor in side] for side, how in zip((student, teacher), seen)]
    if sizes[0] == sizes[1] or any(None in side or len(set(side)) < len(side) for side in sizes):
        return by_index
    if len(student) == 1 and len(teacher) == 1:
        return by_index
    found = [(index, sizes[1].index(size)) for index, size in enumerate(sizes[0]) if size in sizes[1]]
    return found or by_index


def _size(tensor: Tensor, seen: Optional[Seen]) -> Optional[Tuple[int, ...]]:
    if tensor.dim() != 4:
        return None
    part = (1.0, 1.0) if seen is None else seen.part
    return tuple(round(edge * share) for edge, share in zip(tensor.shape[2:], part))


def at_grid(levels: Features, grids: Features, seen: Optional[Seen]) -> Features:
    """Maps of a model that saw the batch at another size, at the grid of the maps that they are compared with.

    Args:
        levels: L tensors; what is no map stays as it is.
        grids: L tensors of the other side.
        seen: how it saw the batch; None leaves everything as it is, as do equal sizes without padding.

    Example:
        >>> import torch
        >>> seen = Seen((64, 64), (64, 64), (128, 128))
        >>> level, = at_grid((torch.zeros(1, 8, 8, 8), ), (torch.zeros(1, 4, 16, 16), ), seen)
        >>> level.shape
        torch.Size([1, 8, 16, 16])
    """
    if seen is None or len(levels) != len(grids):
        return levels
    return tuple(
        level if level.dim() != 4 or grid.dim() != 4 or (level.shape[2:] == grid.shape[2:] and seen.part == (1.0, 1.0))
        else resize_part(lift(level), (grid.shape[2], grid.shape[3]), seen.part) for level, grid in zip(levels, grids))
