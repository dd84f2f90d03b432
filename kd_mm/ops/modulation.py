"""Weights that follow what is measured in training, where schedules follow the iteration number alone."""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn

from kd_mm.ops.checks import from_zero, number, positive, whole
from kd_mm.ops.schedules import Schedule
from kd_mm.registry import MODELS


def share_of_gradient(part: Sequence[Optional[Tensor]], whole_model: Sequence[Optional[Tensor]]) -> Optional[Tensor]:
    """``100 * sum |g|`` of some gradients / ``sum |g|`` of all of them, in percent; None without any gradient.

    Example:
        >>> share_of_gradient([torch.tensor([-1.])], [torch.tensor([-1.]), torch.tensor([2., 1.])]).item()
        25.0
    """
    sums = []
    for gradients in (part, whole_model):
        found = [gradient.detach() for gradient in gradients if gradient is not None and gradient.numel()]
        # One kernel for all of them, and no wait for the accelerator.
        sums.append(torch.stack([norm.double() if norm.device.type == 'cpu' else norm.float()
                                 for norm in torch._foreach_norm(found, 1)]).sum() if found else None)
    if sums[1] is None:
        return None
    if sums[0] is None:
        return torch.zeros_like(sums[1])
    return 100 * sums[0] / sums[1].clamp(min=torch.finfo(sums[1].dtype).tiny)


def modulated_weight(weight: float, share: float, target: float, band: float, default: float, *, final: bool = False,
                     low: float = 0.1, high: float = 10.0) -> float:
    """The next weight, after an epoch with this ``share``; the first rule that applies counts.

    1. ``share < 1e-6``: ``default``.
    2. ``final``: ``default``.
    3. ``target - band <= share <= target + band``: unchanged.
    4. ``weight <= 1e-6``: unchanged.
    5. ``weight * clip(y (1 - x) / (x (1 - y)), low, high)`` with ``x = share / 100`` and ``y`` the *far* end of the
       band, in parts of 1: ``target + band`` if the share is below it and ``target - band`` if it is above.  Were the
       part's gradient proportional to the weight and the rest's unchanged, the share would then be ``y``.  Where
       ``x (1 - y)`` is below 1e-9 the weight is unchanged.

    Args:
        weight: of the last epoch.
        share: of the gradient, in percent.
        target, band: where the share is to be, in percent.
        default: the weight to go back to.
        final: the last phase of the training has begun.
        low, high: limits of the factor.

    Example:
        >>> round(modulated_weight(15.0, 4.0, 2.0, 0.1, 15.0), 2), modulated_weight(15.0, 2.05, 2.0, 0.1, 15.0)
        (6.97, 15.0)
    """
    if share < 1e-6 or final:
        return default
    if target - band <= share <= target + band or weight <= 1e-6:
        return weight
    x = share / 100
    y = (target + band if share < target else target - band) / 100
    if x * (1 - y) < 1e-9:
        return weight
    return weight * min(max(y * (1 - x) / (x * (1 - y)), low), high)


class ShareState(nn.Module):
    """What a :class:`GradientShareSchedule` knows: its weight, and the shares since the last change; for checkpoints.

    Args:
        value: the first weight.

    Attributes:
        known: the weight as a number, without a wait for the accelerator.
        passed: how many intervals have passed, likewise.
    """

    value: Tensor
    total: Tensor
    steps: Tensor
    turn: Tensor

    def __init__(self, value: float):
        super().__init__()
        self.register_buffer('value', torch.tensor(value, dtype=torch.float64))
        self.register_buffer('total', torch.zeros((), dtype=torch.float64))
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))
        self.register_buffer('turn', torch.zeros((), dtype=torch.long))
        self.known, self.passed = value, 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.known, self.passed = float(self.value), int(self.turn)

    def observe(self, share: Tensor) -> None:
        """Note a share."""
        self.total += share.to(self.total)
        self.steps += 1

    def take(self) -> Optional[float]:
        """The mean of what was noted since the last call; None if nothing was."""
        count = int(self.steps)
        found = float(self.total) / count if count else None
        self.total.zero_()
        self.steps.zero_()
        return found

    def passes(self, count: int) -> bool:
        """Whether another interval has passed when ``count`` of them have."""
        if count == self.passed:
            return False
        self.passed = count
        self.turn.fill_(count)
        return True

    def set(self, value: float) -> None:
        """Change the weight."""
        self.known = value
        self.value.fill_(value)


