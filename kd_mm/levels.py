"""Which student level meets which teacher level, and which of their classes."""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.types import Features

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


def common_classes(student: Sequence[str], teacher: Sequence[str],
                   wanted: Optional[Sequence[str]] = None) -> Tuple[List[int], List[int]]:
    """Indices of the classes that both models know, by name.

    Args:
        student, teacher: class names of the two models.
        wanted: use these only; None for all that are common, in the student's order.

    Raises:
        ValueError: a wanted class is missing on a side, or there is no common one.

    Example:
        >>> common_classes(['car', 'person'], ['person', 'bus', 'car'])
        ([0, 1], [2, 0])
    """
    names = [name for name in student if name in teacher] if wanted is None else list(wanted)
    for side, known in (('student', student), ('teacher', teacher)):
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f'classes={names}: the {side} does not know {", ".join(missing)}; it has '
                             f'{", ".join(known)}')
    if not names:
        raise ValueError(f'student and teacher have no class name in common. Student: {", ".join(student)}. '
                         f'Teacher: {", ".join(teacher)}')
    return [list(student).index(name) for name in names], [list(teacher).index(name) for name in names]


def take_classes(logits: Tensor, count: int, indices: Sequence[int]) -> Tensor:
    """The logits of some classes.

    Args:
        logits: (N, A * count, H, W) with A anchors, the class varying fastest; or rows (M, count), or (M, count + 1)
            with the background last, which is kept.
        count: classes of the model.
        indices: which of them, in which order.

    Raises:
        ValueError: the channels are not those of ``count`` classes.

    Example:
        >>> take_classes(torch.arange(6.).view(1, 6, 1, 1), 3, [2, 0]).flatten().tolist()
        [2.0, 0.0, 5.0, 3.0]
    """
    channels = logits.shape[1]
    chosen = torch.as_tensor(list(indices), device=logits.device)
    if channels == count + 1 and logits.dim() == 2:
        return logits[:, torch.cat([chosen, chosen.new_tensor([count])])]
    if channels % count:
        raise ValueError(f'{channels} logits are not those of {count} classes, alone or once an anchor')
    anchors = channels // count
    return logits.unflatten(1, (anchors, count)).index_select(2, chosen).flatten(1, 2)
