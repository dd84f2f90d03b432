"""Which classes of two models are the same: by name, by spelling, by number, or as a config says.

One mechanism for all that needs it: logits of a loss (``classes=`` of the loss or of its teacher), and labels that a
teacher gives (``classes=`` of :class:`kd_mm.teachers.labels.pseudo.PseudoLabels`).
"""

import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

#: ``classes=`` for every class that both models know by name.
COMMON = 'common'
#: ``classes=`` for class i of the one is class i of the other, whatever their names.
POSITIONAL = 'positional'
#: One class of a model, or several that are one of the other's; none where it does not know it.
Chosen = Union[int, Tuple[int, ...]]
#: (number of classes, the indices to compare) of the student and of the teacher.
ClassPair = Tuple[Tuple[int, List[int]], Tuple[int, List[Chosen]]]

#: What data sets call the class of everything that is none of the others.
BACKGROUND = ('background', 'bg', '__background__', 'unlabeled', 'unlabelled', 'other', 'others', 'void')
#: What COCO calls a class, and what VOC and others do. Case, spaces, ``-`` and ``_`` make no difference anyway.
SYNONYMS: Dict[str, Tuple[str, ...]] = {
    'airplane': ('aeroplane', ),
    'couch': ('sofa', ),
    'dining table': ('diningtable', ),
    'motorcycle': ('motorbike', ),
    'potted plant': ('pottedplant', ),
    'tv': ('tvmonitor', 'tv monitor'),
}


def is_background(name: str) -> bool:
    """Whether a class is the background, by its name.

    Example:
        >>> is_background('Background'), is_background('road')
        (True, False)
    """
    return name.strip().lower() in BACKGROUND


def _plain(name: str) -> str:
    return re.sub(r'[\s_-]+', '', name.lower())


_SPELLING = {_plain(other): _plain(name) for name, others in SYNONYMS.items() for other in others}


def spelling(name: str) -> str:
    """A class name without what only its spelling tells: the same for all names of :data:`SYNONYMS`.

    Example:
        >>> spelling('TV-Monitor') == spelling('tv'), spelling('Potted_Plant')
        (True, 'pottedplant')
    """
    plain = _plain(name)
    return _SPELLING.get(plain, plain)


def find_class(name: str, names: Sequence[str]) -> Optional[int]:
    """Index of a class: the one of that name, else the only one that is spelled otherwise; None where there is none.

    Example:
        >>> find_class('sofa', ['tv', 'couch']), find_class('Car', ['car', 'CAR'])
        (1, None)
    """
    if name in names:
        return list(names).index(name)
    found = [index for index, other in enumerate(names) if spelling(other) == spelling(name)]
    return found[0] if len(found) == 1 else None


def common_classes(student: Sequence[str], teacher: Sequence[str],
                   wanted: Optional[Sequence[str]] = None) -> Tuple[List[int], List[int]]:
    """Indices of the classes that both models know, by name (:func:`find_class`).

    Args:
        student, teacher: class names of the two models.
        wanted: use these only; None for all that are common, in the student's order.

    Raises:
        ValueError: a wanted class is missing on a side, or there is no common one.

    Example:
        >>> common_classes(['car', 'motorcycle'], ['motorbike', 'bus', 'car'])
        ([0, 1], [2, 0])
    """
    if wanted is None:
        pairs = [(index, find_class(name, teacher)) for index, name in enumerate(student)]
        # A name that stands for two of the student's would teach both.
        pairs = [pair for pair in pairs if pair[1] is not None and find_class(teacher[pair[1]], student) == pair[0]]
    else:
        names = list(wanted)
        for side, known in (('student', student), ('teacher', teacher)):
            missing = [name for name in names if find_class(name, known) is None]
            if missing:
                raise ValueError(f'classes={names}: the {side} does not know {", ".join(missing)}; it has '
                                 f'{", ".join(known)}')
        pairs = [(find_class(name, student), find_class(name, teacher)) for name in names]  # type: ignore[misc]
    if not pairs:
        raise ValueError(f'student and teacher have no class name in common. Student: {", ".join(student)}. '
                         f'Teacher: {", ".join(teacher)}')
    return [own for own, _ in pairs], [theirs for _, theirs in pairs]  # type: ignore[misc]


