"""Optimizer wrappers of a config: which of them change the precision, and what is left without that."""

import copy
from contextlib import nullcontext
from typing import Any, ContextManager, Optional

import torch
from mmengine.config import ConfigDict
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

#: Arguments of :class:`mmengine.optim.AmpOptimWrapper` and its like that the plain wrapper does not have.
_PRECISION = ('dtype', 'loss_scale', 'use_fp16', 'use_fsdp')


def wrapper_class(cfg: Any) -> Any:
    """The class that a config of an optimizer wrapper names: text, the path of a class, or the class itself.

    None if the registry does not know it.

    Example:
        >>> wrapper_class(dict(type='AmpOptimWrapper')) is wrapper_class(dict(type=AmpOptimWrapper))
        True
        >>> wrapper_class(dict(optimizer=dict(type='SGD'))).__name__
        'OptimWrapper'
    """
    kind = cfg.get('type', OptimWrapper)
    if not isinstance(kind, str):
        return kind
    try:
        return OPTIM_WRAPPERS.get(kind)
    except Exception:  # a registry raises anything for a path that leads nowhere
        return None


def precision(cfg: Any) -> Optional[str]:
    """``'bfloat16'``, ``'float16'``, ... in which a config trains; None without mixed precision.

    float16, which needs its losses scaled, where the wrapper names none.

    Example:
        >>> precision(dict(type='OptimWrapper')), precision(dict(type=AmpOptimWrapper))
        (None, 'float16')
        >>> precision(dict(type='mmengine.optim.AmpOptimWrapper', dtype=torch.bfloat16))
        'bfloat16'
    """
    found = wrapper_class(cfg)
    # Apex scales losses, too; it is a class of its own.
    names = [base.__name__ for base in getattr(found, '__mro__', ())]
    if AmpOptimWrapper.__name__ not in names and 'ApexOptimWrapper' not in names:
        return None
    return str(cfg.get('dtype') or 'float16').removeprefix('torch.')


def in_full_precision(cfg: Any) -> ConfigDict:
    """The same optimizer in a plain wrapper; a copy.

    Example:
        >>> in_full_precision(dict(type='AmpOptimWrapper', dtype='bfloat16', accumulative_counts=2))
        {'type': <class 'mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper'>, 'accumulative_counts': 2}
    """
    cfg = ConfigDict(copy.deepcopy(dict(cfg)))
    if precision(cfg) is None:
        return cfg
    return ConfigDict({key: value for key, value in cfg.items() if key not in _PRECISION}, type=OptimWrapper)


def autocast(cfg: Any, device: Any) -> ContextManager[Any]:
    """The context in which a training with this wrapper computes its losses.

    On a CPU full precision: mmengine trains there in no other, and torch's convolutions in bfloat16 give gradients that
    are not finite now and then.
    """
    kind, found = torch.device(device).type, precision(cfg)
    return nullcontext() if found is None or kind == 'cpu' else torch.autocast(kind, getattr(torch, found))
