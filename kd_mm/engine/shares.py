"""Weights that follow the student's gradients: what they look at, and when they change."""

from typing import Any, List

import torch
from torch import nn

from kd_mm.engine.step import Step
from kd_mm.hosts.paths import resolve
from kd_mm.ops.modulation import GradientShareSchedule, share_of_gradient


class GradientShares:
    """The :class:`kd_mm.ops.modulation.GradientShareSchedule` of all terms of a student.

    Args:
        student: whose gradients count.
        step: the step in progress, which knows the terms and its number.
    """

    def __init__(self, student: nn.Module, step: Step):
        self.student, self.step = student, step
        self._handles: List[Any] = []

    def __bool__(self) -> bool:
        return bool(self.weights())

    def weights(self) -> List[GradientShareSchedule]:
        """The weights that follow a share."""
        schedules = [term.loss.weight.schedule for term in self.step.terms]
        return [schedule for schedule in schedules if isinstance(schedule, GradientShareSchedule)]

    def faults(self, epochs: bool = True) -> List[str]:
        """What keeps a weight from following the gradients, as sentences.

        Args:
            epochs: whether somebody calls :meth:`end_epoch`.
        """
        found = []
        for term in self.step.terms:
            weight = term.loss.weight.schedule
            if not isinstance(weight, GradientShareSchedule):
                continue
            text = f'{term.title}: GradientShareSchedule: module={weight.module!r}'
            try:
                module = resolve(self.student, weight.module, 'student')[0]
            except KeyError as error:
                found.append(f'{text}: {error.args[0]}')
                continue
            if not any(parameter.requires_grad for parameter in module.parameters()):
                found.append(f'{text} of the student has no parameter that is trained')
            if weight.interval is None and not epochs:
                found.append(f'{term.title}: GradientShareSchedule: interval=None means once an epoch, and an '
                             'iteration-based loop has none; give the iterations between changes of the weight')
        return found

    def follow(self, optimizer: torch.optim.Optimizer, epochs: bool = True) -> None:
        """Look at the gradients whenever this optimizer is about to step; nothing where no weight needs it.

        Args:
            optimizer: of the student.
            epochs: whether somebody calls :meth:`end_epoch`.

        Raises:
            ValueError: a weight follows a module that the student does not have, or one without parameters, or changes
                once an epoch where there are none.
        """
        for fault in self.faults(epochs):
            raise ValueError(fault)
        if self and not self._handles:
            self._handles.append(optimizer.register_step_pre_hook(self._look))

    def stop(self) -> None:
        """Leave the optimizer alone."""
        while self._handles:
            self._handles.pop().remove()

    def end_epoch(self) -> None:
        """Change the weights that change once an epoch."""
        for weight in self.weights():
            if weight.interval is None:
                weight.update()

    @torch.no_grad()
    def _look(self, *_: Any) -> None:
        gradients = {name: parameter.grad for name, parameter in self.student.named_parameters()}
        for weight in self.weights():
            start = f'{weight.module}.'
            part = [gradient for name, gradient in gradients.items() if name.startswith(start)]
            weight.observe(share_of_gradient(part, list(gradients.values())))
            if weight.interval is not None and weight.state.passes((self.step.number + 1) // weight.interval):
                weight.update()