def check_classes(owner: str, value: Any) -> Any:
    """``value`` if it is a form of ``classes=``: see :func:`map_classes`.

    Raises:
        ValueError: it is none.

    Example:
        >>> check_classes('loss_kd', {'sofa': 'couch'})
        {'sofa': 'couch'}
    """
    if isinstance(value, str):
        good = value in (COMMON, POSITIONAL)
    elif isinstance(value, Mapping):
        good = bool(value) and all(_is_class(part) for pair in value.items() for part in pair)
    else:
        good = isinstance(value, Sequence) and bool(value) and all(isinstance(name, str) for name in value)
    if not good:
        raise ValueError(f'{owner}: classes={value!r} must be {COMMON!r}, {POSITIONAL!r}, a list of names that both '
                         'models know, or a dict from classes of the teacher (names or indices) to those of the '
                         'student')
    return value


def _is_class(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def by_number(classes: Any) -> bool:
    """Whether a form of ``classes=`` needs no class names.

    Example:
        >>> by_number('positional'), by_number({0: 2}), by_number({0: 'car'})
        (True, True, False)
    """
    return classes == POSITIONAL or (isinstance(classes, Mapping) and not any(
        isinstance(part, str) for pair in classes.items() for part in pair))


def map_classes(classes: Any, student: Optional[Sequence[str]], teacher: Optional[Sequence[str]],
                counts: Tuple[Optional[int], Optional[int]] = (None, None)) -> ClassPair:
    """Which classes of a teacher are which of a student.

    Args:
        classes: ``'common'``: all that both know by name. A list of names: these alone. ``'positional'``: class i is
            class i, as far as both have one. A dict: class of the teacher -> class of the student, each as a name or an
            index; several of the teacher's may be one of the student's.
        student, teacher: class names, None where they are not known; a dict of indices and ``'positional'`` need none.
        counts: numbers of classes of student and teacher where the names are not known; with indices of the teacher
            its own is not needed.

    Raises:
        ValueError: a class is missing on a side, names are needed and not known, or nothing is left.

    Example:
        >>> map_classes(dict(car='vehicle', bus='vehicle'), ['person', 'vehicle'], ['bus', 'car'])
        ((2, [1]), (2, [(0, 1)]))
        >>> map_classes('positional', ['a', 'b'], None, (None, 3))
        ((2, [0, 1]), (3, [0, 1]))
    """
    sizes = [len(names) if names else count for names, count in zip((student, teacher), counts)]
    if sizes[1] is None and isinstance(classes, Mapping) and all(isinstance(key, int) for key in classes):
        sizes[1] = max(classes) + 1  # what lies beyond is left out anyway
    for side, names, size in zip(('student', 'teacher'), (student, teacher), sizes):
        if size is None or (not names and not by_number(classes) and not isinstance(classes, Mapping)):
            unknown = 'its class names are not known' if size is not None else 'they are not known'
            forms = 'a dict of indices, {class of the teacher: class of the student}'
            raise ValueError(f'classes={classes!r} needs the classes of the {side}, and {unknown}. Give '
                             + (forms if size is None else f'{POSITIONAL!r} or {forms}'))
    ours, theirs = int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]
    if classes == POSITIONAL:
        shared = list(range(min(ours, theirs)))
        return (ours, shared), (theirs, list(shared))
    if not isinstance(classes, Mapping):
        own, other = common_classes(student or (), teacher or (), None if classes == COMMON else classes)
        return (ours, own), (theirs, list(other))
    groups: Dict[int, List[int]] = {}
    for key, value in classes.items():
        target = _index_of('student', value, student, ours, classes, teacher)
        groups.setdefault(target, []).append(_index_of('teacher', key, teacher, theirs, classes, student))
    taken = [index for group in groups.values() for index in group]
    twice = next((index for index in taken if taken.count(index) > 1), None)
    if twice is not None:
        raise ValueError(f'classes={dict(classes)!r} names class {twice} of the teacher twice')
    own = sorted(groups)
    return (ours, own), (theirs, [_chosen(sorted(groups[index])) for index in own])


