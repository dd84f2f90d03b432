"""Weights that are measured: what :class:`~kd_mm.ops.schedules.AutoWeight` asks for.

In a step in which a term is due, one backward pass goes from the student's own losses to the taps of all due terms,
and one from each of the terms, which is short.  None goes further: parameters get no gradient and their hooks (DDP's)
see nothing.  The graph stays for the step's own backward pass.
"""

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.step import Evaluation, Step
from kd_mm.engine.term import STUDENT, Term
from kd_mm.ops import distributed
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.schedules import AutoWeight

#: A term that could not be measured in so many steps from its first one stops the training.
PATIENCE = 100
#: Factors on a loss while gradients in half precision are measured: small ones would be rounded to 0, large ones
#: overflow. The first that gives finite numbers counts.
SCALES = (2.0**16, 2.0**8, 1.0, 2.0**-8)
#: Name of a model that learns -> its own losses, summed and weighted; None without any.
Tasks = Mapping[str, Callable[[], Optional[Tensor]]]
#: Path of a tap, and whether what its calls were given is meant (else what they returned).
Place = Tuple[str, bool]


@dataclass
class Pull:
    """How strongly a term and the task pull at the tapped tensors of the student, as norms of gradients or as values of
    losses; the term with its weight at this step.
    """

    task: float
    term: float

    @property
    def share(self) -> Optional[float]:
        """``term / task``; None where one of them is 0 or not finite."""
        fit = all(math.isfinite(value) and value > 0 for value in (self.task, self.term))
        return self.term / self.task if fit else None


@dataclass
class State:
    """What is known about one term.

    Attributes:
        steps: in which it had a weight, so far.
        count: measurements so far.
        mean: running mean of ``log(g_task / g_term)``.
        share: what the last measurement found, with the weight that followed from it.
    """

    steps: int = 0
    count: int = 0
    mean: float = 0.0
    share: float = 0.0

    def due(self, settings: AutoWeight) -> bool:
        """Whether to measure in this step."""
        early = self.steps < settings.every and self.steps & (self.steps - 1) == 0  # 0, 1, 2, 4, 8, ...
        return not self.count or early or self.steps % settings.every == 0

    def learn(self, settings: AutoWeight, quotient: float) -> None:
        """Take one measurement of ``g_task / g_term``."""
        rate = max(1 - settings.smoothing, 1 / (self.count + 1))
        self.mean += rate * (math.log(quotient) - self.mean)
        self.count += 1

    def weight(self, settings: AutoWeight) -> float:
        """The weight in this step; 0 as long as nothing was measured."""
        if not self.count:
            return 0.0
        low, high = (math.log(bound) for bound in settings.bounds)
        full = math.exp(min(max(math.log(settings.share) + self.mean, low), high))
        return full * min((self.steps + 1) / settings.warmup, 1.0) if settings.warmup else full


