"""What stops a training: values that are not finite, and terms from which nothing is learned.  And what is said of one
that goes on: terms that run away, or that are all there is."""

from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

import torch
from torch import Tensor

from kd_mm.engine.step import Evaluation, Step
from kd_mm.ops import distributed

#: A term whose gradient was zero in so many steps from its first one teaches nothing, and stops the training.
PATIENCE = 100
#: Iterations whose mean is looked at.
WINDOW = 10
#: A term that has grown to so many times its first value, and is so many times the student's own losses, runs away.  (A
#: term that starts at nearly nothing, as beside an average of the student, may grow and stay small.)
RISE, LARGE = 30.0, 10.0
#: So many times the student's own losses: these may not count beside the term.  Of the methods that helped in our
#: tables none had more than 3000.
HEAVY = 1e4
#: Name of the model that learns, and of the term.
Key = Tuple[str, str]


class Watch:
    """Looks at the values of a training without slowing it down.

    On an accelerator the look at finite values waits until the next step (or the next save), where it costs no
    synchronisation of its own; a term's gradient is looked at in its first steps only, until there is one.
    """

    def __init__(self) -> None:
        self._pending: List[Tuple[Tensor, List[str], int]] = []
        #: terms that were seen to have a gradient
        self.proven: Set[Key] = set()
        self._idle: Dict[Key, int] = {}  # steps of the others so far

    def values(self, values: Sequence[Tensor], names: Sequence[str], step: int) -> None:
        """Note values of a step, of all ranks; on a CPU they are looked at right away.

        Args:
            values: scalars.
            names: of each, for the message.
            step: number of the iteration.

        Raises:
            FloatingPointError: see :meth:`raise_if_not_finite`.
        """
        if not values:
            return
        # All ranks stop together: one that goes on would wait for the others' gradients for ever.
        flags = distributed.of_ranks(torch.stack([torch.isfinite(value.detach()) for value in values]))
        self._pending.append((flags, list(names), step))
        if flags.device.type == 'cpu':
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """Stop if a value that was noted is not finite.

        Raises:
            FloatingPointError: naming term, level and step.
        """
        pending, self._pending = self._pending, []
        for flags, where, step in pending:
            if not bool(flags.all()):
                names = [name + (f' (on rank {", ".join(map(str, ranks))})' if len(flags) > 1 else '')
                         for name, column in zip(where, flags.t().tolist())
                         for ranks in [[rank for rank, flag in enumerate(column) if not flag]] if ranks]
                raise FloatingPointError(
                    f'distillation loss is not finite at step {step}: {"; ".join(names)}. Lower loss_weight or the '
                    'learning rate, clip gradients (optim_wrapper.clip_grad), or look for non-finite student features')

    def gradients(self, step: Step, found: Sequence[Evaluation]) -> None:
        """Stop for a term that teaches nothing; a term is left alone once it was seen to have a gradient.

        Raises:
            RuntimeError: its gradient was exactly 0 in :data:`PATIENCE` steps.
        """
        for evaluation in found:
            key = (evaluation.term.learner, evaluation.term.name)
            if key in self.proven:
                continue
            if step.has_gradient(evaluation):
                self.proven.add(key)
                self._idle.pop(key, None)
                continue
            self._idle[key] = self._idle.get(key, 0) + 1
            if self._idle[key] >= PATIENCE:
                value = float(evaluation.total.detach())
                raise RuntimeError(
                    f'{evaluation.term.title}: in {PATIENCE} steps its gradient on the student was exactly 0 (its '
                    f'value now is {value:.4g}), so nothing is learned from it. Is the student its own teacher, is '
                    'there nothing in the region, or do the maps have one class, cell or image only? Give it another '
                    'loss or place, or take it out')


class Course:
    """Looks at the logged values of the terms every :data:`WINDOW` iterations of a run, and says once what goes wrong.

    A term that grows and grows runs away: with Adam a loss of the wrong unit does that without a value that is not
    finite.  One that is :data:`HEAVY` times the student's own losses may leave nothing of these.
    """

    def __init__(self) -> None:
        self._iterations = 0
        self._first: Dict[str, float] = {}
        self._told: Set[str] = set()

    def after_iter(self, scalars: Dict[str, Any], terms: Dict[str, str]) -> Iterator[str]:
        """Sentences about what is new.

        Args:
            scalars: of the message hub, name -> history.
            terms: name of each loss of the student -> its label in ``kd_weight_LABEL``.
        """
        self._iterations += 1
        if self._iterations % WINDOW:
            return
        values = {name: max(_mean(scalars, name), 0.0) for name in terms}  # a score of an opponent may be negative
        beside = _mean(scalars, 'kd_task_ratio') / (sum(values.values()) or 1.0)
        for name, label in terms.items():
            value, weight = values[name], _mean(scalars, f'kd_weight_{label}')
            if value <= 0 or weight <= 0 or name in self._told:
                continue
            first, ratio = self._first.setdefault(name, value / weight), value * beside
            mend = (f"Give {name} loss_weight='auto', which holds it at a share of the task's pull, or a smaller "
                    'weight; `kd-mm check CONFIG` prints the share')
            if value / weight > RISE * first and ratio > LARGE:
                self._told.add(name)
                yield (f'{name} has grown from {first * weight:.3g} to {value:.3g} in {self._iterations} iterations: '
                       f'this training runs away. {mend}; and clip gradients (optim_wrapper.clip_grad)')
            elif ratio > HEAVY:
                self._told.add(name)
                yield f"{name} is {ratio:.3g} times the student's own losses: these may not count beside it. {mend}"


def _mean(scalars: Dict[str, Any], name: str) -> float:
    """Of the last iterations; 0 for what is not logged."""
    history = scalars.get(f'train/{name}')
    return 0.0 if history is None else float(history.mean(WINDOW))