def _chosen(group: Sequence[int]) -> Chosen:
    return group[0] if len(group) == 1 else tuple(group)


def _index_of(side: str, value: Any, names: Optional[Sequence[str]], count: int, classes: Any,
              others: Optional[Sequence[str]]) -> int:
    """Index of a class that a dict names.

    Raises:
        ValueError: the model has none of that name or number.
    """
    index = (find_class(value, names) if names else None) if isinstance(value, str) else value
    if index is not None and index < count:
        return int(index)
    known = ", ".join(names) if names else f'class names that are not known, and {count} classes'
    hint = ''
    if isinstance(value, str) and others and find_class(value, others) is not None:
        hint = ' It is turned round: keys are classes of the teacher, values those of the student'
    raise ValueError(f'classes={dict(classes)!r}: the {side} does not know {value!r}; it has {known}.{hint}')


def flat(chosen: Sequence[Chosen]) -> List[int]:
    """The indices of single classes and of groups.

    Example:
        >>> flat([3, (0, 1), ()])
        [3, 0, 1]
    """
    return [index for entry in chosen for index in (entry if isinstance(entry, tuple) else (entry, ))]


def lookup(pair: ClassPair) -> Tensor:
    """(K,) for the K classes of the teacher: the student's class, -1 for none.

    Example:
        >>> lookup(((3, [0, 2]), (4, [3, (0, 1)]))).tolist()
        [2, 2, -1, 0]
    """
    (_, own), (count, theirs) = pair
    found = torch.full((count, ), -1)
    for index, chosen in zip(own, theirs):
        found[list(chosen) if isinstance(chosen, tuple) else [chosen]] = index
    return found


def united(pairs: Sequence[ClassPair]) -> List[ClassPair]:
    """The maps of several teachers for all classes of the student that any of them knows; ``()`` for the unknown.

    Example:
        >>> united([((3, [0]), (1, [0])), ((3, [0, 2]), (2, [1, 0]))])
        [((3, [0, 2]), (1, [0, ()])), ((3, [0, 2]), (2, [1, 0]))]
    """
    every = sorted({index for (_, own), _ in pairs for index in own})
    found: List[ClassPair] = []
    for (ours, own), (count, theirs) in pairs:
        known: Dict[int, Chosen] = dict(zip(own, theirs))
        found.append(((ours, list(every)), (count, [known.get(index, ()) for index in every])))
    return found


def take_classes(logits: Tensor, count: int, indices: Sequence[Chosen]) -> Tensor:
    """The logits of some classes.

    Several classes that are one of the other model's have the log-sum-exp of their logits: their probabilities add up,
    by a softmax exactly, by sigmoids as odds (classes that exclude each other).

    Args:
        logits: (N, A * count, H, W) with A anchors, the class varying fastest; or rows (M, count), or (M, count + 1)
            with the background last, which is kept.
        count: classes of the model.
        indices: which of them, in which order; NaN for ``()``.

    Raises:
        ValueError: the channels are not those of ``count`` classes.

    Example:
        >>> take_classes(torch.arange(6.).view(1, 6, 1, 1), 3, [2, 0]).flatten().tolist()
        [2.0, 0.0, 5.0, 3.0]
    """
    channels = logits.shape[1]
    if channels == count + 1 and logits.dim() == 2:
        return _take(logits, 1, [*indices, count])
    if channels % count:
        raise ValueError(f'{channels} logits are not those of {count} classes, alone or once an anchor')
    anchors = channels // count
    return _take(logits.unflatten(1, (anchors, count)), 2, indices).flatten(1, 2)


def _take(logits: Tensor, dim: int, indices: Sequence[Chosen]) -> Tensor:
    if all(isinstance(index, int) for index in indices):
        return logits.index_select(dim, torch.as_tensor(list(indices), device=logits.device))
    parts = []
    for index in indices:
        group = index if isinstance(index, tuple) else (index, )
        part = logits.index_select(dim, torch.as_tensor(list(group) or [0], device=logits.device))
        parts.append(part.logsumexp(dim, keepdim=True) if len(group) > 1 else part if group
                     else torch.full_like(part, float('nan')))
    return torch.cat(parts, dim)
