"""One entry of ``losses``: where to tap, how to adapt, what to compute; and the list of what is wrong with a config."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.adapters import Adapter, auto_adapter
from kd_mm.losses.base import KDLoss
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
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
        self.student_paths: List[str] = []
        self.teacher_paths: List[str] = []

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
        sides = []
        for records, paths, keep, side in ((student, self.student_paths, self.student_levels, 'student'),
                                           (teacher, self.teacher_paths, self.teacher_levels, 'teacher')):
            found = tuple(tensor for path in paths for tensor in records[path])
            if keep is not None:
                if any(not -len(found) <= index < len(found) for index in keep):
                    raise ValueError(f'{self.name}: levels={list(keep)} but {side} {paths} gives {len(found)} levels: '
                                     f'{_shapes(found)}')
                found = tuple(found[index] for index in keep)
            sides.append(found)
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f'{self.name}: {len(sides[0])} student levels {_shapes(sides[0])} and {len(sides[1])} teacher levels '
                f'{_shapes(sides[1])}. Pick levels that belong together with levels=[...] or '
                'levels=dict(student=[...], teacher=[...])')
        return sides[0], sides[1]

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


def _shapes(features: Features) -> str:
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
