"""One entry of ``losses``: where to tap, how to adapt, what to compute; and the list of what is wrong with a config."""

import dataclasses
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.adapters import Adapter, auto_adapter
from kd_mm.losses.base import KDLoss
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.taps import expand_paths, resolve
from kd_mm.teacher import eval_mode
from kd_mm.types import Features, KDBatch

TAP_KEYS = ('at', 'student_at', 'teacher_at', 'levels', 'adapter', 'region')


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
            ``region`` besides the loss's own.
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
        try:
            self.loss = build({key: value for key, value in cfg.items() if key not in TAP_KEYS}, KDLoss, 'loss')
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
        #: every tap of a side: those of the features first, then those of the region's logits.
        self.student_paths: List[str] = []
        self.teacher_paths: List[str] = []
        self._features: Dict[str, int] = {}

    def find_paths(self, side: str, model: nn.Module) -> List[str]:
        """Module paths of all taps of one side, patterns expanded."""
        paths = expand_paths(model, getattr(self, f'{side}_at'))
        self._features[side] = len(paths)
        at = {} if self.region is None else self.region.logits_at
        if side in at:
            paths = [*paths, *expand_paths(model, at[side])]
        setattr(self, f'{side}_paths', paths)
        return paths

    @property
    def needs_boxes(self) -> bool:
        return self.loss.needs_boxes or (self.region is not None and self.region.needs_boxes)

    @property
    def label(self) -> str:
        """Name for log entries, without the word that would make the host back-propagate them."""
        return self.name[len('loss_'):].replace('loss', '').strip('_') or 'kd'

    def collect(self, student: Dict[str, Features], teacher: Dict[str, Features]) -> Tuple[Features, Features]:
        """The tapped levels of both sides.

        Raises:
            ValueError: a level does not exist, or the counts differ.
        """
        sides = [tuple(tensor for _, tensor in self._levels_of(side, records, logits=False))
                 for side, records in (('student', student), ('teacher', teacher))]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f'{self.name}: {len(sides[0])} student levels {_shapes(sides[0])} and {len(sides[1])} teacher levels '
                f'{_shapes(sides[1])}. Pick levels that belong together with levels=[...] or '
                'levels=dict(student=[...], teacher=[...])')
        return sides[0], sides[1]

    def _levels_of(self, side: str, records: Dict[str, Features], logits: bool) -> List[Tuple[str, Tensor]]:
        """Path and tensor of the levels of one side, those that ``levels`` keeps."""
        all_paths, split = getattr(self, f'{side}_paths'), self._features[side]
        paths, keep = all_paths[split:] if logits else all_paths[:split], getattr(self, f'{side}_levels')
        found = [(path, tensor) for path in paths for tensor in records[path]]
        if keep is not None and found:
            if any(not -len(found) <= index < len(found) for index in keep):
                raise ValueError(f'{self.name}: levels={list(keep)} but {side} {paths} gives {len(found)} levels: '
                                 f'{_shapes([tensor for _, tensor in found])}')
            found = [found[index] for index in keep]
        return found

    def with_logits(self, batch: KDBatch, student: Dict[str, Features], teacher: Dict[str, Features]) -> KDBatch:
        """The batch with what the region's own taps recorded; the batch itself for a region without taps."""
        if self.region is None or not self.region.logits_at:
            return batch
        return dataclasses.replace(
            batch,
            student_logits=tuple(tensor.detach() for _, tensor in self._levels_of('student', student, logits=True)),
            teacher_logits=tuple(tensor.detach() for _, tensor in self._levels_of('teacher', teacher, logits=True)))

    def bind(self, student_model: nn.Module, teacher_model: nn.Module, student: Dict[str, Features],
             teacher: Dict[str, Features]) -> None:
        """Show the loss the modules behind its levels."""
        self.loss.bind(*([resolve(model, path, side)[0] for path, _ in self._levels_of(side, records, logits=False)]
                         for side, model, records in (('student', student_model, student),
                                                      ('teacher', teacher_model, teacher))))

    def prepare(self, student: Features, teacher: Features) -> None:
        """Choose the adapter and create every trainable part, for features like these."""
        if self.adapter_cfg == 'auto':
            self.adapter = auto_adapter(self.loss, student, teacher)
        if self.adapter is not None:
            self.adapter.prepare(student, teacher)
            with eval_mode(self.adapter):  # a batch norm in it must not learn from random images
                student, teacher = self.adapter(student, teacher)
        try:
            self.loss.check_shapes(student, teacher)
        except ValueError as error:
            mend = 'Remove adapter=None' if self.adapter_cfg is None else 'Choose another adapter or other taps'
            raise ValueError(f'{self.name}: {error} (adapter={self.adapter_cfg!r}). {mend}') from error
        self.loss.prepare(student, teacher)

    def per_level(self, student: Features, teacher: Features, batch: KDBatch) -> List[Tensor]:
        """Unweighted losses, one a level."""
        if self.adapter is not None:
            student, teacher = self.adapter(student, teacher)
        return self.loss.per_level(student, teacher, batch, self.region)


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
