"""How the trainable extras (adapters, generators) are optimized: in a group of the student's optimizer, or beside."""

from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor

#: What schedulers change in a parameter group besides the learning rate.
_FOLLOWED = ('momentum', 'betas')


def group_options(optimizer: Any, names: Sequence[str], scale: float, lr_mult: float,
                  decay_mult: float) -> Dict[str, Any]:
    """The options of a parameter group that every scheduler treats like the student's own.

    It has the learning rate that the schedulers' first step has already left on the other groups; a group with the
    plain ``lr`` would be scaled up by a warm-up instead.

    Args:
        optimizer: of the student.
        names: of the parameters.
        scale: the factor by which learning rates were scaled (``auto_scale_lr``).
        lr_mult: learning rate as a multiple of the base learning rate.
        decay_mult: weight decay as a multiple of the base weight decay.
    """
    reference = reference_group(optimizer)
    base = optimizer.defaults['lr'] * scale
    first = reference.get('initial_lr', reference['lr'])
    # A one-cycle schedule sets its own rates, the same for every group, whatever the optimizer was given.
    own_rates = 'max_lr' in reference
    ratio = lr_mult * (1.0 if own_rates or not first else base / first)
    group = {key: value for key, value in reference.items() if key not in ('params', 'param_names')}
    for key in ('lr', 'initial_lr', 'max_lr', 'min_lr'):
        if isinstance(group.get(key), (int, float)):
            group[key] = group[key] * ratio
    if 'weight_decay' in group:
        group['weight_decay'] = optimizer.defaults['weight_decay'] * decay_mult
    if 'param_names' in reference:  # layer-decay constructors name parameters; torch wants all groups to, or none
        group['param_names'] = list(names)
    return group


def reference_group(optimizer: Any) -> Dict[str, Any]:
    """The group with the largest first learning rate: with ``paramwise_cfg`` another one may carry a multiplier."""
    group: Dict[str, Any] = max(optimizer.param_groups, key=lambda group: group.get('initial_lr', group['lr']))
    return group


def add_group(optimizer: Any, parameters: Sequence[Tensor], options: Dict[str, Any], schedulers: Any) -> None:
    """Give the optimizer one more group, and the schedulers that count groups their first value of it."""
    groups = optimizer.param_groups
    before = len(groups)
    optimizer.add_param_group(dict(options, params=list(parameters)))
    found = schedulers or []
    if isinstance(found, dict):
        found = [scheduler for part in found.values() for scheduler in part]
    for scheduler in found:
        # Cosine and its like compute from a list of first values, one a group.
        values = getattr(scheduler, 'base_values', None)
        if isinstance(values, list) and len(values) == before:
            name = f'initial_{scheduler.param_name}'
            values.append(groups[-1].get(name, groups[-1].get(scheduler.param_name)))


class OwnOptimizer:
    """Trains the extras beside an optimizer that cannot hold them, with its kind, its options and its schedule.

    Args:
        cfg: the config of the student's optimizer.
        parameters: the extras.
        options: of :func:`group_options`.
        reference: gives the group of the student's optimizer whose schedule is followed.
        clip: takes the parameters and clips their gradients, by their own norm; None for no clipping.
    """

    def __init__(self, cfg: Any, parameters: Sequence[Tensor], options: Dict[str, Any],
                 reference: Callable[[], Dict[str, Any]], clip: Optional[Callable[[List[Tensor]], Any]] = None):
        self.parameters, self.reference, self.clip = list(parameters), reference, clip
        self.optimizer = OPTIMIZERS.build(dict(cfg, params=self.parameters))
        group, followed = self.optimizer.param_groups[0], reference()
        group.update({key: value for key, value in options.items() if key in group})
        first, theirs = (values.get('initial_lr', values['lr']) for values in (options, followed))
        self._ratio = first / theirs if theirs else 1.0

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """One update with the gradients that have accumulated.

        Args:
            scale: by which the loss was multiplied (mixed precision); gradients that overflowed are left out.
        """
        given = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in given if parameter.grad is not None]
        if scale != 1.0:
            for gradient in gradients:
                gradient.div_(scale)
        group, reference = self.optimizer.param_groups[0], self.reference()
        group['lr'] = reference['lr'] * self._ratio
        group.update({key: reference[key] for key in _FOLLOWED if key in group and key in reference})
        if scale == 1.0 or all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            if self.clip is not None and given:
                self.clip(given)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> Dict[str, Any]:
        """What a resume needs, on the CPU."""
        return _on_cpu(self.optimizer.state_dict())

    def load(self, state: Dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.optimizer.load_state_dict(state)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value
