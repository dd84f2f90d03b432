"""One entry of ``losses``: where to tap, how to adapt, what to compute; and the list of what is wrong with a config."""

import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.adapters import Adapter, auto_adapter
from kd_mm.levels import Pairs, common_classes, pair_levels, take_classes
from kd_mm.losses.base import KDLoss
from kd_mm.losses.head_base import HeadLoss
from kd_mm.places import MARK, SHARED, find
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.taps import Recorded, TokenSize, expand_paths, looks_like_token_size, module_at, resolve, token_sizes
from kd_mm.teacher import eval_mode
from kd_mm.types import Features, KDBatch
from kd_mm.views import dense_view, roi_head

Pick = Callable[[Features], Features]
TAP_KEYS = ('at', 'student_at', 'teacher_at', 'levels', 'adapter', 'region', 'classes', 'teacher', 'proposals',
            'tokens')
#: ``classes=`` for every class name that both models have.
COMMON = 'common'


def _levels(value: Any) -> Tuple[Optional[List[int]], Optional[List[int]]]:
    """Level indices of student and teacher from ``levels=``: a list for both, or a dict with both sides."""
    if value is None:
        return None, None
    if hasattr(value, 'get'):
        if set(value) - {'student', 'teacher'}:
            raise ValueError(f'levels={dict(value)!r} may have the keys `student` and `teacher` only')
        return value.get('student'), value.get('teacher')
    return list(value), list(value)


