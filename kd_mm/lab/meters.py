"""Meters: allocated bytes and FLOPs of a call."""

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing is written to the error stream inside: the profiler's native part prints lines that no option stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocation_peak(call: Callable[[], Any]) -> Optional[int]:
    """Highest sum of allocations less releases on the CPU during ``call()``; None where torch does not report it.

    Example:
        >>> allocation_peak(lambda: torch.zeros(1024) + 1) // 1024  # two tensors of 4 KiB
        8
    """
    with _quiet_stderr(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    try:
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
        clock = 'start_ns' if hasattr(events[0], 'start_ns') else 'start_us'
        changes = [(getattr(event, clock)(), event.nbytes()) for event in events]
    except (AttributeError, IndexError):
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def memory_rise(call: Callable[[], Any], device: Any = 'cpu') -> Optional[int]:
    """How many bytes of tensors ``call()`` needs on top of those before it; None where it cannot be measured."""
    device = torch.device(device)
    if device.type != 'cuda':
        return allocation_peak(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of ``call()``, a multiplication and an addition as two; of matrix products, convolutions and attention.

    Everything element by element, and operations of a host's own (RoIAlign, deformable convolution), count nothing.

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    # torch counts the attention of GPUs only, as of 2.13; formulas get the shapes of the arguments.
    name = '_scaled_dot_product_flash_attention_for_cpu'
    formulas = {getattr(torch.ops.aten, operation): formula for operation, formula in (
        (name, lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)),
        (f'{name}_backward', lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
            grad, query, key, value))) if hasattr(torch.ops.aten, operation)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())
