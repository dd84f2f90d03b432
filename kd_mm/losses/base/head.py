"""What the losses on whole heads share: views of both heads instead of lists of maps."""

from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import CrossHead, DenseView


class HeadLoss(KDLoss):
    """Base of the losses that compare two dense heads: ``at`` names the head, the rest is read from it.

    A method implements :meth:`terms` on two views of the kind that it :attr:`compares`.  In training a reader makes
    them from what the taps recorded (:class:`kd_mm.engine.readers.heads.HeadReader`).  On plain tensors (tests,
    notebooks) the loss is called with two views: ``loss(student, teacher)``; the student's carries the assignment.

    Levels are those of the heads; ``loss_weight`` may be a list with one weight each. There is no adapter and no
    region: rows of a head are chosen by its assignment.

    Class attributes:
        compares: the class of the views.
        needs_assignment: the loss reads ``student.assignment``.
        cross_head: for a loss on what the teacher's head makes of the student's tower features: where they enter.
        shared: the student's decoder runs on given queries, so both views must be able to ``decode``.

    Args:
        loss_weight: see :class:`KDLoss`. Default 1.
    """

    logits = True
    compares: type = DenseView
    needs_assignment = True
    cross_head: Optional[CrossHead] = None
    shared = False

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        """The parts of the loss without their factors: name -> one scalar a level (one in all for a ``joint`` loss).

        The teacher's predictions come detached.
        """
        raise NotImplementedError

    def parts(self, student: Any, teacher: Any, batch: Optional[KDBatch] = None,
              region: Optional[nn.Module] = None) -> List[Dict[str, Tensor]]:
        """The parts of each level's loss with their :attr:`factors`.

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
            found = self.terms(student, teacher, KDBatch() if batch is None else batch)
            # A term without rows must still be connected: distributed ranks wait for the same gradients.
            anchor = sum(level.sum() for level in student.logits) * 0
            return [self._weighed({name: part[level] + anchor for name, part in found.items()} or {'': anchor})
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
            grown = self.grows and s.shape[2] > t.shape[2]
            if self.logits and ((s.shape[2] != t.shape[2] and not grown) or student.sigmoid != teacher.sigmoid):
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

    def same_bins(self, student: DenseView, teacher: DenseView, sides: bool = True) -> None:
        """Raise a ValueError where the bins of two heads do not stand for the same numbers.

        Args:
            student, teacher: with distributions, or without any, which is no fault here.
            sides: they must be the four sides of a box; else those of an angle are right as well.
        """
        name, views = type(self).__name__, (student, teacher)
        for view in views:
            if sides and view.distributions is not None and view.distributions[0].shape[2] != 4:
                raise ValueError(f'{name}: the distributions of {view.name} are of an angle, and not of the sides of a '
                                 "box. Use LDLoss (at='bbox_head', valuable_weight=0), or box_weight=0 where there is "
                                 'one')
        own, theirs = (view.measured if view.distributions is not None else None for view in views)
        if own is not None and theirs is not None and own != theirs:
            raise ValueError(f'{name}: the bins of {student.name} are {own}, those of {teacher.name} {theirs}: the '
                             'same bin means another number. Give both heads the same convention (angle_version; '
                             'offset of the prior generator), or use a loss on features or classes')

    def sigmoid_only(self, view: DenseView) -> None:
        """Raise a ValueError for a head whose classes are a softmax."""
        if not view.sigmoid:
            raise ValueError(f'{type(self).__name__}: {view.name} has softmax classes; independent (sigmoid) class '
                             'scores are needed')
