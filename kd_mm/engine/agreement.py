"""Whether both sides of a term mean the same by what is compared: classes, anchors, objectness."""

from dataclasses import replace
from typing import Any, List, Optional, Sequence, Set

from torch import Tensor

from kd_mm.engine.naming import Names, names_text
from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.term import Term
from kd_mm.hosts.meaning import BOXES, CLASSES, DISTRIBUTIONS, OBJECTNESS, Meaning, differences
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.classes import by_number, is_background, united
from kd_mm.ops.problems import Problems


class Agreement:
    """Compares what the two sides of a logit loss mean; each fault is told once.

    Args:
        problems: gets what is wrong before anything has run.
        known: the classes of the models.
    """

    def __init__(self, problems: Problems, known: Names):
        self.problems, self.known = problems, known
        self._told: Set[Term] = set()
        #: what may be meant so.
        self.notes: List[str] = []

    def names(self, term: Term, source: str, name: str) -> None:
        """Compare the class names of the learner with those of one source, or map them (``classes=``).

        Args:
            term: whose.
            source: as the term calls it.
            name: of the model behind it.
        """
        ours, theirs = self.known.classes_of(term.learner), self.known.classes_of(name)
        wanted = self._wanted(term, name)
        problem: Optional[str] = None
        if not term.reader.has_classes():  # objectness, boxes
            if term.classes is not None:
                problem = (f'{term.title}: classes={term.classes!r}, but there are no classes at student '
                           f'{term.reader.where("student")} and teacher {term.reader.where("teacher")}: '
                           f'{self._found(term)}. Remove classes')
        elif term.classes is not None and any(meaning.background is not None for meaning in _known(term)):
            problem = (f'{term.title}: classes={term.classes!r} picks channels of maps without a background, and at '
                       f'student {term.reader.where("student")} and teacher {term.reader.where("teacher")} there are: '
                       f'{"; ".join(dict.fromkeys(meaning.text() for meaning in _known(term)))}. Use a feature loss')
        elif wanted is not None and ((ours and theirs) or by_number(wanted)):
            try:
                term.map_classes(source, ours, theirs, wanted, (
                    self.known.count_of(term.learner), self.known.count_of(name)))
            except ValueError as error:
                problem = str(error)
        elif wanted is not None and name != term.learner:
            problem = (f'{term.title}: classes={wanted!r} needs the class names of both models; student: '
                       f"{names_text(ours)}, teacher: {names_text(theirs)}. Or give classes='positional', or a dict of "
                       'indices')
        elif term.loss.needs_background and ours and not is_background(ours[0]):
            problem = (f'{term.title}: {type(term.loss).__name__} needs the background as first class, which holds '
                       f"what a model does not know; the first of {names_text(ours)} is none (it is called "
                       "'background' or the like). For data without one use a feature loss, such as LocalPODLoss")
        elif term.of_classes and term.loss.grows and ours and theirs:
            if list(ours)[:len(theirs)] != list(theirs):
                problem = (f'{term.title}: {type(term.loss).__name__} needs a student whose classes begin with the '
                           f"teacher's, in the same order. Student ({len(ours)}): {names_text(ours)}. "
                           f'Teacher ({len(theirs)}): {names_text(theirs)}')
        elif term.of_classes and ours and theirs and list(ours) != list(theirs):
            same = ' (the same ones in another order)' if sorted(ours) == sorted(theirs) else ''
            problem = (f'{term.title}: a logit loss needs the same classes in the same order{same}. '
                       f'Student ({len(ours)}): {names_text(ours)}. Teacher ({len(theirs)}): {names_text(theirs)}. '
                       "Give classes='common' (or the names to compare), use a feature loss, or a teacher trained on "
                       'these classes')
        if problem is not None:
            self._told.add(term)
            self.problems.add(problem)

    def _wanted(self, term: Term, name: str) -> Any:
        """The form of ``classes=`` of a term, else that of its teacher where the term compares classes by channel."""
        plain = (term.of_classes and not term.of_heads and not term.loss.grows and term.reader.has_classes()
                 and all(meaning.background is None for meaning in _known(term)))
        return term.classes if term.classes is not None or not plain else self.known.map_of(name, term.learner)

    def unite(self, term: Term) -> None:
        """Let a term with several teachers, whose classes are mapped, compare all that any of them knows."""
        pairs = [term.chosen.get(source) for source in term.sources]
        if len(pairs) < 2 or not any(pairs) or term in self._told:
            return
        problem: Optional[str] = None
        if not all(pairs):
            missing = [source for source, pair in zip(term.sources, pairs) if pair is None]
            problem = (f'{term.title}: the classes of its teacher {missing[0]!r} are not mapped and those of another '
                       "are: give classes= in the loss, or in the entry of each teacher")
        elif len({tuple(pair[0][1]) for pair in pairs if pair}) > 1:
            kind = type(term.loss).__name__
            if term.loss.competes or term.shared:
                why = (f'{kind} takes a softmax over classes of which its teachers know different ones' if
                       term.loss.competes else f'its teachers know different classes at {term.shared!r}')
                problem = (f'{term.title}: {why}, and cannot unite them. Give each teacher a loss of its own, or use '
                           'SigmoidKDLoss at maps')
            else:
                term.chosen = dict(zip(term.sources, united([pair for pair in pairs if pair])))
                term.united = True
        if problem is not None:
            self._told.add(term)
            self.problems.add(problem)

    @staticmethod
    def _found(term: Term) -> str:
        return '; '.join(dict.fromkeys(meaning.text() for meaning in _known(term) if meaning.kind != CLASSES))

    def levels(self, comparison: Comparison, student: Sequence[Optional[Meaning]],
               teacher: Sequence[Optional[Meaning]], source: str) -> bool:
        """Compare what the channels of each level mean, whose shapes are known now.

        Args:
            comparison: of a first pass.
            student, teacher: of each level, see :meth:`Reader.meanings_of`; of whole heads empty.
            source: name of the model that is learned from.

        Returns:
            Whether to go on with the term: not where its fault has been told.

        Raises:
            ValueError: they differ; it says in what, and what to do instead.
        """
        term: Term = comparison.term
        if term in self._told:
            return False
        if not term.loss.logits or term.loss.grows or term.of_heads:  # these compare them themselves
            return True
        sides = zip(comparison.student, comparison.teacher, [*student] or [None] * len(comparison.student),
                    [*teacher] or [None] * len(comparison.teacher))
        for level, (s, t, own, other) in enumerate(sides):
            where = (f'{term.title}, level {level}: student {term.reader.where("student")} and teacher '
                     f'{term.reader.where("teacher")}')
            if own is not None and other is not None:
                own, other = _seen(own, s, term), _seen(other, t, term)
                found = differences(own, other)
                if found:
                    raise ValueError(
                        f'{where} give logits that do not mean the same: {"; ".join(found)}. Student: {s.shape[1]} '
                        f'channels, {own.text()}{self._named(term.learner, own)}. Teacher: {t.shape[1]} channels, '
                        f'{other.text()}{self._named(source, other)}. {mend(own, other)}')
            meaning = next((_seen(side, tensor, term) for side, tensor in ((own, s), (other, t)) if side), None)
            fault = None if meaning is None else misused(term.loss, meaning, s.shape[1])
            if fault is not None:
                raise ValueError(f'{where}: {fault}')
            if meaning is not None and meaning.kind == CLASSES and meaning.sigmoid and term.loss.competes:
                self.notes.append(f'{term.title}: {type(term.loss).__name__} takes a softmax over the classes, which '
                                  f'{meaning.head} scores by a sigmoid each: only which class is likelier is taught, '
                                  'and not whether there is an object at all. SigmoidKDLoss teaches both')
            if own is not None and other is not None and own.given_object != other.given_object and (
                    term.region is None):
                one, two = (own, other) if own.given_object else (other, own)
                taught = ('the student learns there what the teacher was never taught' if other.given_object else
                          "the student's classes learn to be silent there, which its objectness says already")
                self.notes.append(f'{term.title}: {one.head} multiplies its class scores with an objectness, and '
                                  f'{two.head} has none: where there is no object they do not mean the same, and '
                                  f"{taught}. Compare them on objects alone, region=dict(type='GTBoxRegion'), or use a "
                                  'feature loss')
            if s.dim() == t.dim() and s.shape[1] != t.shape[1]:
                ours, theirs = self.known.classes_of(term.learner), self.known.classes_of(source)
                names = ['' if ours and ours == theirs else f' ({names_text(found)})' for found in (ours, theirs)]
                taps = '' if term.shared else ", or tap the class logits of both, such as '@logits'"
                raise ValueError(
                    f'{where}: a logit loss needs the same classes, but the student has {s.shape[1]} logits{names[0]} '
                    f'and the teacher {t.shape[1]}{names[1]}. Use a feature loss, or a teacher trained on these classes'
                    f'{taps}')
        return True

    def _named(self, name: str, meaning: Meaning) -> str:
        return f' ({names_text(self.known.classes_of(name))})' if meaning.kind == CLASSES else ''


