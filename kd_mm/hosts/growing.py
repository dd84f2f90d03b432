"""Give a head with more classes the weights of one with fewer: which rows of its parameters belong to which class.

A classifier of K classes has K rows, or as many for each anchor, with or without a background; a box regressor may have
four for each class.  Which parameters these are is said by the table of the host, by the name of the head's class
(``logits`` and ``class_rows`` of :class:`kd_mm.hosts.table.Host`); all others must be equal on both sides.
"""

import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.places import class_branches
from kd_mm.hosts.table import line
from kd_mm.ops.classes import common_classes, is_background

COPY, GROW, FROM_BACKGROUND = 'copy', 'grow', 'grow_from_background'
#: How a module may inherit: as it is; by class name, the new rows as they are initialised; or from the background's.
WAYS = (COPY, GROW, FROM_BACKGROUND)
#: Class names of the student and of the teacher, None where they are not known.
Names = Tuple[Optional[Sequence[str]], Optional[Sequence[str]]]


@dataclass(frozen=True)
class Branch:
    """How the rows of a branch belong to classes: ``anchors`` times (``before``, K times ``block``, the rest).

    Attributes:
        block: rows of one class, one after the other; 0 for as many as come out.
        before: rows before those of the classes.
        anchored: whether there may be several anchors; their number is that of the rows over those of one.
        unless: attribute of the head that says that the branch knows no classes.
        scores: whether a softmax over the rows (or a sigmoid of each) says which class it is.
    """

    block: int = 1
    before: int = 0
    anchored: bool = False
    unless: str = ''
    scores: bool = False


#: A row for each class, which says its score.
SCORES = Branch(scores=True)
#: The first stage of a detector, which tells objects from the rest and knows no classes.
_NO_CLASSES = ('RPNHead', )


