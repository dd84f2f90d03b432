"""How alike student and teacher are at the taps of each term: a number for the log, from what a step has at hand."""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.term import STUDENT, Term
from kd_mm.hosts.meaning import CLASSES, Meaning
from kd_mm.ops import distributed
from kd_mm.ops.checks import whole
from kd_mm.ops.similarity import CELLS, grid, linear_cka, same_best, same_class, same_side
from kd_mm.types.dense import DenseView
from kd_mm.types.query import MaskQueryView, QueryView

#: Places whose largest class is compared: counting is cheap.
PIXELS = 4096
#: A training is measured at least so many times.
TIMES = 10
#: A level of the student and of the teacher.
Pair = Tuple[Tensor, Tensor]


class Likeness:
    """Measures each term of the student every so many iterations.

    - class logits under a softmax: the share of places (or proposals) with the same largest class;
    - class logits with a sigmoid each: the share of an image's 100 best scores, over classes, places and levels, that
      are among the other side's, too;
    - mask queries: the first of these, of the label maps that the masks make;
    - anything else: linear CKA of the tapped features, before any adapter, over a grid of cells; the mean over levels.

    Object queries are not measured: which of them belong together is for the losses to say.

    It is under no_grad, draws nothing, and changes nothing that a training uses.  The same on every rank.

    Args:
        every: iterations from one measurement to the next; 0 for none.  A training of fewer than ``10 * every``
            iterations is measured about ten times and at its end, so that the log does not stay at its first value.
        labels_pixels: whether class logits are those of pixels (a segmentor), each of which has a class.

    Raises:
        ValueError: ``every`` is no whole number from 0.
    """

    def __init__(self, every: int, labels_pixels: bool = False):
        self.every, self.labels_pixels = whole('DistillHook', 'agreement', every, 0), labels_pixels

    def due(self, step: int, steps: int = 0) -> bool:
        """Whether iteration ``step`` is measured: the first, the last, and each before which the host would log.

        Args:
            step: from 0.
            steps: of the whole training, 0 if unknown.

        Example:
            >>> [step for step in range(30) if Likeness(50).due(step, 30)]
            [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29]
        """
        every = min(self.every, max(steps // TIMES, 1)) if steps else self.every
        return bool(every) and (step == 0 or step + 1 == steps or (step + 1) % every == 0)

    @torch.no_grad()
    def measure(self, found: Sequence[Comparison]) -> Dict[str, Tensor]:
        """Name for the log -> number, of the comparisons of a step; those that cannot be measured are left out."""
        own = [comparison for comparison in found if comparison.term.learner == STUDENT]
        values = [self._one(comparison) for comparison in own]
        device = next((value.device for value in values if value is not None), None)
        if device is None:
            return {}
        nothing = torch.full((), float('nan'), device=device)
        numbers = torch.stack([nothing if value is None else value for value in values]).double()
        # A rank may have no proposals in this step: the mean is that of the others.
        sums = distributed.mean(torch.stack([numbers.nan_to_num(0.0, 0.0, 0.0), numbers.isfinite().double()]))
        return {f'kd_agree_{comparison.term.label}': mean
                for comparison, mean, known in zip(own, sums[0] / sums[1], sums[1].tolist()) if known}

    def _one(self, comparison: Comparison) -> Optional[Tensor]:
        student, teacher, term = comparison.student, comparison.teacher, comparison.term
        if isinstance(student, QueryView):
            return None
        device = (student[0] if isinstance(student, (tuple, list)) else student.logits[0]).device
        with torch.autocast(device.type, enabled=False):
            if isinstance(student, DenseView):
                return _of_views(student, teacher)
            if isinstance(student, MaskQueryView):
                return same_class(*grid((label_scores(student), label_scores(teacher)), PIXELS))
            pairs = list(zip(student, teacher))
            if are_classes(term, pairs):
                return self._of_classes(term, pairs)
            return mean([of_features(*pair) for pair in pairs])

    def _of_classes(self, term: Term, pairs: Sequence[Pair]) -> Tensor:
        """The number for class logits, rows (M, K) or maps (N, A*K, H, W)."""
        if pairs[0][0].dim() == 2:
            return mean([same_class(*pair) for pair in pairs])
        if self.labels_pixels:
            judge = same_class if pairs[0][0].shape[1] > 1 else same_side
            return mean([judge(*grid(pair, PIXELS)) for pair in pairs])
        if any(student.shape != teacher.shape for student, teacher in pairs):
            return mean([of_features(*pair) for pair in pairs])
        if independent(term):
            return same_best([student for student, _ in pairs], [teacher for _, teacher in pairs])
        width = _meanings(term)[0].width  # type: ignore[union-attr]
        rows = [[level.permute(0, 2, 3, 1).reshape(-1, width) for level in pair] for pair in pairs]
        return mean([same_class(*pair) for pair in rows])


def of_features(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear CKA of one level: maps (N, C, H, W), tokens (N, L, C) or rows (M, ...)."""
    if student.dim() == 4 and teacher.dim() == 4 and student.shape[0] == teacher.shape[0]:
        return linear_cka(*grid((student, teacher), CELLS))
    rows = [tensor.flatten(0, 1) if tensor.dim() == 3 else tensor.flatten(1) for tensor in (student, teacher)]
    if rows[0].shape[0] != rows[1].shape[0]:
        return student.new_full((), float('nan'), dtype=torch.float32)
    stride = max(rows[0].shape[0] // CELLS, 1)
    return linear_cka(rows[0][::stride], rows[1][::stride])


def label_scores(view: MaskQueryView) -> Tensor:
    """(N, K, H, W): score of each class in each pixel, of the last layer of a mask transformer."""
    return torch.einsum('nqk,nqhw->nkhw', view.logits[-1].float().softmax(dim=-1)[..., :-1],
                        view.masks[-1].float().sigmoid())


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of those numbers that are known; NaN where none is."""
    return torch.stack([value.float() for value in values]).nanmean()


def _of_views(student: DenseView, teacher: DenseView) -> Optional[Tensor]:
    if [level.shape for level in student.logits] != [level.shape for level in teacher.logits]:
        return None
    if student.sigmoid:
        return same_best(student.logits, teacher.logits)
    return same_class(*(torch.cat([level.flatten(0, 1) for level in view.logits]) for view in (student, teacher)))


def _meanings(term: Term) -> List[Optional[Meaning]]:
    return [meaning for side in ('student', 'teacher') for meaning in term.reader.meanings[side].values()] or [None]


def are_classes(term: Term, pairs: Sequence[Pair]) -> bool:
    """Whether a term compares class logits, whatever its loss: CWD and its like take features, too."""
    if term.shared is not None:
        said = term.shared in ('@roi_logits', '@rpn_logits')
    else:
        known = _meanings(term)
        said = all(meaning is not None and meaning.kind == CLASSES for meaning in known) or (
            term.loss.logits and known == [None])
    return bool(said) and all(s.dim() == t.dim() and s.dim() in (2, 4) and s.shape[1] == t.shape[1] and len(s)
                              for s, t in pairs)


def independent(term: Term) -> bool:
    """Whether the class logits of a term have a sigmoid each, or nothing is known of them."""
    meaning = _meanings(term)[0]
    return meaning is None or meaning.sigmoid is not False
