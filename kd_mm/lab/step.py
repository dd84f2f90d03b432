"""One training step on random images, term by term."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.balance import measure, tasks_of
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.step import Evaluation
from kd_mm.engine.term import STUDENT, Term


@dataclass
class LevelReport:
    """One level of a term in the dry step.

    Attributes:
        student, teacher: shape of what is compared; of a head's view that of its class logits.
        weight: of the level at this step.
        loss: weighted.
    """

    student: Tuple[int, ...]
    teacher: Tuple[int, ...]
    weight: float
    loss: float


@dataclass
class TermReport:
    """One term in the dry step.

    Attributes:
        loss: weighted sum over the levels, as it enters the training loss; None if the weight is 0 at this step.
        gradient: Euclidean norm of this term's gradient on the student's parameters.
        extras_gradient: the same on the term's own parameters.
        share: norm of its gradient at the student's taps over that of the task's losses there; None where it cannot be
            measured.
        measured: whether ``loss_weight='auto'`` holds it there.
    """

    name: str
    method: str
    student_at: List[str]
    teacher_at: List[str]
    adapter: str
    region: str
    extras: int
    levels: List[LevelReport] = field(default_factory=list)
    loss: Optional[float] = None
    gradient: float = 0.0
    extras_gradient: float = 0.0
    share: Optional[float] = None
    measured: bool = False


@dataclass
class StepReport:
    """One training step on random images."""

    step: int
    images: int
    shape: Tuple[int, int]
    task: Dict[str, float]
    total: float
    gradient: float
    terms: List[TermReport]


def level_shapes(side: Any) -> List[Tuple[int, ...]]:
    """Shape of each level of what a term compares: a tensor's, or that of the class logits in a view."""
    levels = side if isinstance(side, (tuple, list)) else side.logits
    return [tuple(level.shape) for level in levels]


def describe_adapter(term: Term) -> str:
    """Class names of a term's adapter, and whether it was chosen automatically."""
    if term.adapter is None:
        return 'none needed' if term.adapter_cfg == 'auto' else 'none'
    parts = list(getattr(term.adapter, 'adapters', None) or [term.adapter])
    return ' + '.join(type(part).__name__ for part in parts) + (' (automatic)' if term.adapter_cfg == 'auto' else '')


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _norm(parameters: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) for parameter in parameters
             if parameter.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _shares(distiller: Distiller, losses: Dict[str, Any], found: Sequence[Evaluation]) -> Dict[str, float]:
    """The share of the task's pull of each of the student's terms, where there is one."""
    own = [evaluation for evaluation in found if evaluation.term.learner == STUDENT]
    tasks = tasks_of(distiller.current, losses, distiller.task_loss_weight)
    try:
        pulls = measure(distiller.current, own, tasks, by='gradient') if own else []
    except RuntimeError:  # re-entrant checkpoints between the losses and a tap: not to be known
        return {}
    return {evaluation.term.name: pull.share for evaluation, pull in zip(own, pulls) if pull.share is not None}


def dry_step(student: nn.Module, distiller: Distiller, data: Dict[str, Any],
             context: Optional[ContextManager[Any]] = None) -> StepReport:
    """One training step as with the distiller attached, term by term; no weight of the student is changed.

    Args:
        student: the model; it is put into training mode and left without gradients.
        distiller: its peers have their optimizers; they make their own update.
        data: one preprocessed batch.
        context: in which the losses are computed (mixed precision). Default none.

    Raises:
        Anything that the step raises.
    """
    student.train()
    distiller.train()
    own, extras = list(student.parameters()), list(distiller.parameters())
    reports = []
    for term in distiller.terms.values():
        assert isinstance(term, Term)
        reports.append(TermReport(
            term.name, type(term.loss).__name__, term.student_paths, term.teacher_paths, describe_adapter(term),
            type(term.region).__name__ if term.region is not None else 'none', parameter_count(term)))
    try:  # what the two hooks of an attached distiller do, with a look at what they compare
        with context or nullcontext():
            distiller.begin(data['inputs'], copy.deepcopy(data['data_samples']))
            own_losses = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
            pairs = distiller.evaluate()
            evaluations = distiller.weigh(own_losses, [evaluation for _, evaluation in pairs])
            shares = _shares(distiller, own_losses, evaluations)
            losses = distiller.add(own_losses, evaluations)
    finally:
        distiller.clear()
    found = {evaluation.term: (comparison, evaluation)
             for (comparison, _), evaluation in zip(pairs, evaluations)}
    total, log = student.parse_losses(losses)  # type: ignore[operator]

    def backward(value: Tensor) -> None:
        for parameter in (*own, *extras):
            parameter.grad = None
        value.backward(retain_graph=True)

    for report in reports:
        term = distiller.terms[report.name]
        assert isinstance(term, Term)
        if term not in found:
            continue
        comparison, evaluation = found[term]
        report.levels = [
            LevelReport(s, t, weight, weight * float(level.detach())) for s, t, weight, level in zip(
                level_shapes(comparison.student), level_shapes(comparison.teacher), evaluation.weights,
                evaluation.levels)]
        report.loss = float(evaluation.total.detach())
        auto = term.loss.weight.auto
        report.measured = auto is not None and term.name in shares
        report.share = auto.share if auto is not None and report.measured else shares.get(term.name)
        backward(evaluation.total)
        report.gradient, report.extras_gradient = _norm(own), _norm(extras)
    backward(total)
    gradient = _norm(own)
    for parameter in (*own, *extras):
        parameter.grad = None
    task = {name: float(torch.as_tensor(value).detach()) for name, value in log.items()
            if 'loss' in name and name != 'loss' and name not in distiller.terms}
    return StepReport(distiller.step, len(data['inputs']), tuple(data['inputs'].shape[-2:]), task,
                      float(total.detach()), gradient, reports)