def _known(term: Term) -> List[Meaning]:
    """What the channels of both sides mean, as far as the tables say."""
    return [meaning for side in term.reader.meanings.values() for meaning in side.values() if meaning is not None]


def _seen(meaning: Meaning, tensor: Tensor, term: Term) -> Meaning:
    """A meaning with the anchors that the channels of a map tell; of the chosen classes alone with ``classes=``."""
    if term.chosen and meaning.kind == CLASSES:
        meaning = replace(meaning, classes=len(next(iter(term.chosen.values()))[0][1]))
    return meaning.of(tensor.shape[1])


def misused(loss: KDLoss, meaning: Meaning, channels: int) -> Optional[str]:
    """Why a loss on class logits cannot mean what the channels of a map mean; None where it can.

    Args:
        loss: with ``logits``.
        meaning: of either side, which are the same.
        channels: of the map.
    """
    name = type(loss).__name__
    if meaning.kind == DISTRIBUTIONS:
        return (f'{name} compares classes, and these are {meaning.text()}: the softmax of a distribution is over the '
                "bins of one side. Use LDLoss (at='bbox_head')")
    if meaning.kind == BOXES:
        return (f'{name} compares classes, and these are {meaning.text()}, which are no logits. Use FitNetLoss, or a '
                "loss of whole heads with a part for boxes such as CrossKDLoss or BCKDLoss (at='bbox_head')")
    anchors, known = meaning.anchors or 1, getattr(loss, 'anchors', 1)
    if loss.competes and anchors != known:
        more = f' and anchors={known}' if hasattr(loss, 'anchors') else ''
        use = 'SigmoidKDLoss' if meaning.sigmoid else f'DISTLoss with anchors={anchors}'
        own = f', or anchors={anchors}' if hasattr(loss, 'anchors') and meaning.sigmoid else ''
        return (f'{name} takes a softmax over the classes of a cell{more}, and the {channels} channels are '
                f'{meaning.text()}: it would run over the anchors, too. Use {use}{own}')
    return None


def mend(student: Meaning, teacher: Meaning) -> str:
    """What works instead of comparing two things of different meaning."""
    feature = "a feature loss (at='@neck')"
    if {student.kind, teacher.kind} == {CLASSES, OBJECTNESS}:
        dense = 'student' if student.kind == CLASSES else 'teacher'
        return (f'The first stage of a two-stage detector has no classes, and the {dense} has no proposals: use '
                f'{feature}, or a teacher of the same kind')
    if student.kind != teacher.kind:
        return "Tap the same branch in both, such as '@logits'"
    if student.kind != CLASSES:
        return f'Use {feature}, or heads that are built alike'
    if student.classes != teacher.classes and (student.anchors, student.background) == (
            teacher.anchors, teacher.background):
        return ("Give classes='common' (or the names to compare; both models must know their class names), "
                f'use {feature}, or a teacher trained on these classes')
    return f'Use {feature}, or a teacher whose head has the same anchors, classes and kind of score'