@dataclass
class Growth:
    """What a module of the student takes over from the same module of its teacher.

    Attributes:
        problems: why it cannot be done, as sentences.
        copied: names of the parameters that are equal on both sides.
        rows: parameter -> rows of the student, rows of the teacher.
        spread: parameter of scores -> for each anchor, the row of the teacher's background and those rows of the
            student that start from it: the background's and the new classes'.
        notes: what is done, as sentences.
    """

    problems: List[str] = field(default_factory=list)
    copied: List[str] = field(default_factory=list)
    rows: Dict[str, Tuple[Tensor, Tensor]] = field(default_factory=dict)
    spread: Dict[str, List[Tuple[int, List[int]]]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    def apply(self, student: nn.Module, teacher: nn.Module) -> None:
        """Write the teacher's weights into the student's module."""
        own, other = student.state_dict(), teacher.state_dict()
        with torch.no_grad():
            for name in self.copied:
                own[name].copy_(other[name])
            for name, (mine, theirs) in self.rows.items():
                own[name][mine.to(own[name].device)] = other[name][theirs.to(other[name].device)].to(own[name])
            for name, groups in self.spread.items():
                for background, rows in groups:
                    value = other[name][background].to(own[name])
                    own[name][rows] = value - math.log(len(rows)) if name.endswith('bias') else value


def grow_head(path: str, student: nn.Module, teacher: nn.Module, names: Names, way: str = GROW) -> Growth:
    """Find out which rows of a head go where, by the names of the classes.

    The rows of a class that both know are copied; those of the student's other classes stay as they are initialised.
    With ``'grow_from_background'`` these start as the background (MiB): its weights, and its bias less
    ``log(1 + new)``, for the background too, so that together they are as likely as the background was.

    Args:
        path: of the module, for messages.
        student, teacher: the module in both models.
        names: class names of the student and of the teacher.
        way: ``'grow'`` or ``'grow_from_background'``.

    Returns:
        What to do, or the problems.

    Example:
        >>> class BaseDecodeHead(nn.Module):  # in a project of one's own, found by its name
        ...     def __init__(self, count):
        ...         super().__init__()
        ...         self.num_classes, self.conv_seg = count, nn.Conv2d(8, count, 1)
        >>> student, teacher = BaseDecodeHead(3), BaseDecodeHead(2)
        >>> found = grow_head('decode_head', student, teacher, (['sky', 'car', 'road'], ['road', 'car']))
        >>> [rows.tolist() for rows in found.rows['conv_seg.bias']]
        [[1, 2], [1, 0]]
    """
    growth = Growth()
    if names[0] is None or names[1] is None:
        side = 'student' if names[0] is None else 'teacher'
        growth.problems.append(
            f"inherit: {path!r} grows by the names of the classes, and those of the {side} are not known. Give them in "
            "metainfo=dict(classes=...) of its training data" + (
                ', or a checkpoint that was written by a Runner' if side == 'teacher' else ''))
        return growth
    try:
        pairs = common_classes(names[0], names[1])
    except ValueError as error:
        growth.problems.append(f'inherit: {path!r} cannot be grown: {error}')
        return growth
    own, other = student.state_dict(), teacher.state_dict()
    theirs = dict(teacher.named_modules(remove_duplicate=False))
    branches = {place: (head, theirs.get(name), branch) for place, name, head, branch in _branches(student)}
    reasons = dict(_refusals(student))
    for name in dict.fromkeys([*own, *other]):
        sizes = [tuple(state[name].shape) if name in state else 'missing' for state in (own, other)]
        found = branches.get(name.rpartition('.')[0])
        fault = None
        if found is not None and name in own and name in other:
            fault = _rows(growth, name, own[name], other[name], found, names, pairs, way)
        elif sizes[0] == sizes[1]:
            growth.copied.append(name)
        elif not _of_loss(name):
            fault = next((reason for start, reason in reasons.items() if not start or name.startswith(f'{start}.')),
                         'it is not known to have rows for classes, so it must be equal in both')
        if fault is not None:
            growth.problems.append(f'inherit: {path!r} cannot be grown: {name}, student {sizes[0]}, teacher '
                                   f'{sizes[1]}: {fault}')
            break
    if not growth.problems and not growth.rows:
        why = next(iter(reasons.values()), 'no parameter in it is known to have rows for classes')
        growth.problems.append(f'inherit: {path!r} ({type(student).__name__}) cannot be grown: {why}. Write '
                               f'{COPY!r}, or leave it out')
    if not growth.problems and way == FROM_BACKGROUND and not any(growth.spread.values()):
        growth.problems.append(
            f'inherit: {path!r} ({type(student).__name__}) has no row for the background that both know, which '
            f'{FROM_BACKGROUND!r} starts new classes from: neither a class of that name nor a last row of a softmax. '
            f'Write {GROW!r}')
    growth.notes.append(_note(path, names, pairs, way))
    return growth


def _note(path: str, names: Any, pairs: Any, way: str) -> str:
    known = [names[0][index] for index in pairs[0]]
    new = [name for index, name in enumerate(names[0]) if index not in pairs[0]]
    lost = [name for index, name in enumerate(names[1]) if index not in pairs[1]]
    start = 'from the background' if way == FROM_BACKGROUND else 'as initialised'
    return (f'{path!r} takes the rows of {_some(known)} from the teacher; '
            + (f'new: {_some(new)}, which start {start}' if new else 'no class is new')
            + (f'; without a place: {_some(lost)} of the teacher' if lost else ''))


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:8]) + (f', ... ({len(names)} classes)' if len(names) > 8 else '')


def _branches(module: nn.Module) -> Iterator[Tuple[str, str, Any, Branch]]:
    """Of each layer with rows for classes: its path, that of its head, the head, and how the rows lie."""
    for name, head in module.named_modules(remove_duplicate=False):
        kinds = {cls.__name__ for cls in type(head).__mro__}
        if not isinstance(getattr(head, 'num_classes', None), int) or kinds & {*_NO_CLASSES} or _nearest(head, 'fixed'):
            continue
        lines = {pattern: Branch(anchored=True, scores=True) for pattern in class_branches(head)}
        lines.update(_nearest(head, 'class_rows') or {})
        for pattern, branch in lines.items():
            if branch.unless and getattr(head, branch.unless, False):
                continue
            for place, layer in head.named_modules(remove_duplicate=False):
                if place.count('.') == pattern.count('.') and fnmatch.fnmatchcase(place, pattern):
                    # Of a sequence the last layer says the classes.
                    inner = [below for below, part in layer.named_modules() if part._parameters]
                    if inner:
                        yield '.'.join(filter(None, (name, place, inner[-1]))), name, head, branch


