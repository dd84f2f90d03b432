"""The two hooks on the student's forward, by which a distiller takes part in a training that is not its own."""

import functools
from typing import Any, Dict, List, Tuple

import torch
from torch import nn


def attach(distiller: Any) -> List[Any]:
    """Put the two hooks on the student of a :class:`~kd_mm.engine.distiller.Distiller`; their handles.

    Raises:
        RuntimeError: a distiller is attached already.
    """
    student = distiller.student
    if any(getattr(hook, '_kd_mm', False) for hook in student._forward_hooks.values()):
        raise RuntimeError('a distiller is already attached to this student')
    before = functools.partial(_before_forward, distiller)
    after = functools.partial(_after_forward, distiller)
    before._kd_mm = after._kd_mm = True  # type: ignore[attr-defined]
    return [student.register_forward_pre_hook(before, with_kwargs=True),
            student.register_forward_hook(after, with_kwargs=True, always_call=True)]


def _arguments(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Any, Any, str]:
    """inputs, data_samples and mode of a host model's forward."""
    names = ('inputs', 'data_samples', 'mode')
    given = dict(zip(names, args))
    given.update({name: kwargs[name] for name in names if name in kwargs})
    return given.get('inputs'), given.get('data_samples'), given.get('mode', 'tensor')


# A compiled train_step (compile=True) breaks here and goes on: which taps are armed changes from step to step.
@torch.compiler.disable
def _before_forward(distiller: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
    inputs, data_samples, mode = _arguments(args, kwargs)
    # A copy of the student (an EMA model made while attached) carries the hooks too, and is none of our business.
    if module is distiller.student and module.training and mode == 'loss':
        distiller.begin(inputs, data_samples)


@torch.compiler.disable
def _after_forward(distiller: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if module is not distiller.student or not module.training or _arguments(args, kwargs)[2] != 'loss':
        return None
    if not isinstance(output, dict):  # the forward raised
        distiller.clear()
        return None
    try:
        return distiller.end(output)
    except BaseException:
        distiller.clear()
        raise
