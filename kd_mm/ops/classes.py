"""Which logits of two models belong to the same class."""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

#: What data sets call the class of everything that is none of the others.
BACKGROUND = ('background', 'bg', '__background__', 'unlabeled', 'unlabelled', 'other', 'others', 'void')


def is_background(name: str) -> bool:
    """Whether a class is the background, by its name.

    Example:
        >>> is_background('Background'), is_background('road')
        (True, False)
    """
    return name.strip().lower() in BACKGROUND


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
