"""Gradient averaging for parameters that DistributedDataParallel does not know.

DDP knows the parameters that are there when it wraps the student; adapters come later.  Their gradients are averaged
once at the end of each backward pass, in one message, in an order that is the same on every rank.
"""

from typing import List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def broadcast(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


def mean(value: Tensor) -> Tensor:
    """The mean of a detached value over the ranks, the same on every rank."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average ``.grad`` over the ranks; a parameter without gradient counts as zero."""
    parts: List[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parts.append(parameter.grad)
    if not parts:
        return
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    flat /= world_size()
    for part, mean in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(mean.view_as(part))


def average_after_backward(trigger: Tensor, parameters: Sequence[Tensor], wrapper: Optional[nn.Module]) -> None:
    """Average the gradients of ``parameters`` at the end of the backward pass that goes through ``trigger``.

    Args:
        trigger: a loss of this step, the same one on every rank.
        parameters: the extras that take part in this step.
        wrapper: the student's DDP wrapper; while it accumulates (``no_sync``) nothing is sent.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not parameters or not trigger.requires_grad:
        return
    if not getattr(wrapper, 'require_backward_grad_sync', True):
        return

    def at_backward(gradient: Tensor) -> Tensor:
        # The engine runs it when every gradient of this backward pass is in place, as DDP's own last step.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: average_gradients(parameters))
        return gradient

    trigger.register_hook(at_backward)
