"""Weights that change with the iteration number.

A schedule is a pure function of the step, so that a resumed run continues exactly: nothing has to be saved.  Steps
are training iterations counted from 0 (an iteration-based loop has no epochs).
"""

import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

from kd_mm.ops.checks import entries, from_zero, whole
from kd_mm.registry import MODELS, build


class Schedule:
    """A factor as a function of the training step."""

    def __call__(self, step: int, max_steps: int = 0) -> float:
        raise NotImplementedError


def _range(begin: int, end: Optional[int], max_steps: int) -> int:
    """Last step of a schedule; ``None`` and negative values count from the end of training."""
    last = max_steps if end is None else (max_steps + end if end < 0 else end)
    if last <= begin:
        raise ValueError(f'schedule ends at step {last}, which is not after begin={begin}'
                         + ('; give `end`, the length of training is not known here' if not max_steps else ''))
    return last


def _window(owner: str, name: str, value: Any) -> Tuple[int, Optional[int]]:
    """A pair (begin, end), checked; a ``begin`` of None is 0."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f'{owner}: {name}={value!r} must be a pair (begin, end)')
    begin, end = value
    return (0 if begin is None else whole(owner, f'{name}[0]', begin, 0),
            None if end is None else whole(owner, f'{name}[1]', end, None))


@MODELS.register_module()
class ConstantSchedule(Schedule):
    """``value`` at every step: for a factor of a :class:`ProductSchedule`.

    Args:
        value: the factor. Default 1.
    """

    def __init__(self, value: float = 1.0):
        self.value = from_zero('ConstantSchedule', 'value', value)

    def __call__(self, step: int, max_steps: int = 0) -> float:
        return self.value


@MODELS.register_module()
class LinearWarmup(Schedule):
    """``start`` up to step ``begin``, then linear to ``value`` at step ``begin + steps``, then constant.

    Args:
        steps: length of the ramp in iterations, at least 1. Default 500 (FRS; mmdet's own learning-rate warm-up).
        value: final factor. Default 1.
        start: factor before the ramp. Default 0.
        begin: first step of the ramp. Default 0.
    """

    def __init__(self, steps: int = 500, value: float = 1.0, start: float = 0.0, begin: int = 0):
        self.steps, self.begin = whole('LinearWarmup', 'steps', steps), whole('LinearWarmup', 'begin', begin, 0)
        self.value, self.start = from_zero('LinearWarmup', 'value', value), from_zero('LinearWarmup', 'start', start)

    def __call__(self, step: int, max_steps: int = 0) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start + (self.value - self.start) * done


@MODELS.register_module()
class CosineSchedule(Schedule):
    """Half a cosine from ``value`` at ``begin`` to ``final`` at ``end``; constant outside.

    Args:
        value: first factor. Default 1.
        final: last factor. Default 0.1 (DAMO-YOLO's distillation decays from 1 to 0.1).
        begin: first step. Default 0.
        end: last step; None is the end of training, a negative number counts back from it. Default None.
    """

    def __init__(self, value: float = 1.0, final: float = 0.1, begin: int = 0, end: Optional[int] = None):
        self.value = from_zero('CosineSchedule', 'value', value)
        self.final = from_zero('CosineSchedule', 'final', final)
        self.begin = whole('CosineSchedule', 'begin', begin, 0)
        self.end = None if end is None else whole('CosineSchedule', 'end', end, None)

    def __call__(self, step: int, max_steps: int = 0) -> float:
        last = _range(self.begin, self.end, max_steps)
        done = min(max((step - self.begin) / (last - self.begin), 0.0), 1.0)
        return self.final + (self.value - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))


@MODELS.register_module()
class WindowSchedule(Schedule):
    """``value`` inside any of the windows, 0 outside: distillation that starts late or stops early.

    Args:
        windows: pairs (begin, end), half open; an ``end`` of None is the end of training and a negative one counts back
            from it: ``[(0, -5000)]`` switches off for the last 5000 iterations (RTMDet's recipe stops with mosaic).
        value: factor inside. Default 1.
    """

    def __init__(self, windows: Sequence[Sequence[Optional[int]]], value: float = 1.0):
        self.windows = entries('WindowSchedule', 'windows', windows, _window)
        self.value = from_zero('WindowSchedule', 'value', value)

    def __call__(self, step: int, max_steps: int = 0) -> float:
        for begin, end in self.windows:
            if end is not None and end < 0:
                end = _range(begin, end, max_steps)
            if step >= begin and (end is None or step < end):
                return self.value
        return 0.0


@MODELS.register_module()
class ProductSchedule(Schedule):
    """Product of several schedules, for example a warm-up times a window.

    Args:
        schedules: configs of the factors.
    """

    def __init__(self, schedules: Sequence[Any]):
        if not isinstance(schedules, (list, tuple)):
            raise ValueError(f'ProductSchedule: schedules={schedules!r} must be a list of schedules')
        self.schedules = [build(schedule, Schedule, 'schedule') for schedule in schedules]

    def __call__(self, step: int, max_steps: int = 0) -> float:
        return math.prod(schedule(step, max_steps) for schedule in self.schedules)


class Weight:
    """A loss weight: a number, a list (one per level) or a schedule, or a dict of both.

    Args:
        value: a number; a list of numbers, one a level; a schedule config (``dict(type='CosineSchedule', ...)``); or
            ``dict(levels=[...], schedule=dict(type=...))``.
        name: the argument that it is, for messages. Default 'loss_weight'.
        owner: the class whose argument it is, for messages. Default 'Weight'.
        check: of each number, one of :mod:`kd_mm.ops.checks`. Default from 0.

    Raises:
        ValueError: any other value, or a number that ``check`` refuses (a negative or a non-finite one).
    """

    def __init__(self, value: Any, name: str = 'loss_weight', owner: str = 'Weight',
                 check: Callable[[str, str, Any], float] = from_zero):
        self.name, self.owner = name, owner
        levels, schedule = value, None
        if hasattr(value, 'get'):
            if 'type' in value:
                levels, schedule = 1.0, value
            elif set(value) == {'levels', 'schedule'}:
                levels, schedule = value['levels'], value['schedule']
            else:
                raise ValueError(f'{owner}: {name}={dict(value)!r}: a dict is a schedule (with `type`) or has the keys '
                                 '`levels` and `schedule`')
        elif isinstance(value, Schedule):
            levels, schedule = 1.0, value
        self.per_level = isinstance(levels, (list, tuple))
        self.numbers = (entries(owner, name, levels, check) if self.per_level else
                        [check(owner, name, levels)])
        self.schedule: Schedule = ConstantSchedule() if schedule is None else build(schedule, Schedule, 'schedule')

    def check(self, levels: int, max_steps: int = 0) -> None:
        """Whether the weight fits.

        Raises:
            ValueError: another number of levels than weights, or a schedule that is empty within ``max_steps``.
        """
        if self.per_level and len(self.numbers) != levels:
            raise ValueError(f'{self.owner}: {self.name} has {len(self.numbers)} entries, one a level, but there are '
                             f'{levels} levels')
        if max_steps:
            self.schedule(0, max_steps)

    def at(self, step: int, max_steps: int, levels: int) -> List[float]:
        """Weights of ``levels`` levels at ``step``."""
        self.check(levels)
        factor = self.schedule(step, max_steps)
        numbers = self.numbers if self.per_level else self.numbers * levels
        return [number * factor for number in numbers]

    def is_zero(self, step: int, max_steps: int) -> bool:
        """Whether every level's weight is 0 at ``step``."""
        return not any(self.numbers) or self.schedule(step, max_steps) == 0.0
