"""The reader of levels: what modules return, as maps (N, C, H, W)."""

from dataclasses import replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.engine.levels import Pairs, at_grid, pair_levels
from kd_mm.engine.readers.base import Comparison, Reader, Records, shapes_text
from kd_mm.hosts.heads.dense import dense_view
from kd_mm.hosts.heads.find import need_head
from kd_mm.hosts.meaning import Meaning
from kd_mm.hosts.paths import expand_paths, module_at, resolve
from kd_mm.hosts.places import MARK, find, meaning_at
from kd_mm.ops.classes import ClassPair, take_classes
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.dense import DenseView
from kd_mm.types.records import Seen

Pick = Callable[[Features], Features]
SIDES = ('student', 'teacher')


class MapReader(Reader):
    """Levels of two models, and what else the loss and its region need from them.

    Args:
        title, at, levels: see :class:`Reader`.
        logits_at: where a region made of predictions finds its logits, by side; they keep the same levels.
        picker: a loss that chooses instances by what two dense heads predict
            (:class:`kd_mm.losses.base.loss.PicksInstances`); None for all others.
    """

    def __init__(self, title: str, at: Dict[str, Any], levels: Mapping[str, Optional[Sequence[int]]],
                 logits_at: Optional[Dict[str, Any]] = None, picker: Any = None):
        super().__init__(title, at, levels)
        self.logits_at, self.picker = dict(logits_at or {}), picker
        #: which level of the student meets which of the teacher; found by the first pass, None for by index.
        self.pairs: Optional[Pairs] = None
        self._features: Dict[str, List[str]] = {}
        self._logits: Dict[str, List[str]] = {}
        self._picks: Dict[Tuple[str, bool], Pick] = {}

    @property
    def heads_at(self) -> Optional[str]:
        """Path of the head whose predictions choose the instances."""
        return None if self.picker is None else self.picker.heads_at

    def locate(self, side: str, model: nn.Module) -> List[str]:
        self._features[side] = self._expand(side, model, self.at[side], logits=False)
        self._logits[side] = self._expand(side, model, self.logits_at[side], True) if side in self.logits_at else []
        paths = [*self._features[side], *self._logits[side]]
        if self.heads_at is not None:
            head, _ = resolve(model, self.heads_at, side)
            need_head(type(self.picker).__name__, side, model, self.heads_at, head, DenseView)
            paths.append(self.heads_at)
        self.paths[side] = paths
        return paths

    def _expand(self, side: str, model: nn.Module, at: Any, logits: bool) -> List[str]:
        paths: List[str] = []
        for part in [at] if isinstance(at, str) else list(at):
            place = find(model, part) if part.startswith(MARK) else None
            if place is not None and place.pick is not None:
                self._picks[side, logits] = place.pick
            found = expand_paths(model, part if place is None else place.paths)
            if not logits:
                self.meanings[side].update({path: meaning_at(model, path) if place is None else place.meaning
                                            for path in found})
            paths.extend(found)
        return paths

    def keeps_calls(self, path: str) -> bool:
        return path == self.heads_at

    def read(self, student: Records, teacher: Records, batch: KDBatch,
             classes: Optional[ClassPair] = None) -> Comparison:
        own, theirs = (tuple(tensor for _, tensor in self.levels_of(side, records, logits=False))
                       for side, records in zip(SIDES, (student, teacher)))
        if classes is not None:
            (count, ours), (others, chosen) = classes
            own = tuple(take_classes(tensor, count, ours) for tensor in own)
            theirs = tuple(take_classes(tensor, others, chosen) for tensor in theirs)
        seen = [self._seen(side, records) for side, records in zip(SIDES, (student, teacher))]
        if self.pairs is None and not any(self.levels.values()):
            self.pairs = pair_levels(own, theirs, seen)
        own, theirs = self._paired('student', own), self._paired('teacher', theirs)
        if len(own) != len(theirs):
            raise ValueError(
                f'{self.title}: {len(own)} student levels {shapes_text(own)} and {len(theirs)} teacher levels '
                f'{shapes_text(theirs)}. Pick levels that belong together with levels=[...] or '
                'levels=dict(student=[...], teacher=[...])')
        own, theirs = at_grid(own, theirs, seen[0]), at_grid(theirs, own, seen[1])
        return Comparison(own, theirs, self._own_batch(student, teacher, batch, own))

    def _seen(self, side: str, records: Records) -> Optional[Seen]:
        return next((records[path].seen for path in self._features[side]), None)

    def _own_batch(self, student: Records, teacher: Records, batch: KDBatch, grids: Features) -> KDBatch:
        """The batch with the instances that the loss chooses and the logits of the region.

        Logits of a model that saw the batch at another size come to the grids of the features."""
        given = batch.given
        if self.heads_at is not None:
            views = []
            for records in (student, teacher):
                record = records[self.heads_at]
                views.append(dense_view(record.owner, record.calls[-1].output).detach())
            given = replace(given, instances=self.picker.choose_instances(*views, batch))
        if self.logits_at:
            own, theirs = (self._paired(side, [tensor.detach() for _, tensor in self.levels_of(side, records, True)],
                                        'logits of the region')
                           for side, records in zip(SIDES, (student, teacher)))
            own, theirs = (at_grid(levels, grids, self._seen(side, records)) for levels, side, records in zip(
                (own, theirs), SIDES, (student, teacher)))
            given = replace(given, student_logits=own, teacher_logits=theirs)
        return batch if given is batch.given else KDBatch(batch.targets, batch.info, given)

    def _paired(self, side: str, levels: Sequence[Any], what: str = 'features') -> Tuple[Any, ...]:
        """One entry a level, those that have a partner on the other side."""
        if self.pairs is None or not levels:
            return tuple(levels)
        wanted = [pair[SIDES.index(side)] for pair in self.pairs]
        if max(wanted) >= len(levels):
            raise ValueError(f'{self.title}: the {side} {what} have {len(levels)} levels {shapes_text(levels)}, and '
                             f'level {max(wanted)} is needed ({self.describe()}). Tap what gives a level for each, or '
                             'pick some with levels=[...]')
        return tuple(levels[index] for index in wanted)

    def unpicked(self, side: str) -> List[str]:
        """Paths whose outputs are all levels, as they are."""
        return [] if (side, False) in self._picks else self._features[side]

    def levels_of(self, side: str, records: Records, logits: bool = False) -> List[Tuple[str, Tensor]]:
        """Path and tensor of the levels of one side (of the region's taps with ``logits``), those that are kept."""
        paths, keep = (self._logits if logits else self._features)[side], self.levels[side]
        found = [(path, tensor) for path in paths for tensor in records[path]]
        if (side, logits) in self._picks:
            picked = self._picks[side, logits](tuple(tensor for _, tensor in found))
            found = [(paths[-1], tensor) for tensor in picked]
        if keep is not None and found:
            if any(not -len(found) <= index < len(found) for index in keep):
                raise ValueError(f'{self.title}: levels={list(keep)} but {side} {paths} gives {len(found)} levels: '
                                 f'{shapes_text([tensor for _, tensor in found])}')
            found = [found[index] for index in keep]
        return found

    def modules(self, side: str, model: nn.Module, records: Records) -> List[Any]:
        found = [module_at(model, path, side) for path, _ in self.levels_of(side, records, logits=False)]
        return list(self._paired(side, found))

    def meanings_of(self, side: str, records: Records) -> List[Optional[Meaning]]:
        found = [self.meanings[side].get(path) for path, _ in self.levels_of(side, records, logits=False)]
        return list(self._paired(side, found))

    def describe(self) -> str:
        chosen = [indices for indices in self.levels.values() if indices is not None]
        pairs = list(zip(*chosen)) if len(chosen) == 2 else self.pairs
        way = 'one level' if 1 in (len(pairs or ()), *map(len, chosen)) else None
        if pairs is None or all(s == t == index for index, (s, t) in enumerate(pairs)):
            return way or 'levels by index'
        way = way or ('levels as chosen' if chosen else 'levels by stride')
        return f'{way}: ' + ', '.join('student {} with teacher {}'.format(*('last' if index == -1 else index
                                                                            for index in pair)) for pair in pairs)
