"""The running average of the student as a teacher."""

import copy
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from kd_mm.ops.checks import boolean, positive
from kd_mm.ops.schedules import Weight
from kd_mm.teachers.base import Teacher


class EMATeacher(Teacher):
    """The exponential moving average of the student (Tarvainen & Valpola, Mean teachers are better role models,
    NeurIPS 2017).

    After every step of the student's optimizer (not every iteration, where gradients are accumulated) ``theta_t <- (1 -
    m) * theta_t + m * theta_s`` for parameters; buffers (batch statistics) are copied. It starts as the student, is
    kept under the checkpoint's side key, and is restored on a resume. When the config has an ``EMAHook``, whose average
    is what will be validated, that one is used and no second average is kept. A resume with the ``EMAHook`` added or
    taken out goes on from the average that there is.

    Args:
        momentum: m, in (0, 1]: a number or a schedule by iteration (:class:`kd_mm.ops.schedules.Weight`). Default 0.001
            (the 0.999 of the paper's longer phase).
        share: use the average of the config's ``EMAHook`` when there is one (its momentum counts then). Default True.
    """

    def __init__(self, student: nn.Module, momentum: Any = 0.001, share: bool = True,
                 classes: Optional[List[str]] = None):
        super().__init__(copy.deepcopy(student), student, 'EMA of the student', classes)
        self.momentum = Weight(momentum, 'momentum', 'EMATeacher', partial(positive, high=1))
        self.momentum.check(1)
        self.shares, self.shared = boolean('EMATeacher', 'share', share), False
        self._student = [student]  # in a list: no part of the teacher

    def use(self, average: nn.Module, fill: bool = False) -> None:
        """Share the tensors of an average that someone else updates.

        Args:
            average: the other average.
            fill: give it the values of this one first.
        """
        theirs: Dict[str, Tensor] = {**dict(average.named_parameters()), **dict(average.named_buffers())}
        own: Dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in own.items():
            if fill:
                theirs[name].data.copy_(tensor.data)
            tensor.data = theirs[name].data
        self.shared = True

    def move(self, student: nn.Module) -> None:
        """Average another instance of the same student from now on."""
        self._student[0] = student

    def start(self, resumed: bool) -> None:
        # Also one that is shared: an EMAHook has made its copy before the student got its first weights.
        if not resumed:
            self._blend(1.0)

    def after_step(self, step: int, max_steps: int) -> None:
        if not self.shared:
            self._blend(self.momentum.at(step, max_steps, 1)[0])

    @torch.no_grad()
    def _blend(self, momentum: float) -> None:
        student = self._student[0]
        for mean, value in zip(self.model.parameters(), student.parameters()):
            mean.lerp_(value.to(mean.dtype), momentum)
        for own, theirs in zip(self.model.buffers(), student.buffers()):
            own.copy_(theirs)

    def state(self) -> Dict[str, Tensor]:
        return {} if self.shared else dict(self.model.state_dict())

    def load(self, state: Dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
