"""Which student level is compared with which teacher level, and which classes of the two."""

from typing import List, Optional, Tuple

from kd_mm.types.batch import Features

Pairs = List[Tuple[int, int]]


def pair_levels(student: Features, teacher: Features) -> Optional[Pairs]:
    """Indices of the levels that belong together: those of equal stride, where both sides are pyramids.

    A pyramid from stride 4 to 64 and one from 8 to 128 have four levels in common; by index, every level would meet
    the next larger one.  Levels without a partner are left out.  Maps of one size each (a single level, the stages of
    a dilated backbone) and rows of RoIs are paired by index, whatever their sizes: an adapter resizes them.

    Args:
        student, teacher: the levels for the same input.

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
    sizes = [[tuple(tensor.shape[2:]) if tensor.dim() == 4 else None for tensor in side]
             for side in (student, teacher)]
    if sizes[0] == sizes[1] or any(None in side or len(set(side)) < len(side) for side in sizes):
        return by_index
    if len(student) == 1 and len(teacher) == 1:
        return by_index
    found = [(index, sizes[1].index(size)) for index, size in enumerate(sizes[0]) if size in sizes[1]]
    return found or by_index
