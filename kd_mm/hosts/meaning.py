"""What the channels at a place mean: class logits of some anchors, objectness, boxes.

Two maps of 3 channels may be 3 anchors of one class, one anchor of 3 classes, or the objectness of 3 anchors.  A logit
loss compares them channel by channel, so both sides must mean the same; the number of channels alone does not tell.
"""

from dataclasses import dataclass, replace
from typing import Any, List, Optional

from kd_mm.hosts import table
from kd_mm.hosts.picks import yolo_v3, yolo_v5

CLASSES, OBJECTNESS, BOXES, DISTRIBUTIONS, QUALITY = table.BRANCHES
_WORDS = {CLASSES: 'class logits', OBJECTNESS: 'objectness (any object or none; no classes)', BOXES: 'box numbers',
          DISTRIBUTIONS: 'bins of box distributions', QUALITY: 'quality (centerness, predicted IoU)'}

#: Heads whose class logits are made of queries (:func:`kd_mm.hosts.picks.semantic_logits`), without the background.
OF_QUERIES = ('MaskFormerHead', )


@dataclass(frozen=True)
class Meaning:
    """What the channels of a map mean; ``anchors`` times as many as :attr:`width`.

    Attributes:
        kind: class logits, objectness, boxes, their distributions, or quality.
        head: class of the head, for messages.
        classes: K, without a background; 0 where there are no classes.
        background: ``'first'`` or ``'last'``, where the channel of the background is; None where there is none.
        sigmoid: whether the model takes every number through a sigmoid of its own (else a softmax over the classes);
            None for numbers that are no logits.
        bins: of a distribution; 0 for all others.
        anchors: a cell; None until :meth:`of` has seen the channels.
        given_object: whether the model multiplies the scores with an objectness of its own, so that the classes were
            never taught anything where there is no object.

    Example:
        >>> rpn = Meaning(OBJECTNESS, 'RPNHead', sigmoid=True)
        >>> rpn.of(3).text()
        '3 anchors x 1 objectness (any object or none; no classes), sigmoid, of RPNHead'
    """

    kind: str
    head: str
    classes: int = 0
    background: Optional[str] = None
    sigmoid: Optional[bool] = None
    bins: int = 0
    anchors: Optional[int] = None
    given_object: bool = False

    @property
    def width(self) -> int:
        """Channels of one anchor."""
        single = {CLASSES: self.classes, BOXES: 4, DISTRIBUTIONS: 4 * self.bins}.get(self.kind, 1)
        return single + (self.background is not None)

    def of(self, channels: int) -> 'Meaning':
        """The same with the anchors that a map of so many channels has; None where they do not come out even."""
        return replace(self, anchors=channels // self.width if channels % self.width == 0 else None)

    def text(self) -> str:
        """In words, without names of classes."""
        count = f'{self.anchors} anchor{"" if self.anchors == 1 else "s"} x ' if self.anchors is not None else ''
        parts = [f'{count}{self.width} {_WORDS[self.kind]}']
        if self.background is not None:
            parts.append(f'the {self.background} of them the background')
        if self.sigmoid is not None:
            parts.append('sigmoid' if self.sigmoid else 'softmax')
        return ', '.join(parts) + f', of {self.head}'


def differences(student: Meaning, teacher: Meaning) -> List[str]:
    """What two meanings differ in, in words; empty where they are the same.

    Example:
        >>> differences(Meaning(CLASSES, 'A', 3, sigmoid=True, anchors=1), Meaning(CLASSES, 'B', 1, sigmoid=True,
        ...                                                                         anchors=3))
        ['anchors a cell: 1 and 3', 'classes: 3 and 1']
    """
    if student.kind != teacher.kind:
        return [f'the student gives {_WORDS[student.kind]}, the teacher {_WORDS[teacher.kind]}']
    found = []
    if student.anchors != teacher.anchors:
        found.append(f'anchors a cell: {student.anchors} and {teacher.anchors}')
    if student.classes != teacher.classes:
        found.append(f'classes: {student.classes} and {teacher.classes}')
    if student.bins != teacher.bins:
        found.append(f'bins of a side: {student.bins} and {teacher.bins}')
    if student.background != teacher.background:
        said = [side.background or 'none' for side in (student, teacher)]
        found.append(f'channel of the background: {said[0]} and {said[1]}')
    if student.sigmoid is not None and teacher.sigmoid is not None and student.sigmoid != teacher.sigmoid:
        said = ['a sigmoid each' if side.sigmoid else 'a softmax' for side in (student, teacher)]
        found.append(f'scores by {said[0]} and by {said[1]}')
    return found


def class_meaning(head: Any, proposals: bool = False) -> Meaning:
    """What the class logits of a head mean.

    Args:
        head: of the host.
        proposals: whether it is the first stage of a detector, whose one class is any object.
    """
    name, count = type(head).__name__, int(getattr(head, 'num_classes', 0) or 0)
    if any(cls.__name__ in OF_QUERIES for cls in type(head).__mro__):
        return Meaning(CLASSES, name, count, sigmoid=False)
    if hasattr(head, 'loss_decode'):  # a segmentor's head; one channel of two classes is the second one's
        width = getattr(head, 'out_channels', None) or count
        # Whatever the loss (focal and dice ones take a sigmoid), the host predicts several channels by a softmax.
        return Meaning(CLASSES, name, width, sigmoid=width == 1)
    width = getattr(head, 'cls_out_channels', None)
    sigmoid = bool(getattr(head, 'use_sigmoid_cls', True))
    background = 'last' if isinstance(width, int) and width == count + 1 else None
    if proposals:
        return Meaning(OBJECTNESS, name, background=background, sigmoid=sigmoid)
    return Meaning(CLASSES, name, count, background, sigmoid, given_object=has_objectness(head))


def has_objectness(head: Any) -> bool:
    """Whether a dense head predicts, beside its classes, whether there is an object at all."""
    found = table.nearest(head, 'logits')
    if found and found[1] in (yolo_v3, yolo_v5):  # among the channels of the same convolution
        return True
    return any(table.branch(head, path) == OBJECTNESS and next(module.parameters(), None) is not None
               for path, module in head.named_modules())


def branch_meaning(head: Any, branch: str) -> Optional[Meaning]:
    """What another branch of a head gives than the classes; None where it is not known.

    Args:
        branch: its path below the head.
    """
    kind = table.branch(head, branch)
    if kind is None:
        return None
    name = type(head).__name__
    if kind == DISTRIBUTIONS:
        bins = bins_of(head)
        return Meaning(kind, name, bins=bins) if bins > 1 else Meaning(BOXES, name)
    return Meaning(kind, name, sigmoid=True if kind in (OBJECTNESS, QUALITY) else None)


def bins_of(head: Any) -> int:
    """Bins of a side in the distributions of a head; 1 for a head of MMYOLO that is made without."""
    layers = getattr(head, 'head_module', None)
    if layers is None:
        return int(getattr(head, 'reg_max', 0)) + 1
    # The values of the bins: reg_max of them in YOLOv8, one more in YOLOv6 and PPYOLOE.
    values = getattr(layers, 'proj', None)
    return 1 if values is None else len(values)
