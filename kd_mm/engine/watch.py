"""What stops a training: values that are not finite, and terms from which nothing is learned."""

from typing import Dict, List, Sequence, Set, Tuple

import torch
from torch import Tensor

from kd_mm.engine.step import Evaluation, Step
from kd_mm.ops import distributed

#: A term whose gradient was zero in so many steps from its first one teaches nothing, and stops the training.
PATIENCE = 100
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