class Term(nn.Module):
    """One entry of ``losses``: where to tap, how to adapt, what to compute.

    Args:
        name: key of the loss dict; must start with ``loss_``.
        cfg: the loss's config with the keys ``at`` (or ``student_at`` and ``teacher_at``), ``levels``, ``adapter`` and
            ``region`` besides the loss's own; for a logit loss between models of different classes ``classes``
            (``'common'`` or a list of names); with several teachers ``teacher``: the name of one, or names whose
            outputs are averaged.  At a place of shared proposals (``'@roi_logits'`` and its like, see
            :mod:`kd_mm.views.roi_head`) ``levels`` are the stages of a cascade and ``proposals`` says whose they are:
            ``'student'`` (default) or ``'teacher'``.  ``tokens`` says what map the (N, L, C) tokens at the taps make:
            (H, W) in cells, or one whole number, the stride in pixels; for both sides or ``dict(student=...,
            teacher=...)``.  Default: from the call or the input, see :class:`kd_mm.taps.Tap`.  (Of a loss with an
            argument ``tokens`` of its own, any other value is that.)
    """

    def __init__(self, name: str, cfg: Any):
        super().__init__()
        if not name.startswith('loss_') or not name.isidentifier():
            raise ValueError(f'{name!r}: a loss name must start with `loss_` and be an identifier; the host '
                             'back-propagates only keys that contain `loss`')
        if not hasattr(cfg, 'items'):
            raise ValueError(f'{name}: {cfg!r} is not a config; write {name}=dict(type=..., at=...)')
        self.name = name
        cfg = dict(cfg)
        both, student, teacher = (cfg.get(key) for key in TAP_KEYS[:3])
        if both is not None and (student is not None or teacher is not None):
            raise ValueError(f'{name}: give either `at` or `student_at` with `teacher_at`')
        if (both or student) is None or (both or teacher) is None:
            raise ValueError(f"{name}: where to tap? Give `at` (a module path such as 'neck'), or `student_at` and "
                             '`teacher_at`')
        self.student_at, self.teacher_at = both or student, both or teacher
        self.student_levels, self.teacher_levels = _levels(cfg.get('levels'))
        #: the place of shared proposals; None for taps.
        self.shared: Optional[str] = self._shared_place(cfg.get('proposals'))
        of_taps = looks_like_token_size(cfg.get('tokens'))
        try:
            self.tokens: Dict[str, Optional[TokenSize]] = token_sizes(cfg['tokens'] if of_taps else None)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error
        self.proposals = cfg.get('proposals', roi_head.PROPOSALS[0])
        try:
            self.loss = build({key: value for key, value in cfg.items()
                               if key not in TAP_KEYS or (key == 'tokens' and not of_taps)}, KDLoss, 'loss')
            region = cfg.get('region')
            self.region = None if region is None else build(region, RegionMask, 'region')
            self.adapter_cfg = cfg.get('adapter', 'auto')
            self.adapter: Optional[Adapter] = None
            if self.adapter_cfg not in (None, 'auto'):
                if isinstance(self.adapter_cfg, str):
                    raise ValueError(f"adapter={self.adapter_cfg!r}: give 'auto', None or a dict with `type`")
                self.adapter = build(self.adapter_cfg, Adapter, 'adapter')
        except (KeyError, ValueError) as error:
            raise ValueError(f'{name}: {error.args[0]}') from error
        if self.shared and (self.region is not None or self.loss.needs_boxes or self.loss.needs_seg_map
                            or self.of_heads or self.loss.heads_at is not None):
            raise ValueError(f'{name}: {type(self.region or self.loss).__name__} looks at images, and {self.shared!r} '
                             'gives rows of proposals. Tap maps')
        classes = cfg.get('classes')
        if classes is not None and (not self.of_classes or (isinstance(classes, str) and classes != COMMON)):
            raise ValueError(f'{name}: classes={classes!r} is for logit losses, and either {COMMON!r} or a list of '
                             'class names')
        self.classes = classes
        sources = cfg.get('teacher')
        self.sources: Tuple[str, ...] = (sources, ) if isinstance(sources, str) else tuple(sources or ())
        if self.loss.heads_at is not None and len(self.sources) > 1:
            raise ValueError(f'{name}: {type(self.loss).__name__} looks at the head of one teacher; name one')
        if self.region is not None and self.region.logits_at and len(self.sources) > 1:
            raise ValueError(f'{name}: {type(self.region).__name__} looks at the logits of one teacher; name one')
        given = [key for key in ('levels', 'adapter', 'region', 'classes') if cfg.get(key) is not None]
        given += ['tokens'] if of_taps else []
        if self.of_heads and (given or len(self.sources) > 1):
            raise ValueError(f'{name}: {type(self.loss).__name__} compares one head with one: remove '
                             f'{", ".join(given) or "all teachers but one"} (loss_weight may be a list, with 0 for a '
                             'level that is not wanted)')
        #: every tap of a side: those of the features first, then those of the region's logits.
        self.student_paths: List[str] = []
        self.teacher_paths: List[str] = []
        self._features: Dict[str, int] = {}
        #: taps of a side that are neither features nor logits: the head that the loss asks for its instances.
        self._heads: Dict[str, str] = {}
        self._named: Dict[str, Dict[str, str]] = {}  # of a head loss: name -> path
        self._picks: Dict[Tuple[str, bool], Pick] = {}
        self.pairs: Optional[Pairs] = None
        self._chosen: Dict[str, Tuple[int, List[int]]] = {}
        self._stages: List[Tuple[int, int]] = []
        self._rows: List[roi_head.Compared] = []

    def _shared_place(self, proposals: Any) -> Optional[str]:
        """The place of shared proposals that ``at`` names, if it names one.

        Raises:
            ValueError: only one side names it, or ``proposals`` is not possible.
        """
        sides = [at for at in (self.student_at, self.teacher_at) if isinstance(at, str) and at in SHARED]
        if sides and self.student_at != self.teacher_at:
            raise ValueError(f'{self.name}: {sides[0]!r} asks both models about the same proposals: write at='
                             f'{sides[0]!r}')
        if proposals is not None and (not sides or sides[0].startswith('@rpn')
                                      or proposals not in roi_head.PROPOSALS):
            raise ValueError(f'{self.name}: proposals={proposals!r} must be one of '
                             f'{", ".join(map(repr, roi_head.PROPOSALS))}, at a place of RoIs such as '
                             "'@roi_logits'")
        return sides[0] if sides else None

    def locate(self, side: str, model: nn.Module) -> List[str]:
        """Find this term's tap paths in one model.

        Args:
            side: ``'student'`` or ``'teacher'``.

        Raises:
            KeyError: a place that the model does not have.
            ValueError: a head loss cannot use what is there.
        """
        if self.shared:
            paths = roi_head.proposal_taps(self.shared, side, model, self.proposals)
            setattr(self, f'{side}_paths', paths)
            return paths
        if isinstance(self.loss, HeadLoss):
            return self._locate_head(self.loss, side, model)
        paths = self._expand(side, model, getattr(self, f'{side}_at'), logits=False)
        self._features[side] = len(paths)
        if self.region is not None and side in self.region.logits_at:
            paths.extend(self._expand(side, model, self.region.logits_at[side], logits=True))
        if self.loss.heads_at is not None:
            resolve(model, self.loss.heads_at, side)
            self._heads[side] = self.loss.heads_at
            paths.append(self.loss.heads_at)
        setattr(self, f'{side}_paths', paths)
        return paths

    def _expand(self, side: str, model: nn.Module, at: Any, logits: bool) -> List[str]:
        paths: List[str] = []
        for part in _parts(at):
            place = find(model, part) if part.startswith(MARK) else None
            if place is not None and place.pick is not None:
                self._picks[side, logits] = place.pick
            paths.extend(expand_paths(model, part if place is None else place.paths))
        return paths

    def _locate_head(self, loss: HeadLoss, side: str, model: nn.Module) -> List[str]:
        """The paths of a head and of what its loss reads below it."""
        at = getattr(self, f'{side}_at')
        if not isinstance(at, str) or at.startswith(MARK) or any(letter in at for letter in '*?['):
            raise ValueError(f"{type(loss).__name__} compares one head with one: {side} {at!r} is no path of a head, "
                             "such as 'bbox_head'")
        head, method = resolve(model, at, side)
        if method != 'forward':
            raise ValueError(f'{side} {at!r} is a method, and {type(loss).__name__} needs a head')
        self._named[side] = loss.locate(side, model, at, head)
        paths = list(self._named[side].values())
        setattr(self, f'{side}_paths', paths)
        return paths

    def map_classes(self, student: Sequence[str], teacher: Sequence[str]) -> None:
        """Settle which logits of the two models belong together (``classes=``).

        Raises:
            ValueError: a class is missing.
        """
        wanted = None if isinstance(self.classes, str) else self.classes
        try:
            own, theirs = common_classes(student, teacher, wanted)
        except ValueError as error:
            raise ValueError(f'{self.name}: {error}') from error
        self._chosen = {'student': (len(student), own), 'teacher': (len(teacher), theirs)}

    @property
    def of_heads(self) -> bool:
        """Whether the loss compares two heads, and taps whatever it needs of them."""
        return isinstance(self.loss, HeadLoss)

    @property
    def of_classes(self) -> bool:
        """Whether both models must have the same classes."""
        return self.shared in roi_head.OF_CLASSES if self.shared else self.loss.logits

    def structured(self, path: str) -> bool:
        """Whether a tap of this term must keep the calls."""
        return self.of_heads or bool(self.shared) or path in self._heads.values()

    @property
    def needs_boxes(self) -> bool:
        return self.loss.needs_boxes or (self.region is not None and self.region.needs_boxes)

    @property
    def label(self) -> str:
        """Name for log entries, without the word that would make the host back-propagate them."""
        return self.name[len('loss_'):].replace('loss', '').strip('_') or 'kd'

    def collect(self, student: Mapping[str, Recorded], teacher: Mapping[str, Recorded]) -> Tuple[Any, Any]:
        """The tapped levels of both sides; for a head loss the views of both heads.

        Raises:
            ValueError: a level does not exist, or the counts differ.
        """
        if isinstance(self.loss, HeadLoss):
            return self.loss.views(*({name: records[path] for name, path in self._named[side].items()}
                                     for side, records in (('student', student), ('teacher', teacher))))
        if self.shared:
            return self._collect_rows(self.shared, student, teacher)
        own, theirs = self._side('student', student), self._side('teacher', teacher)
        if self.student_levels is None and self.teacher_levels is None and self.pairs is None:
            self.pairs = pair_levels(own, theirs)
        own, theirs = self._paired(own, theirs)
        if len(own) != len(theirs):
            raise ValueError(
                f'{self.name}: {len(own)} student levels {_shapes(own)} and {len(theirs)} teacher levels '
                f'{_shapes(theirs)}. Pick levels that belong together with levels=[...] or '
                'levels=dict(student=[...], teacher=[...])')
        return own, theirs

    def _collect_rows(self, place: str, student: Mapping[str, Recorded],
                      teacher: Mapping[str, Recorded]) -> Tuple[Features, Features]:
        """What both heads say about the same proposals, one level a stage."""
        if place.startswith('@rpn'):
            views = [roi_head.rpn_views(student, teacher)]
        else:
            views = roi_head.roi_views(place, student, teacher, self._stages, self.proposals)
        chosen = None
        if self._chosen:
            count, own = self._chosen['student']
            chosen = count, (own, self._chosen['teacher'][1])
        self._rows = [roi_head.compared(place, *pair, chosen, self._chosen['teacher'][0] if self._chosen else 0)
                      for pair in views]
        return tuple(rows.student for rows in self._rows), tuple(rows.teacher for rows in self._rows)

    def _paired(self, student: Sequence[Any], teacher: Sequence[Any]) -> Tuple[Tuple[Any, ...], Tuple[Any, ...]]:
        """One entry a level of each side, those that belong together."""
        if self.pairs is None or len(student) <= max(s for s, _ in self.pairs) or len(teacher) <= max(
                t for _, t in self.pairs):
            return tuple(student), tuple(teacher)
        return tuple(student[s] for s, _ in self.pairs), tuple(teacher[t] for _, t in self.pairs)

    def _side(self, side: str, records: Mapping[str, Recorded]) -> Features:
        """The levels of one side, before they are paired."""
        found = tuple(tensor for _, tensor in self._levels_of(side, records, logits=False))
        if side in self._chosen:
            found = tuple(take_classes(tensor, *self._chosen[side]) for tensor in found)
        return found

    def _levels_of(self, side: str, records: Mapping[str, Recorded], logits: bool) -> List[Tuple[str, Tensor]]:
        """Path and tensor of the levels of one side (of the region's taps with ``logits``), those that are kept."""
        every, split = getattr(self, f'{side}_paths'), self._features[side]
        every = every[:-1] if side in self._heads else every
        paths, keep = every[split:] if logits else every[:split], getattr(self, f'{side}_levels')
        found = [(path, tensor) for path in paths for tensor in records[path]]
        if (side, logits) in self._picks:
            picked = self._picks[side, logits](tuple(tensor for _, tensor in found))
            found = [(paths[-1], tensor) for tensor in picked]
        if keep is not None and found:
            if any(not -len(found) <= index < len(found) for index in keep):
                raise ValueError(f'{self.name}: levels={list(keep)} but {side} {paths} gives {len(found)} levels: '
                                 f'{_shapes([tensor for _, tensor in found])}')
            found = [found[index] for index in keep]
        return found

    def with_logits(self, batch: KDBatch, student: Mapping[str, Recorded],
                    teacher: Mapping[str, Recorded]) -> KDBatch:
        """The batch with what the region's own taps recorded, and with the instances that the loss has chosen.

        For rows of proposals a batch that knows the rows, and nothing of the images that they are not.
        """
        if self.shared:
            rows, self._rows = self._rows, []
            targets = [part.targets for part in rows if part.targets is not None]
            return KDBatch(input_shape=batch.input_shape, row_labels=[part.labels for part in rows],
                           row_targets=targets or None, row_totals=[part.total for part in rows], step=batch.step,
                           max_steps=batch.max_steps, seed=batch.seed)
        if self._heads:
            views = []
            for side, records in (('student', student), ('teacher', teacher)):
                record = records[self._heads[side]]
                views.append(dense_view(record.owner, record.calls[-1].output).detach())
            batch = dataclasses.replace(batch, instances=self.loss.choose_instances(*views, batch))
        if self.region is None or not self.region.logits_at:
            return batch
        own, theirs = self._paired(*([tensor.detach() for _, tensor in self._levels_of(side, records, logits=True)]
                                     for side, records in (('student', student), ('teacher', teacher))))
        return dataclasses.replace(batch, student_logits=own, teacher_logits=theirs)

    def bind(self, student_model: nn.Module, teacher_model: nn.Module, student: Mapping[str, Recorded],
             teacher: Mapping[str, Recorded]) -> None:
        """Show the loss the modules behind its levels (a head loss has seen its heads already)."""
        if self.of_heads or self.shared:
            return
        self.loss.bind(*map(list, self._paired(*(
            [module_at(model, path, side) for path, _ in self._levels_of(side, records, logits=False)]
            for side, model, records in (('student', student_model, student), ('teacher', teacher_model, teacher))))))

    def pair_stages(self, student: nn.Module, teacher: nn.Module) -> None:
        """Settle which stages of two RoI heads meet; nothing to do for taps.

        Raises:
            ValueError: they do not fit.
        """
        if self.shared is None or not self.student_paths or not self.teacher_paths:
            return
        stages = roi_head.stage_pairs(self.shared, student, teacher, self.student_levels, self.teacher_levels,
                                      self.proposals)
        if self._stages and self._stages != stages:
            raise ValueError('the RoI heads of its teachers have different numbers of stages; give each a loss of its '
                             'own')
        self._stages = stages
        if self.shared.startswith('@rpn') and not roi_head.same_anchors(student.rpn_head, teacher.rpn_head):
            raise ValueError(f'{self.shared!r}: the proposal heads of student and teacher have different anchors')

    def describe_levels(self) -> str:
        """Which level met which, where it is not simply one after the other."""
        if self.shared is not None and self.shared.startswith('@rpn'):
            return 'sampled anchors'
        if self.shared is not None:
            return 'stages: ' + ', '.join(f'student {s} with teacher {t}' for s, t in self._stages)
        if self.pairs is None or all(s == t == index for index, (s, t) in enumerate(self.pairs)):
            return 'levels by index'
        return 'levels by stride: ' + ', '.join(f'student {s} with teacher {t}' for s, t in self.pairs)

    def prepare(self, student: Any, teacher: Any) -> None:
        """Choose the adapter and create every trainable part, for features (or views) like these."""
        if self.adapter_cfg == 'auto' and not self.of_heads:
            self.adapter = auto_adapter(self.loss, student, teacher)
        if self.adapter is not None:
            self.adapter.prepare(student, teacher)
            with eval_mode(self.adapter):  # a batch norm in it must not learn from random images
                student, teacher = self.adapter(student, teacher)
        try:
            self.loss.check_shapes(student, teacher)
        except ValueError as error:
            if self.of_heads:
                raise
            mend = 'Remove adapter=None' if self.adapter_cfg is None else 'Choose another adapter or other taps'
            raise ValueError(f'{self.name}: {error} (adapter={self.adapter_cfg!r}). {mend}') from error
        self.loss.prepare(student, teacher)

    def per_level(self, student: Any, teacher: Any, batch: KDBatch) -> List[Tensor]:
        """Unweighted losses, one a level."""
        if self.adapter is not None:
            student, teacher = self.adapter(student, teacher)
        return self.loss.per_level(student, teacher, batch, self.region)


def _parts(at: Any) -> List[str]:
    return [at] if isinstance(at, str) else list(at)


def _shapes(features: Sequence[Tensor]) -> str:
    return '[' + ', '.join('x'.join(map(str, tensor.shape)) for tensor in features) + ']'


class ConfigProblems(ValueError):
    """A configuration is wrong; ``found`` has one sentence for each problem."""

    def __init__(self, message: str, found: Sequence[str] = ()):
        super().__init__(message)
        self.found = list(found)


class Problems:
    """Everything that is wrong with a configuration, for one error."""

    def __init__(self) -> None:
        self.found: List[str] = []

    def add(self, problem: Any) -> None:
        text = problem.args[0] if isinstance(problem, (KeyError, ValueError)) and problem.args else str(problem)
        if text not in self.found:
            self.found.append(str(text))

    def raise_any(self) -> None:
        if self.found:
            lines = '\n'.join(f'  {number}. {text}' for number, text in enumerate(self.found, 1))
            raise ConfigProblems(f'kd_mm: {len(self.found)} problem(s) in the distillation config:\n{lines}',
                                 self.found)