@MODELS.register_module()
class GradientShareSchedule(Schedule):
    """A weight that keeps the share of a module in the student's gradient near a target (GAM of Liao et al., RT-DETRv4,
    arXiv 2510.25257).

    Once an epoch, from the mean share over its optimizer steps, see :func:`modulated_weight`::

        loss_weight=dict(type='GradientShareSchedule', module='encoder', target=2.0, band=0.1, start=15.0)

    The share is that of all losses together, of gradients as the optimizer gets them: averaged over the ranks, unscaled
    and clipped.  So it is the same on every rank, and so is the weight.  (In the published code only rank 0 changes its
    weight, and the share is 0 without DDP, which sets the weight back to its default in every epoch.)  Nothing waits
    for the accelerator but the end of an epoch.  The state is kept in checkpoints.

    In a training loop without a Runner call ``distiller.shares.follow(optimizer)`` once, and
    ``distiller.shares.end_epoch()`` after each epoch.

    Args:
        module: path of the student's module whose share is measured, such as ``'encoder'``.
        target: share to hold, in percent, above 0 and below 100. Default 2 [C: models L and X; 11 for S, 3.5 for M].
        band: half the width of the band in which nothing changes, in percent. Default 0.1 [C: L; 1, 0.25, 0.25 for S,
            M, X].
        start: the first weight. Default 5 [C: S and M; 15 for L, 20 for X].
        default: the weight to go back to where no gradient arrives, and from ``final`` on. Default 15 [C: M and L; 20
            for S and X].
        final: iteration from which ``default`` is used (there: strong augmentation has stopped); a negative number
            counts back from the end of training. Default None: never.
        interval: iterations between changes, each at the next optimizer step. Default None: an epoch, for a loop by
            epochs.
        low, high: limits of the factor of one change. Default 0.1 and 10 [C].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> weight = GradientShareSchedule('encoder', target=2.0, band=0.1, start=15.0)
        >>> weight.observe(torch.tensor(4.0))
        >>> weight.update(), round(weight(100), 2)
        (True, 6.97)
    """

    def __init__(self, module: Any = 'encoder', target: float = 2.0, band: float = 0.1, start: float = 5.0,
                 default: float = 15.0, final: Optional[int] = None, interval: Optional[int] = None, low: float = 0.1,
                 high: float = 10.0):
        owner = 'GradientShareSchedule'
        if not isinstance(module, str) or not module or not all(part.isidentifier() or part.isdigit()
                                                                for part in module.split('.')):
            raise ValueError(f"{owner}: module={module!r} must be the path of a module of the student, such as "
                             "'encoder'")
        self.module = module
        self.target = positive(owner, 'target', target, 99.0)
        self.band = from_zero(owner, 'band', band)
        if self.band >= self.target:
            raise ValueError(f'{owner}: band={band!r} must be below target={target!r}')
        self.default = from_zero(owner, 'default', default)
        self.final = None if final is None else whole(owner, 'final', final, None)
        self.interval = None if interval is None else whole(owner, 'interval', interval)
        self.low = positive(owner, 'low', low, 1.0)
        self.high = number(owner, 'high', high, 1.0)
        self.state = ShareState(from_zero(owner, 'start', start))

    def __call__(self, step: int, max_steps: int = 0) -> float:
        if self.final is not None:
            if self.final < 0 and not max_steps:
                raise ValueError('GradientShareSchedule: final counts from the end of training, whose length is not '
                                 'known here; give the iteration')
            if step >= (max_steps + self.final if self.final < 0 else self.final):
                return self.default
        return self.state.known

    def observe(self, share: Optional[Tensor]) -> None:
        """Note the share of one optimizer step, in percent; None (no gradient at all) is not counted."""
        if share is not None:
            self.state.observe(share)

    def update(self) -> bool:
        """Change the weight by what was noted since the last change; whether anything was."""
        share = self.state.take()
        if share is None:
            return False
        self.state.set(modulated_weight(self.state.known, share, self.target, self.band, self.default, low=self.low,
                                        high=self.high))
        return True
