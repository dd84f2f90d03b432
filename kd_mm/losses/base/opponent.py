"""A network that a loss trains against the student, with an optimizer of its own: what adversarial methods share.

A loss of this kind (:class:`kd_mm.losses.base.loss.Adversarial`) owns one :class:`Opponent` for each level, made in
``prepare``.  A step goes:

1. In the loss's forward the opponent is frozen: it judges the student, and the gradient goes to the student alone.
   The loss hands over what the opponent is to minimise, on detached tensors (:meth:`Opponent.later`).
2. Backward and update of the student, as without an opponent.
3. :meth:`kd_mm.engine.distiller.Distiller.after_step` lets every opponent make its step (:meth:`Opponent.learn`).

Where the student accumulates gradients over k iterations, so does its opponent: it makes one step for each of the
student's, with the mean of the k gradients.

Outside of :meth:`Opponent.learn` no parameter of an opponent requires a gradient.  So the student's optimizer does not
get them, its clipping does not see them, and DDP does not wait for them; on several ranks their gradients are averaged
in :meth:`Opponent.learn`.  It runs in full precision whatever the student does, and has no loss scaler.
"""

from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional

import mmengine.optim  # noqa: F401  (registers torch's optimizers)
import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from kd_mm.ops import distributed
from kd_mm.ops.functional import unit_vectors

Objective = Callable[[], Tensor]


class Opponent(nn.Module):
    """A network and its optimizer.

    Args:
        network: what plays against the student; it is frozen here.
        optimizer: config of its optimizer, such as ``dict(type='Adam', lr=4e-4)``. Its learning rate follows the
            student's schedule in proportion: both are at the same fraction of their first value.

    Raises:
        ValueError: there is no such optimizer, or it takes other arguments.

    Example:
        >>> opponent = Opponent(nn.Linear(2, 1, bias=False), dict(type='SGD', lr=1.0))
        >>> opponent.network.weight.data.zero_()
        tensor([[0., 0.]])
        >>> inputs = torch.ones(1, 2)
        >>> opponent.later(lambda: -opponent(inputs).sum())
        >>> opponent.learn(rate=0.5)
        tensor(-0.)
        >>> opponent.network.weight
        Parameter containing:
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, network: nn.Module, optimizer: Mapping[str, Any]):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.optimizer = make_optimizer(network.parameters(), optimizer)
        for group in self.optimizer.param_groups:
            group.setdefault('initial_lr', group['lr'])
        self._objective: Optional[Objective] = None
        self._held = 0  # iterations whose gradients are accumulated

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network says, in a way that only the inputs get a gradient (except inside :meth:`learn`)."""
        return self.network(*inputs)

    def later(self, objective: Objective) -> None:
        """Note what to minimise once the student has made its step; an earlier one that was not used is replaced.

        Args:
            objective: gives a scalar; it must hold no tensor with a history.
        """
        self._objective = objective

    def forget(self) -> None:
        """Drop what was noted, and what was accumulated."""
        self._objective = None
        if self._held:
            self._held = 0
            self.optimizer.zero_grad()

    def learn(self, rate: float = 1.0, update: bool = True) -> Optional[Tensor]:
        """One step of the opponent's own optimizer, the gradients averaged over the ranks.

        Args:
            rate: factor on its first learning rate.
            update: False accumulates the gradient for the next call with True, which steps with the mean.

        Returns:
            The objective before the step, detached; None if nothing was noted.
        """
        objective, self._objective = self._objective, None
        if objective is None and not (update and self._held):
            return None
        parameters = list(self.network.parameters())
        device = parameters[0].device.type
        value: Optional[Tensor] = None
        self.network.requires_grad_(True)
        try:
            if objective is not None:
                with torch.enable_grad(), torch.autocast(device, enabled=False):
                    value = objective()
                    if not self._held:
                        self.optimizer.zero_grad()
                    value.backward()
                self._held += 1
            if update:
                self._step(parameters, rate)
        finally:
            self.network.requires_grad_(False)
        return None if value is None else value.detach()

    def _step(self, parameters: List[nn.Parameter], rate: float) -> None:
        if self._held > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._held
        self._held = 0
        if distributed.world_size() > 1:
            distributed.average_gradients(parameters)
        for group in self.optimizer.param_groups:
            group['lr'] = group['initial_lr'] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> Dict[str, Any]:
        """What a resume needs besides parameters and buffers, which are in the ``state_dict``."""
        return self.optimizer.state_dict()

    def load(self, state: Dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.optimizer.load_state_dict(state)


def make_optimizer(parameters: Iterable[Tensor], cfg: Any) -> torch.optim.Optimizer:
    """An optimizer of ``parameters`` from its config.

    Raises:
        ValueError: there is no such optimizer, or it takes other arguments.
    """
    if not hasattr(cfg, 'items') or 'type' not in cfg:
        raise ValueError(f"optimizer={cfg!r} is no config; write dict(type='Adam', lr=4e-4)")
    try:
        return OPTIMIZERS.build(dict(cfg, params=parameters))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'optimizer={dict(cfg)!r}: {error}') from error


class SpectralConv2d(nn.Module):
    """A convolution whose weight is divided by (an estimate of) its largest singular value.

    One power iteration a call: ``v = unit(W^T u)``, ``u' = unit(W v)``, ``sigma = u'^T W v``; the gradient goes
    through ``W`` in both places, not through ``u`` and ``v``.  ``u`` is a buffer, which moves on only while the
    weight is trained: otherwise a call changes nothing.

    Args: those of :class:`torch.nn.Conv2d`.

    Example:
        >>> layer = SpectralConv2d(1, 1, 1, bias=False)
        >>> (layer(torch.ones(1, 1, 1, 1)).abs() - 1).abs().item() < 1e-6
        True
    """

    u: Tensor

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True,
                 **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=bias, **options)
        self.register_buffer('u', unit_vectors(torch.randn(width, **options), dim=0))

    def forward(self, features: Tensor) -> Tensor:
        weight = self.conv.weight
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = unit_vectors(matrix.t().mv(self.u), dim=0, eps=1e-12)
            u = unit_vectors(matrix.mv(v), dim=0, eps=1e-12)
            if weight.requires_grad:
                self.u = u
        sigma = u.dot(matrix.mv(v))
        return nn.functional.conv2d(features, weight / sigma, self.conv.bias, self.conv.stride, self.conv.padding)
