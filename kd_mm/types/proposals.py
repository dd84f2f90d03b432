"""What two heads say about the same proposals, and what of it a loss compares."""

from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from kd_mm.ops.boxes import _tensor
from kd_mm.ops.classes import Chosen, take_classes

#: Whose proposals both heads are asked about.
PROPOSALS = ('student', 'teacher')
#: Places whose rows depend on the class: both models must mean the same by it.
OF_CLASSES = ('@roi_logits', '@roi_boxes', '@roi_masks')
#: Indices of the classes to compare, of the student and of the teacher.
Classes = Tuple[List[int], List[Chosen]]


@dataclass
class RoIView:
    """What one head says about M proposals of a batch, all images one after the other.

    Attributes:
        rois: (M, 5), index of the image and box in input pixels.
        labels: (M,), the class that the host has assigned, ``background`` where none.
        weights: (M,), weight in the host's class loss.
        background: label of what is no object; the last column of the logits.
        logits: (M, K + 1) of a softmax.
        deltas: (M, 4), or (M, 4 K) with a box for each class, as the head encodes them; None where it predicts
            something else.
        targets: (M, 4), what the host wants the deltas of positive rows to be, in the student's code; 0 elsewhere.
        features: (M, C, h, w), what the head has pooled; None in the first stage.
        masks: (P, K or 1, h, w), mask logits of the P positive rows in their order; None where not asked for.
        coder: the host's box coder.
        name: of the head, for messages.

    Example:
        >>> view = RoIView(torch.tensor([[0., 1., 2., 9., 8.]]), torch.tensor([1]), torch.ones(1), 2)
        >>> view.images, view.positive
        (tensor([0]), tensor([True]))
    """

    rois: Tensor
    labels: Tensor
    weights: Tensor
    background: int
    logits: Optional[Tensor] = None
    deltas: Optional[Tensor] = None
    targets: Optional[Tensor] = None
    features: Optional[Tensor] = None
    masks: Optional[Tensor] = None
    coder: Any = None
    name: str = 'head'

    def __len__(self) -> int:
        return len(self.rois)

    @property
    def images(self) -> Tensor:
        """(M,), index of the image."""
        return self.rois[:, 0].long()

    @property
    def positive(self) -> Tensor:
        """(M,), true where the host has assigned an object."""
        return (self.labels >= 0) & (self.labels < self.background)

    @property
    def boxes(self) -> Tensor:
        """(M, 4) or (M, 4 K) in input pixels.

        Raises:
            ValueError: the head does not predict deltas.
        """
        return _tensor(self.coder.decode(self.rois[:, 1:], self._deltas()))

    def _deltas(self) -> Tensor:
        if self.deltas is None:
            raise ValueError(f'{self.name} predicts no box deltas that could be compared. Use another place')
        return self.deltas

    def own_deltas(self, chosen: Tensor, labels: Tensor) -> Tensor:
        """(P, 4): the deltas of some rows, of the class of each where there is a box for each class.

        Args:
            chosen: (M,) bool.
            labels: (P,), the class by this head's own count.
        """
        deltas = self._deltas()[chosen]
        return deltas if deltas.shape[1] == 4 else own(deltas.unflatten(1, (-1, 4)), labels)


def own(values: Tensor, labels: Tensor) -> Tensor:
    """The part of (P, K, ...) that belongs to each row's class; the only part where one serves all classes.

    Example:
        >>> own(torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([1, 0])).tolist()
        [2.0, 3.0]
    """
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(len(values), device=values.device), labels]


@dataclass
class Compared:
    """One place of a pair of views: the rows of both, and what a loss may know about them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    targets: Optional[Tensor]
    total: int


def compared(place: str, student: RoIView, teacher: RoIView, classes: Optional[Tuple[int, Classes]] = None,
             teacher_count: int = 0) -> Compared:
    """The rows of a place.

    =============  ======================================================================
    ..._logits     (M, K + 1) class logits, the background last
    ..._boxes      (P, 4) box deltas of the positive rows, in the student's code
    @roi_masks     (P, 1, h, w) mask logits of the positive rows
    @roi_features  (M, C, h, w) pooled features
    =============  ======================================================================

    Where there is one prediction for each class, boxes and masks are those of the row's class.

    Args:
        place: one of :data:`kd_mm.hosts.places.SHARED`.
        student, teacher: views of the same proposals.
        classes: number of the student's classes and the indices to compare; rows of other classes are left out, since
            one of the models does not know them. None: both have the same classes.
        teacher_count: number of the teacher's classes, with ``classes``.

    Raises:
        ValueError: a head lacks what is asked for.
    """
    labels, chosen = student.labels, torch.ones_like(student.labels, dtype=torch.bool)
    ours, theirs = student.logits, teacher.logits
    theirs_of = labels
    if classes is not None and place in OF_CLASSES:
        count, (own_classes, their_classes) = classes
        # The place of each of the student's classes among those compared; the background comes last, -1 is none.
        places = labels.new_full((count + 1, ), -1)
        places[labels.new_tensor(own_classes)] = torch.arange(len(own_classes), device=labels.device)
        places[count] = len(own_classes)
        labels = places[labels.clamp(min=0, max=count)]
        chosen = labels >= 0
        # Of several classes the first: only logits have more than one, and these are taken below.
        single = [index[0] if isinstance(index, tuple) else index for index in their_classes]
        theirs_of = labels.new_tensor([*single, teacher.background])[labels.clamp(min=0)]
        if place == '@roi_logits':
            assert ours is not None and theirs is not None
            ours, theirs = take_classes(ours, count, own_classes), take_classes(theirs, teacher_count, their_classes)
    if place in ('@roi_logits', '@rpn_logits'):
        assert ours is not None and theirs is not None
        return Compared(ours[chosen], theirs[chosen], labels[chosen], None, int(chosen.sum()))
    if place == '@roi_features':
        assert student.features is not None and teacher.features is not None
        return Compared(student.features, teacher.features, labels, None, len(student))
    chosen = chosen & student.positive
    if place == '@roi_masks':
        assert student.masks is not None and teacher.masks is not None
        among = chosen[student.positive]
        ours, theirs = (own(view.masks[among], index[chosen])[:, None] for view, index in (  # type: ignore[index]
            (student, student.labels), (teacher, theirs_of)))
        return Compared(ours, theirs, labels[chosen], None, len(student))
    if student.targets is None:
        raise ValueError(f'{student.name}: its box targets are not understood. Use another place')
    ours = student.own_deltas(chosen, student.labels[chosen])
    theirs = _recoded(teacher.own_deltas(chosen, theirs_of[chosen]), student.rois[chosen, 1:], teacher.coder,
                      student.coder)
    return Compared(ours, theirs, labels[chosen], student.targets[chosen], len(student))


def _recoded(deltas: Tensor, boxes: Tensor, source: Any, target: Any) -> Tensor:
    """Box deltas of one coder in the code of another."""
    same = type(source) is type(target) and all(
        tuple(getattr(source, part, ())) == tuple(getattr(target, part, ())) for part in ('means', 'stds'))
    if same:
        return deltas
    return target.encode(boxes, _tensor(source.decode(boxes, deltas))).to(deltas)
