"""The two hooks on the student's forward, by which a distiller takes part in a training that is not its own."""

import functools
import inspect
import warnings
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, Tuple

import torch
from torch import Tensor, nn

from kd_mm.ops.modes import autocast_dtype

HALF = (torch.float16, torch.bfloat16)
#: What a student of no host has to do.
CONTRACT = ("the distillation terms are added to the dict of losses that the student's forward(inputs, data_samples, "
            "mode='loss') returns, as those of mmdet and mmseg do. Put a network that returns its outputs into a "
            'module with such a forward (docs/own_loop.md has one)')


class _Hook(functools.partial):  # type: ignore[type-arg]
    """A hook that a copy of the student shares: copied, it would take the teachers along, and distil the copy."""

    _kd_mm = True

    def __deepcopy__(self, memo: Any) -> '_Hook':
        return self


def attach(distiller: Any) -> List[Any]:
    """Put the two hooks on the student of a :class:`~kd_mm.engine.distiller.Distiller`; their handles.

    Raises:
        RuntimeError: a distiller is attached already.
        ValueError: the student's forward has no ``mode``, so that it could never be asked for its losses.
    """
    student = distiller.student
    arguments = inspect.signature(student.forward).parameters.values()
    if not any(argument.name == 'mode' or argument.kind is argument.VAR_KEYWORD for argument in arguments):
        raise ValueError(f"{type(student).__name__}.forward has no argument 'mode': {CONTRACT}")
    if any(getattr(hook, '_kd_mm', False) for hook in student._forward_hooks.values()):
        raise RuntimeError('a distiller is already attached to this student')
    return [student.register_forward_pre_hook(_Hook(_before_forward, distiller), with_kwargs=True),
            student.register_forward_hook(_Hook(_after_forward, distiller), with_kwargs=True, always_call=True)]


def _arguments(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Any, Any, str]:
    """inputs, data_samples and mode of a host model's forward."""
    names = ('inputs', 'data_samples', 'mode')
    given = dict(zip(names, args))
    given.update({name: kwargs[name] for name in names if name in kwargs})
    return given.get('inputs'), given.get('data_samples'), given.get('mode', 'tensor')


def _with_samples(args: Tuple[Any, ...], kwargs: Dict[str, Any], samples: Any) -> Tuple[Any, Dict[str, Any]]:
    """The arguments of a host model's forward with other data samples."""
    if 'data_samples' in kwargs:
        return args, {**kwargs, 'data_samples': samples}
    return (args[0], samples, *args[2:]), kwargs


def _precision(inputs: Any) -> ContextManager[Any]:
    """Mixed precision for a student whose own weights are in half precision (DeepSpeed, FSDP): no autocast is on there.

    Teachers and adapters are in full precision, and then run as they do in any other mixed-precision training.
    """
    kind = inputs.device.type if isinstance(inputs, Tensor) else 'cpu'
    if not isinstance(inputs, Tensor) or inputs.dtype not in HALF or autocast_dtype(kind):
        return nullcontext()
    return torch.autocast(kind, inputs.dtype)


# A compiled train_step (compile=True) breaks here and goes on: which taps are armed changes from step to step.
@torch.compiler.disable
def _before_forward(distiller: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    inputs, data_samples, mode = _arguments(args, kwargs)
    # A copy of the student (an EMA model made while attached) carries the hooks too, and is none of our business.
    if module is distiller.student and module.training and mode == 'loss':
        distiller.asked = True
        with _precision(inputs):
            # Teachers may look at the batch in full precision; what the cast has rounded stays rounded.
            half = isinstance(inputs, Tensor) and inputs.dtype in HALF
            samples = distiller.begin(inputs.float() if half else inputs, data_samples)
            if samples is not data_samples:
                return _with_samples(args, kwargs, samples)
    elif module is distiller.student and module.training and torch.is_grad_enabled() and not distiller.asked:
        # A loop that computes its loss outside would train without distillation and look well.
        distiller.asked = True
        warnings.warn(f'kd_mm: {type(module).__name__} runs in training mode without mode=\'loss\', and nothing is '
                      f'distilled in such a pass: {CONTRACT}', stacklevel=2)
    return None


@torch.compiler.disable
def _after_forward(distiller: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    inputs, _, mode = _arguments(args, kwargs)
    if module is not distiller.student or not module.training or mode != 'loss':
        return None
    if not isinstance(output, dict):
        distiller.clear()
        if output is not None:  # None: the forward raised
            raise ValueError(f"{type(module).__name__}.forward(mode='loss') returned {type(output).__name__}: "
                             f'{CONTRACT}')
        return None
    try:
        with _precision(inputs):
            return distiller.end(output)
    except BaseException:
        distiller.clear()
        raise