def _refusals(module: nn.Module) -> Iterator[Tuple[str, str]]:
    for name, head in module.named_modules():
        reason = _nearest(head, 'fixed')
        if reason is not None:
            yield name, f'{type(head).__name__} cannot be grown, for {reason}'


def _nearest(head: nn.Module, column: str) -> Any:
    """What the table of hosts says of the closest class of a head; None for nothing."""
    return next((found for cls in type(head).__mro__ for found in [line(cls, column)] if found is not None), None)


def _of_loss(name: str) -> bool:
    """Statistics that a loss keeps of its own classes (Seesaw) start anew."""
    return any(part.startswith('loss_') for part in name.split('.'))


def _rows(growth: Growth, name: str, own: Tensor, other: Tensor, found: Tuple[Any, Any, Branch], names: Any, pairs: Any,
          way: str) -> Optional[str]:
    """Note which rows of one parameter go where; why not, if they cannot."""
    head, teacher, branch = found
    if own.shape[1:] != other.shape[1:]:
        return 'the rows themselves are of another size'
    if branch.unless and getattr(teacher, branch.unless, False):
        return f'the teacher has {branch.unless}=True and the student has not'
    sides = []
    for side, module, tensor, known in (('student', head, own, names[0]), ('teacher', teacher, other, names[1])):
        count = getattr(module, 'num_classes', None)
        if count != len(known):
            return f'the {side} has {count} classes in this head and {len(known)} class names ({_some(known)})'
        layout = _layout(module, tensor.shape[0], count, branch)
        if layout is None:
            return f'its {tensor.shape[0]} rows in the {side} are not those of {count} classes'
        sides.append(layout)
    (mine, rest), (theirs, others) = sides
    if mine.shape[1] != theirs.shape[1] or len(rest) != len(others):
        return 'the rows are not in the same order: the anchors a cell or the background differ'
    growth.rows[name] = (torch.cat([mine[pairs[0]].flatten(), rest]), torch.cat([theirs[pairs[1]].flatten(), others]))
    if way == FROM_BACKGROUND and branch.scores:
        growth.spread[name] = list(_spread(head, (mine, rest), (theirs, others), names, pairs))
    return None


def _spread(head: Any, own: Tuple[Tensor, Tensor], other: Tuple[Tensor, Tensor], names: Any,
            pairs: Any) -> Iterator[Tuple[int, List[int]]]:
    """For each anchor the background's row in the teacher, and the rows of the student that start from it."""
    new = [index for index in range(len(names[0])) if index not in pairs[0]]
    named = [(mine, theirs) for mine, theirs in zip(*pairs) if is_background(names[0][mine])]
    for anchor in range(own[0].shape[1]):
        rows = own[0][new, anchor].tolist()
        if len(own[1]) == own[0].shape[1]:  # the last row of a softmax
            yield int(other[1][anchor]), [int(own[1][anchor]), *rows]
        elif named and hasattr(head, 'loss_decode'):  # a segmenter, whose classes are a softmax
            yield int(other[0][named[0][1], anchor]), [int(own[0][named[0][0], anchor]), *rows]


def _layout(head: Any, rows: int, classes: int, branch: Branch) -> Optional[Tuple[Tensor, Tensor]]:
    """Rows of each class (K, anchors * block), and the others; None where they do not come out."""
    block = branch.block or rows // classes
    least = branch.before + classes * block
    width = least + max((getattr(head, 'cls_out_channels', None) or 0) - classes, 0) if branch.anchored else rows
    if rows % width or not 0 <= width - least <= 2:  # a background; Seesaw's classifier has two rows more
        return None
    index = torch.arange(rows).view(-1, width)
    inner = index[:, branch.before:least].reshape(len(index), classes, block).transpose(0, 1).flatten(1)
    return inner, torch.cat([index[:, :branch.before], index[:, least:]], dim=1).flatten()
