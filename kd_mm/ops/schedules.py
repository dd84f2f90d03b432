"""Weights that change with the iteration number.

A schedule is a pure function of the step, so that a resumed run continues exactly: nothing has to be saved.  Steps
are training iterations counted from 0 (an iteration-based loop has no epochs).

:class:`AutoWeight` is the settings of a factor that is measured.  What was measured is kept by
:mod:`kd_mm.engine.balance`; here its factor is 1.
"""

import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

from kd_mm.ops.checks import entries, from_zero, number, one_of, positive, whole
from kd_mm.registry import MODELS, build


class Schedule:
    """A factor as a function of the training step.

    Attributes:
        auto: the settings of the factor that is measured and multiplied with this one; None for none.
    """

    auto: Optional['AutoWeight'] = None

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
        schedules: configs of the factors; ``'auto'`` or an :class:`AutoWeight` may be one of them.
    """

    def __init__(self, schedules: Sequence[Any]):
        if not isinstance(schedules, (list, tuple)) or not schedules:
            raise ValueError(f'ProductSchedule: schedules={schedules!r} must be a list of schedules')
        self.schedules = [_schedule(schedule) for schedule in schedules]
        found = [schedule.auto for schedule in self.schedules if schedule.auto is not None]
        if len(found) > 1:
            raise ValueError('ProductSchedule: schedules has more than one AutoWeight; a term has one share')
        self.auto = found[0] if found else None

    def __call__(self, step: int, max_steps: int = 0) -> float:
        return math.prod(schedule(step, max_steps) for schedule in self.schedules)


@MODELS.register_module()
class AutoWeight(Schedule):
    """Holds a term at a chosen share of the task's pull, instead of a number from another paper.

    The weight of the term is ``share * g_task / g_term``: ``g_term`` is the norm of the gradient of the term (with the
    weight 1) with respect to all that its student taps recorded, as one vector, and ``g_task`` that of the student's
    own losses (with ``task_loss_weight``) with respect to the same tensors.  Both are measured in the step's own
    forward pass, by a backward pass that ends at the taps, on all ranks together.  Between the measurements the weight
    stays; it follows the running geometric mean of the measured quotients.  Levels keep their weights relative to
    each other, and a schedule beside it is multiplied: with a warm-up the share rises, with a decay it falls.

    A term is measured in its 1st, 2nd, 3rd, 5th, 9th, 17th, ... step, where a training changes fast, and then in every
    ``every``-th.  A measurement that gives nothing (no object in the batch, no gradient, an overflow) is left out and
    tried again in the next step; until the first one the weight is 0.

    Outside of a Distiller, ``loss(student, teacher)``, there is no task, and the factor is 1.

    Args:
        share: ``g_term / g_task`` that is aimed at, above 0. Default 1: the term pulls as hard as the task [ours].
        every: number of steps of the term from one measurement to the next, from 1. Default 50 [ours].
        by: ``'gradient'`` as above; ``'loss'`` uses the values of the losses instead of the norms, which costs nothing
            and says less: two losses of one value may pull with very different strength. Default 'gradient'.
        smoothing: weight of the earlier measurements in the running mean of the logarithm, from 0 (the last one alone)
            to below 1. The first few are averaged. Default 0.8 [ours].
        bounds: (lowest, highest) weight, without the schedule beside it. Default (1e-9, 1e9): guards against what is
            no pull at all [ours].
        warmup: over so many steps of the term its weight rises linearly to the full one; 0 for none. Default 100
            [ours]: adapters start random, and what they send back first is noise.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, share: float = 1.0, every: int = 50, by: str = 'gradient', smoothing: float = 0.8,
                 bounds: Sequence[float] = (1e-9, 1e9), warmup: int = 100):
        owner = type(self).__name__
        self.share, self.every = positive(owner, 'share', share), whole(owner, 'every', every)
        self.by = one_of(owner, 'by', by, ('gradient', 'loss'))
        self.smoothing = number(owner, 'smoothing', smoothing, 0, 1)
        if self.smoothing == 1:
            raise ValueError(f'{owner}: smoothing={smoothing!r} must be below 1, or nothing is learned after the first '
                             'measurement')
        limits = entries(owner, 'bounds', bounds, positive)
        if len(limits) != 2 or limits[0] >= limits[1]:
            raise ValueError(f'{owner}: bounds={bounds!r} must be a pair (lowest, highest)')
        self.bounds = limits[0], limits[1]
        self.warmup = whole(owner, 'warmup', warmup, 0)
        self.auto = self

    def __call__(self, step: int, max_steps: int = 0) -> float:
        return 1.0


#: ``loss_weight='auto'``: an :class:`AutoWeight` with its defaults.
AUTO = 'auto'


def _schedule(value: Any) -> Schedule:
    """A schedule from its config or from :data:`AUTO`."""
    return AutoWeight() if isinstance(value, str) and value == AUTO else build(value, Schedule, 'schedule')


class Weight:
    """A loss weight: a number, a list (one per level) or a schedule, or a dict of both.

    Args:
        value: a number; a list of numbers, one a level; a schedule config (``dict(type='CosineSchedule', ...)``);
            ``'auto'`` (an :class:`AutoWeight`); or ``dict(levels=[...], schedule=...)`` with one of the last two.
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
        elif isinstance(value, Schedule) or (isinstance(value, str) and value == AUTO):
            levels, schedule = 1.0, value
        self.per_level = isinstance(levels, (list, tuple))
        if any(isinstance(part, str) and part.lower() == AUTO for part in (levels if self.per_level else [levels])):
            raise ValueError(f'{owner}: {name}={value!r}: write {name}={AUTO!r}, alone; for a factor a level '
                             f'{name}=dict(levels=[...], schedule={AUTO!r})')
        self.numbers = (entries(owner, name, levels, check) if self.per_level else
                        [check(owner, name, levels)])
        self.schedule: Schedule = ConstantSchedule() if schedule is None else _schedule(schedule)
        if self.auto is not None and name != 'loss_weight':
            raise ValueError(f'{owner}: {name}={value!r}: AutoWeight balances a loss against the task; for {name} give '
                             'a number or another schedule')

    @property
    def auto(self) -> Optional[AutoWeight]:
        """The settings of a weight that is measured; None for all others."""
        return self.schedule.auto

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
