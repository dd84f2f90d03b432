"""What the losses on whole heads share: views of both heads instead of lists of maps."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from kd_mm.losses.base import KDLoss
from kd_mm.taps import Recorded
from kd_mm.types import KDBatch
from kd_mm.views.dense_head import DenseView, assignment_tap, dense_view, read_assignment


class HeadLoss(KDLoss):
    """Base of the losses that compare two dense heads: ``at`` names the head, the rest is read from it.

    A method implements :meth:`terms` on two :class:`kd_mm.views.DenseView`.  In training, :meth:`bind_head` is given
    both heads once and says what to record of them, and :meth:`views` makes the views of a step from the records;
    neither head runs again and the host's assignment is read, not repeated.  On plain tensors (tests, notebooks) the
    loss is called with two views: ``loss(student, teacher)``; the student's carries the assignment.

    Levels are those of the heads; ``loss_weight`` may be a list with one weight each. There is no adapter and no
    region: rows of a head are chosen by its assignment.

    Class attributes:
        needs_assignment: the loss reads ``student.assignment``.

    Args:
        loss_weight: see :class:`KDLoss`. Default 1.
    """

    logits = True
    needs_assignment = True

    def __init__(self, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        #: The heads by side; a dict, so that neither becomes a sub-module.
        self.heads: Dict[str, Any] = {}

    def bind_head(self, side: str, head: nn.Module) -> List[str]:
        """Remember the head of one side.

        Returns:
            Paths below the head to record; '' is its own ``forward``.

        Raises:
            ValueError: the loss is not possible with this head.
        """
        self.heads[side] = head
        return ['', assignment_tap(head)] if side == 'student' and self.needs_assignment else ['']

    def locate(self, side: str, model: nn.Module, at: str, head: nn.Module) -> Dict[str, str]:
        """What to record of one side: name -> path in the model; :meth:`views` gets the records by these names.

        Args:
            side: 'student' or 'teacher'.
            model: the whole model.
            at: path of the head in it.
            head: the module there.
        """
        return {part: f'{at}.{part}' if part else at for part in self.bind_head(side, head)}

    def views(self, student: Mapping[str, Recorded], teacher: Mapping[str, Recorded]) -> Tuple[DenseView, DenseView]:
        """The views of a step, from what was recorded at the paths of :meth:`bind_head`."""
        own = self.head_view('student', student)
        if self.needs_assignment:
            head = self.heads['student']
            own.assignment = read_assignment(head, student[assignment_tap(head)].calls,
                                             [level.shape[1] for level in own.logits])
        return own, self.head_view('teacher', teacher)

    def head_view(self, side: str, records: Mapping[str, Recorded]) -> DenseView:
        """The view of the one forward pass of a head."""
        calls = records[''].calls
        if len(calls) != 1:
            raise ValueError(f'{type(self).__name__}: the {side} head ran {len(calls)} times in one step; a head that '
                             'runs once is needed')
        return dense_view(self.heads[side], calls[0].output)

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        """The parts of the loss with their own factors (not ``loss_weight``): name -> one scalar a level (one in all
        for a ``joint`` loss).

        The teacher's predictions come detached.
        """
        raise NotImplementedError

    def per_level(self, student: Any, teacher: Any, batch: Optional[KDBatch] = None,
                  region: Optional[nn.Module] = None) -> List[Tensor]:
        """Unweighted losses, one scalar a level.

        Args:
            student, teacher: :class:`DenseView`.
            batch: the step's targets.
            region: not possible here.

        Raises:
            ValueError: the two views do not belong together, or lack what the method needs.
        """
        if region is not None:
            raise ValueError(f'{type(self).__name__}: a head loss takes no region; remove `region`')
        self.check_shapes(student, teacher)
        teacher = teacher.detach()
        with torch.autocast(student.logits[0].device.type, enabled=False):
            parts = self.terms(student, teacher, KDBatch() if batch is None else batch)
            # A term without rows must still be connected: distributed ranks wait for the same gradients.
            anchor = sum(level.sum() for level in student.logits) * 0
            return [sum((part[level] for part in parts.values()), anchor)
                    for level in range(1 if self.joint else len(student))]

    def check_shapes(self, student: Any, teacher: Any) -> None:
        """Raise a ValueError where two views cannot be compared prior by prior."""
        name = type(self).__name__
        if not isinstance(student, DenseView) or not isinstance(teacher, DenseView):
            raise ValueError(f'{name} compares two heads: give two DenseViews, or in a config at=\'bbox_head\'')
        if self.needs_assignment and student.assignment is None:
            raise ValueError(f"{name}: the student's view has no assignment")
        if len(student) != len(teacher):
            raise ValueError(f'{name}: {len(student)} levels of {student.name} and {len(teacher)} of {teacher.name}; '
                             'the heads must have the same strides')
        for level, (s, t) in enumerate(zip(student.logits, teacher.logits)):
            if self.logits and (s.shape[2] != t.shape[2] or student.sigmoid != teacher.sigmoid):
                raise ValueError(
                    f'{name}, level {level}: {s.shape[2]} class logits of {student.name} '
                    f'({"sigmoid" if student.sigmoid else "softmax"}) and {t.shape[2]} of {teacher.name} '
                    f'({"sigmoid" if teacher.sigmoid else "softmax"}): the classes must be the same. Use a feature '
                    'loss, or a teacher trained on these classes')
            if s.shape[:2] != t.shape[:2]:
                raise ValueError(
                    f'{name}, level {level}: student {student.name} has {tuple(s.shape[:2])} rows (images, priors) '
                    f'and teacher {teacher.name} {tuple(t.shape[:2])}: the heads must have the same strides and the '
                    'same number of anchors a cell')

    def sigmoid_only(self, view: DenseView) -> None:
        """Raise a ValueError for a head whose classes are a softmax."""
        if not view.sigmoid:
            raise ValueError(f'{type(self).__name__}: {view.name} has softmax classes; independent (sigmoid) class '
                             'scores are needed')
