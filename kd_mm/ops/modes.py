"""What a pass of a model must leave as it found it: the random generators and the train or eval flags."""

import random
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved_random_state(seed: Optional[int] = None, device: Any = None) -> Iterator[None]:
    """Whatever is drawn inside leaves Python's, numpy's and torch's generators as they were.

    Args:
        seed: of torch's generators inside. Default None: they go on from where they are.
        device: the only accelerator that is used inside; None for all of them, which costs more where there are many.

    Example:
        >>> before = torch.get_rng_state()
        >>> with preserved_random_state():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    devices: Optional[List[Any]] = None
    if device is not None:
        device = torch.device(device)
        devices = [device] if device.type == 'cuda' else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        if seed is not None and devices is None:
            torch.manual_seed(seed)
        elif seed is not None:  # torch.manual_seed would touch the other accelerators too
            torch.default_generator.manual_seed(seed)
            for used in devices or ():
                with torch.cuda.device(used):
                    torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every sub-module in eval inside; the flag of each as it was afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def autocast_dtype(kind: str) -> Optional[torch.dtype]:
    """The dtype of the mixed precision around, on a kind of device (``'cpu'``, ``'cuda'``); None outside of one.

    Example:
        >>> with torch.autocast('cpu', torch.bfloat16):
        ...     autocast_dtype('cpu')
        torch.bfloat16
    """
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # before torch 2.4 each device has functions of its own
    if kind == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