class Balance:
    """The measured weights of all terms of a training, of both directions.

    The numbers are the same on every rank, and with :meth:`state` a resumed run goes on with the same bits.
    """

    def __init__(self) -> None:
        self._states: Dict[str, State] = {}

    def state(self) -> Dict[str, Dict[str, Any]]:
        """What :meth:`load` needs: name of a term -> numbers."""
        return {name: asdict(state) for name, state in self._states.items()}

    def load(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from what :meth:`state` gave."""
        self._states = {name: State(**state) for name, state in states.items()}

    def fault(self, states: Mapping[str, Any], terms: Sequence[Term]) -> List[str]:
        """What of a saved state is no state of these terms, by name."""
        needed = [key_of(term) for term in terms if term.loss.weight.auto is not None]
        known = {item.name for item in fields(State)}
        return [*(f'missing: {name}' for name in needed if name not in states),
                *(f'left over: {name}' for name in states if name not in needed),
                *(f'{name}: no numbers of a measured weight' for name in needed
                  if name in states and set(states[name]) != known)]

    def start(self, terms: Sequence[Term]) -> None:
        """Begin anew for every term that has a measured weight."""
        self._states = {key_of(term): State() for term in terms if term.loss.weight.auto is not None}

    def shares(self, terms: Sequence[Term]) -> Dict[str, float]:
        """The share that was measured last, of each of these terms that has one."""
        found = {term: self._states[key_of(term)] for term in terms if key_of(term) in self._states}
        return {term.label: state.share for term, state in found.items() if state.count}

    def apply(self, step: Step, found: Sequence[Evaluation], tasks: Tasks) -> List[Evaluation]:
        """The evaluations of a step, those of measured weights multiplied by them; measures what is due.

        Args:
            step: the step in progress, with what the taps recorded.
            found: its evaluations.
            tasks: what each model that learns minimises besides.

        Raises:
            RuntimeError: a term could not be measured in :data:`PATIENCE` steps.
        """
        if not any(item.term.loss.weight.auto for item in found):
            return list(found)
        due = [item for item in found if item.term.loss.weight.auto
               and self._states[key_of(item.term)].due(item.term.loss.weight.auto)]
        for item, pull in zip(due, measure(step, due, tasks) if due else ()):
            settings, state = item.term.loss.weight.auto, self._states[key_of(item.term)]
            assert settings is not None
            if pull.share is not None:
                beside = item.term.loss.weight.schedule(step.number, step.max_steps)
                state.learn(settings, beside / pull.share)
                state.share = pull.share * state.weight(settings)
            elif not state.count and state.steps + 1 >= PATIENCE:
                raise RuntimeError(_never_measured(item.term, settings, pull))
        return [self._weighed(item) for item in found]

    def _weighed(self, item: Evaluation) -> Evaluation:
        settings = item.term.loss.weight.auto
        if settings is None:
            return item
        state = self._states[key_of(item.term)]
        factor = state.weight(settings)
        state.steps += 1
        return replace(item, total=item.total * factor, weights=[weight * factor for weight in item.weights],
                       parts={name: value * factor for name, value in item.parts.items()})


def key_of(term: Term) -> str:
    """Name of a term in both directions."""
    return term.name if term.learner == STUDENT else f'{term.learner}/{term.name}'


def task_total(losses: Mapping[str, Any], factor: float = 1.0) -> Optional[Tensor]:
    """What the host will minimise of a dict of losses, with its graph: the sum of all entries with ``loss`` in their
    name, of which it averages each tensor.
    """
    values: List[Tensor] = []
    for name, value in losses.items():
        if 'loss' in name:
            values += [item.mean() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(values[1:], values[0]) * factor if values else None


def tasks_of(step: Step, losses: Mapping[str, Any], factor: float) -> Tasks:
    """What each model that learns minimises of its own.

    Args:
        step: knows the peers.
        losses: of the student's host.
        factor: on them, ``task_loss_weight``.
    """
    result: Dict[str, Callable[[], Optional[Tensor]]] = {name: peer.task_total for name, peer in step.peers.items()}
    result[STUDENT] = partial(task_total, losses, factor)
    return result


def measure(step: Step, found: Sequence[Evaluation], tasks: Tasks,
            by: Optional[str] = None) -> List[Pull]:
    """How strongly each term pulls, and the task at the same tensors; the mean over the ranks.

    Args:
        step, found, tasks: see :meth:`Balance.apply`.
        by: 'gradient' or 'loss' for all; default what each term's :class:`AutoWeight` says.

    Raises:
        RuntimeError: a re-entrant activation checkpoint lies between the losses and a tap.
    """
    learners = list(dict.fromkeys(item.term.learner for item in found))
    totals = {learner: tasks[learner]() for learner in learners}
    pairs: List[List[float]] = [[math.nan, math.nan] for _ in found]
    ways = [by or (item.term.loss.weight.auto or AutoWeight()).by for item in found]
    half = any(tensor.dtype == torch.float16 for item in found for tensor in _recorded(step, item))
    models = [step.model(learner) for learner in learners]
    # Every rank must ask for the same things in the same order: some backward passes talk to the other ranks.
    for scale in SCALES if half else (1.0, ):
        if all(math.isfinite(value) for pair in pairs for value in pair):
            break
        with _untouched(models, found[0].total):
            numbers = _pulls(step, found, totals, ways, scale)
        values = distributed.mean(numbers).sqrt().div(scale).tolist()
        pairs = [[old if math.isfinite(old) else new for old, new in zip(*both)] for both in zip(pairs, values)]
    return [Pull(*pair) for pair in pairs]


def _pulls(step: Step, found: Sequence[Evaluation], totals: Mapping[str, Optional[Tensor]], ways: Sequence[str],
           scale: float) -> Tensor:
    """(T, 2): squared pull of the task and of each of T terms on this rank, with the losses multiplied by ``scale``."""
    places = [_places(step, item) if way == 'gradient' else {} for item, way in zip(found, ways)]
    none = found[0].total.detach().new_zeros((), dtype=torch.float64)
    squares: Dict[str, Dict[Place, Tensor]] = {}
    for learner, total in totals.items():
        # Terms may read the same tap: one pass of the task for the taps of all of them.
        union = {place: edges for item, own in zip(found, places) if item.term.learner == learner
                 for place, edges in own.items()}
        squares[learner] = _squares(total, union, scale, none)
    rows = []
    for item, way, own in zip(found, ways, places):
        task = totals[item.term.learner]
        if way == 'loss':
            values = [none if value is None else (value.detach().double() * scale).square()
                      for value in (task, item.total)]
        else:
            values = [sum((squares[item.term.learner][place] for place in own), none),
                      sum(_squares(item.total, own, scale, none).values(), none)]
        rows.append(torch.stack(values))
    return torch.stack(rows)


def _places(step: Step, item: Evaluation) -> Dict[Place, Tuple[Any, ...]]:
    """Where a term is measured."""
    reader, records = item.term.reader, step.records[item.term.learner]
    return {(path, reader.edges(records[path]) is records[path].given): reader.edges(records[path])
            for path in item.term.student_paths}


def _squares(total: Optional[Tensor], places: Mapping[Place, Tuple[Any, ...]], scale: float, none: Tensor
             ) -> Dict[Place, Tensor]:
    """Squared norm of the gradient of ``scale * total`` at each place; ``none`` is 0."""
    result = dict.fromkeys(places, none)
    edges = [(place, edge) for place, found in places.items() for edge in found]
    if total is None or not edges or not total.requires_grad:
        return result
    try:
        gradients = torch.autograd.grad(total * scale, [edge for _, edge in edges], retain_graph=True,
                                        allow_unused=True)
    except RuntimeError as error:
        if 'checkpoint' not in str(error).lower():
            raise
        raise RuntimeError("loss_weight='auto': a re-entrant activation checkpoint lies between the losses and "
                           f'{", ".join(path for path, _ in places)}, through which no gradient of a tensor can be '
                           "asked for. Tap what comes after it, or give dict(type='AutoWeight', by='loss')") from error
    for (place, _), gradient in zip(edges, gradients):
        if gradient is not None:
            result[place] = result[place] + gradient.float().square().sum(dtype=torch.float64)
    return result


def _recorded(step: Step, item: Evaluation) -> Iterator[Tensor]:
    for path in item.term.student_paths:
        yield from step.records[item.term.learner][path]


@contextmanager
def _untouched(models: Sequence[nn.Module], like: Tensor) -> Iterator[None]:
    """A backward pass inside draws nothing and leaves the models' statistics alone: an activation checkpoint runs parts
    of the forward pass again.
    """
    kept = [(buffer, buffer.detach().clone()) for model in models for buffer in model.buffers()]
    with preserved_random_state(None, like.device), torch.autocast(like.device.type, enabled=False):
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)  # past autograd, which may hold the buffer for the backward pass to come


def _never_measured(term: Term, settings: AutoWeight, pull: Pull) -> str:
    what = 'gradient' if settings.by == 'gradient' else 'value'
    side, mend = ('task', 'tap what the task uses') if not pull.task > 0 else ('term', 'give it another loss or place')
    if all(value > 0 for value in (pull.task, pull.term)):
        side, mend = 'loss', 'look for values that are not finite'
    return (f"{term.title}: loss_weight='auto' holds it at a share of the task, but in {PATIENCE} steps the {what} of "
            f'the {side} at {term.student_paths} was 0 or not finite (task {pull.task:.3g}, term {pull.term:.3g}). '
            f"{mend[0].upper()}{mend[1:]}, or give a number as loss_weight")


def total_value(value: Any) -> Tensor:
    """Detached value of a host loss: a tensor or a list of tensors, each averaged, as the host sums them."""
    if isinstance(value, Tensor):
        return value.detach().mean()
    return torch.stack([item.detach().mean() for item in value]).sum()
