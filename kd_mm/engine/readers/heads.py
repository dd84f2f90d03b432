"""The reader of whole heads: views of what they predicted and, for the side that learns, assigned."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import Tensor, nn

from kd_mm.engine.readers.base import Comparison, Reader, Records
from kd_mm.hosts.heads.assigned import assignment_taps, read_assignment
from kd_mm.hosts.heads.dense import box_paths, dense_view
from kd_mm.hosts.heads.find import need_head
from kd_mm.hosts.heads.mask_query import mask_query_view
from kd_mm.hosts.heads.query import query_taps, query_view
from kd_mm.hosts.heads.towers import cross_head_outputs, default_index, held_features, tower_taps
from kd_mm.hosts.paths import resolve
from kd_mm.hosts.places import MARK, head_meaning
from kd_mm.hosts.rows import shared_places
from kd_mm.ops.classes import ClassPair
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView
from kd_mm.types.query import MaskQueryView, QueryView
from kd_mm.types.records import Recorded

#: A side's records by the names that its kind of view gives them.
Named = Mapping[str, Recorded]


class HeadReader(Reader):
    """Two heads, as the view that the loss compares (:attr:`kd_mm.losses.base.head.HeadLoss.compares`).

    No head runs again, and the host's assignment is read, not repeated.  A loss with a ``cross_head`` gets the
    teacher's predictions from the student's tower features instead of the student's own predictions.

    Args:
        title, at: see :class:`Reader`; a path of a head on each side.
        loss: says what it needs of the heads.
    """

    def __init__(self, title: str, at: Dict[str, Any], loss: Any):
        super().__init__(title, at, {'student': None, 'teacher': None})
        self.loss = loss
        self.heads: Dict[str, Any] = {}
        self.models: Dict[str, Any] = {}
        self._named: Dict[str, Dict[str, str]] = {}
        self._towers: Dict[str, Dict[str, List[str]]] = {}

    @property
    def _owner(self) -> str:
        return type(self.loss).__name__

    def locate(self, side: str, model: nn.Module) -> List[str]:
        at = self.at[side]
        if not isinstance(at, str) or at.startswith(MARK) or any(letter in at for letter in '*?['):
            raise ValueError(f'{self._owner} compares one head with one: {side} {at!r} is no path of a head, such as '
                             "'bbox_head'")
        head, method = resolve(model, at, side)
        rows = shared_places(model, at)
        if rows is not None:
            said = f" Both models are asked about the same proposals at {' or '.join(map(repr, rows))}" if rows else ''
            raise ValueError(f'{side} {at!r} says something about proposals, and {self._owner} compares dense heads, '
                             f"such as 'bbox_head' of a one-stage detector or 'rpn_head'.{said}")
        if method != 'forward':
            raise ValueError(f'{side} {at!r} is a method, and {self._owner} needs a head')
        need_head(self._owner, side, model, at, head, self.loss.compares)
        self.heads[side], self.models[side] = head, model
        self.meanings[side] = {at: head_meaning(model, at)}
        self._named[side] = self._taps(side, model, at, head)
        self.paths[side] = list(self._named[side].values())
        return self.paths[side]

    def where(self, side: str) -> str:
        return repr(self.at[side])  # what is recorded below it is nothing that a user wrote

    def describe(self) -> str:
        return super().describe() if self.loss.compares is DenseView else 'the queries of both heads'

    def _taps(self, side: str, model: nn.Module, at: str, head: Any) -> Dict[str, str]:
        """Name -> path of everything to record."""
        if self.loss.compares is QueryView:
            return query_taps(model, at)
        parts = ['']
        if self.loss.compares is DenseView:
            parts.extend(box_paths(head))
        if self.loss.compares is DenseView and self.loss.needs_assignment and side == 'student':
            assigners = assignment_taps(head)
            parts.extend(assigners)
            if len(assigners) > 1:  # one of them at a time
                self.optional = [f'{at}.{name}' for name in assigners]
        if self.loss.cross_head is not None:
            self._towers[side] = tower_taps(head, self._index(head), self.loss.cross_head.stage)
            parts.extend(path for tower in self._towers[side].values() for path in tower)
        return {part: f'{at}.{part}' if part else at for part in parts}

    def _index(self, head: Any) -> int:
        return default_index(head) if self.loss.cross_head.index is None else self.loss.cross_head.index

    def read(self, student: Records, teacher: Records, batch: KDBatch,
             classes: Optional[ClassPair] = None) -> Comparison:
        named = [{name: records[path] for name, path in self._named[side].items() if path in records}
                 for side, records in (('student', student), ('teacher', teacher))]
        own: Any
        theirs: Any
        if self.loss.compares is QueryView:
            own, theirs = (self._queries(side, records) for side, records in zip(('student', 'teacher'), named))
        elif self.loss.compares is MaskQueryView:
            own, theirs = (mask_query_view(self.heads[side], self._only_call(side, records).output)
                           for side, records in zip(('student', 'teacher'), named))
        else:
            own, theirs = self._dense(*named)
        return Comparison(own, theirs, batch)

    def _only_call(self, side: str, records: Named) -> Any:
        calls = records[''].calls
        if len(calls) != 1:
            raise ValueError(f'{self._owner}: the {side} head ran {len(calls)} times in one step; a head that runs '
                             'once is needed')
        return calls[0]

    def _queries(self, side: str, records: Named) -> QueryView:
        view = query_view(self.models[side], self.heads[side], records)
        if self.loss.shared and view.decode is None:
            raise ValueError(f'{self._owner}: the decoder of the {side} {type(self.models[side]).__name__} takes no '
                             'queries but its own')
        return view

    def _dense(self, student: Named, teacher: Named) -> Tuple[DenseView, DenseView]:
        own, theirs = self._view('student', student), self._view('teacher', teacher)
        if self.loss.needs_assignment:
            head = self.heads['student']
            calls = [call for name in assignment_taps(head) if name in student for call in student[name].calls]
            own.assignment = read_assignment(head, calls, [level.shape[1] for level in own.logits])
        if self.loss.cross_head is not None:
            own = self._crossed(student, teacher, own)
        return own, theirs

    def _view(self, side: str, records: Named) -> DenseView:
        head = self.heads[side]
        numbers = [tensor for path in box_paths(head) for tensor in records[path]]
        return dense_view(head, self._only_call(side, records).output, numbers=numbers)

    def _crossed(self, student: Named, teacher: Named, own: DenseView) -> DenseView:
        """The teacher's predictions from the student's tower features."""
        head = self.heads['teacher']
        if type(head) is not type(self.heads['student']):
            raise ValueError(f'{self._owner}: the student has a {type(self.heads["student"]).__name__} and the teacher '
                             f'a {type(head).__name__}; the cross-head pass needs the same kind of head')
        numbers: List[Tensor] = []
        output = cross_head_outputs(
            head, teacher[''].calls[0].args[0], held_features(self._towers['student'], student),
            held_features(self._towers['teacher'], teacher), self._index(head), self.loss.cross_head.align,
            numbers=numbers)
        return dense_view(head, output, own.assignment, numbers)
