"""What a dense head predicted and assigned, in one form for every kind of head."""

from dataclasses import dataclass, field
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.functional import lift

#: Levels of rows: L tensors (N, P_l) or (N, P_l, ...).
Rows = Tuple[Tensor, ...]


@dataclass
class Assignment:
    """Which ground truth the host gave to which prior in this step.

    Attributes:
        labels: L tensors (N, P), the class of a positive prior, ``background`` elsewhere.
        weights: L tensors (N, P), weight in the host's class loss: 0 where a prior is ignored or off the image.
        background: label of everything that is not positive.
        objects: L tensors (N, P), index of the ground-truth box in its image, -1 for none; None where the host's
            head does not tell.
        num_pos: positives of the batch as mmdet counts them (at least one an image), the mean over the ranks; a
            scalar.
    """

    labels: Rows
    weights: Rows
    background: int
    objects: Optional[Rows] = None
    num_pos: Tensor = field(default_factory=lambda: torch.ones(()))

    def positive(self, level: int) -> Tensor:
        """(N, P), true for positives."""
        labels = self.labels[level]
        return (labels >= 0) & (labels < self.background)


class DenseView:
    """What a dense head predicted for every prior of a batch; rows as the module says, float32 or wider.

    Args:
        logits: L tensors (N, P, K): one a class (the host's sigmoid or softmax not applied).
        boxes: L tensors (N, P, 4) in input pixels, or a function that decodes them when they are asked for.
        distributions: L tensors (N, P, S, B): logits over the B bins of each of S sides, left, top, right and bottom;
            or of one angle (S = 1). None for heads without.
        quality: L tensors (N, P): logits of centerness, objectness or predicted IoU; None for heads without.
        priors: L tensors (P, 4) of anchors or (P, 2) of points, in input pixels; None if not known.
        assignment: the host's; the student's only.
        sigmoid: whether the classes are independent (else the last of K is the background).
        name: of the head, for messages.
        measured: from where the bins of ``distributions`` count, in words; None where it is not known. Bins can be
            compared where both heads say the same.

    Example:
        >>> view = DenseView([torch.zeros(2, 12, 3)], boxes=[torch.rand(2, 12, 4)])
        >>> len(view), view.boxes[0].shape
        (1, torch.Size([2, 12, 4]))
    """

    def __init__(self, logits: Sequence[Tensor], boxes: Any = None, distributions: Optional[Sequence[Tensor]] = None,
                 quality: Optional[Sequence[Tensor]] = None, priors: Optional[Sequence[Tensor]] = None,
                 assignment: Optional[Assignment] = None, sigmoid: bool = True, name: str = 'head',
                 measured: Optional[str] = None):
        self.logits: Rows = tuple(logits)
        self.distributions = None if distributions is None else tuple(distributions)
        self.quality = None if quality is None else tuple(quality)
        self.priors = None if priors is None else tuple(priors)
        self.assignment, self.sigmoid, self.name, self.measured = assignment, sigmoid, name, measured
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.logits)

    def detach(self) -> 'DenseView':
        """The same view without gradient."""

        def cut(rows: Optional[Rows]) -> Optional[Rows]:
            return None if rows is None else tuple(level.detach() for level in rows)

        boxes = None if self._boxes is None else lambda: cut(self.boxes)
        return DenseView(cut(self.logits) or (), boxes, cut(self.distributions), cut(self.quality), self.priors,
                         self.assignment, self.sigmoid, self.name, self.measured)

    @property
    def boxes(self) -> Rows:
        """L tensors (N, P, 4) in input pixels, decoded once.

        Raises:
            ValueError: it is not known how this head's boxes are decoded.
        """
        if self._boxes is None:
            raise ValueError(f'{self.name} predicts no boxes that could be decoded prior by prior. Use a loss on '
                             'class scores, or a feature loss')
        if callable(self._boxes):
            self._boxes = tuple(self._boxes())
        return tuple(self._boxes)


def rows(maps: Sequence[Tensor], width: int) -> Rows:
    """L maps (N, A*width, H, W) as L tensors (N, H*W*A, width), float32 or wider.

    Example:
        >>> rows([torch.zeros(2, 6, 4, 5)], 3)[0].shape
        torch.Size([2, 40, 3])
    """
    return tuple(lift(level).permute(0, 2, 3, 1).reshape(level.shape[0], -1, width) for level in maps)


STAGES = ('pre_activation', 'post_activation')


@dataclass(frozen=True)
class CrossHead:
    """Where a student's tower features enter the teacher's head.

    Attributes:
        index: convolutions of each tower that they have behind them, from 1; None for all but the last.
        stage: 'pre_activation' or 'post_activation' of the last of them.
        align: whether they get the teacher's mean and deviation of every channel first.
    """

    index: Optional[int]
    stage: str
    align: bool
