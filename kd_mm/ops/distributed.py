"""Gradient averaging for parameters that DistributedDataParallel does not know.

DDP knows the parameters that are there when it wraps the student; adapters come later.  Their gradients are averaged
once at the end of each backward pass, in one message, in an order that is the same on every rank.
"""

from typing import Any, List, Optional, Sequence

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


def not_finite(value: Tensor) -> List[int]:
    """The ranks on which a scalar is not finite, the same list on every rank.

    Example:
        >>> not_finite(torch.tensor(1.0)), not_finite(torch.tensor(float('nan')))
        ([], [0])
    """
    return [int(index) for index in (~of_ranks(torch.isfinite(value.detach()).all()[None]))[:, 0].nonzero()]


def of_ranks(flags: Tensor) -> Tensor:
    """The truth values of all ranks, the same on every rank: (R, M) of (M, ); it does not wait for the accelerator.

    Example:
        >>> of_ranks(torch.tensor([True, False]))
        tensor([[ True, False]])
    """
    if world_size() == 1:
        return flags[None]
    found = torch.zeros(world_size(), len(flags), device=flags.device)
    found[rank()] = flags.float()
    dist.all_reduce(found)
    return found > 0


def everywhere(value: bool, device: Any) -> bool:
    """Whether a truth value is true on every rank; the same answer on every rank."""
    if world_size() == 1:
        return value
    return bool(mean(torch.tensor(float(value), device=device)) == 1)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average ``.grad`` over the ranks in one message; a parameter without gradient counts as zero.

    One that has none on any rank stays without, so that decay and momentum leave it alone as they do in one process.
    Every rank must give the same parameters.
    """
    if world_size() == 1 or not parameters:
        return
    given = [parameter.grad is not None for parameter in parameters]
    parts = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    flat = torch.cat([*(part.reshape(-1) for part in parts), parts[0].new_tensor(given)])
    dist.all_reduce(flat)
    *means, counts = (flat / world_size()).split([*(part.numel() for part in parts), len(parts)])
    # A look at the numbers waits for the accelerator: only where something is missing.
    anywhere = given if all(given) else (counts > 0).tolist()
    for parameter, part, mean, found in zip(parameters, parts, means, anywhere):
        if found:
            part.copy_(mean.view_as(part))
            parameter.grad = part


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


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks one after the other, in the order of the ranks and without gradient.

    Args:
        tensor: of the same shape on every rank; the only one's own without a process group.

    Returns:
        (R * N, ...).

    Raises:
        ValueError: the shapes differ between the ranks.
    """
    tensor = tensor.detach()
    ranks = world_size()
    if ranks == 1:
        return tensor
    shape = torch.tensor([tensor.dim(), *tensor.shape] + [0] * (8 - tensor.dim()), device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(ranks)]
    dist.all_gather(shapes, shape)
    if any(not torch.equal(other, shape) for other in shapes):
        found = ', '.join(str(tuple(other[1:1 + int(other[0])].tolist())) for other in shapes)
        raise ValueError(f'tensors of different shapes on the ranks cannot be gathered: {found}. Give every rank '
                         'batches of one size (crop, drop_last=True), or turn `gather` off')
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.count = tensor.shape[0]
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.count:(rank() + 1) * ctx.count]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As :func:`gather`; every rank receives the sum of what the losses of all ranks say about its own part.

    The average of the ranks' parameter gradients is then the gradient of the average of their losses.  Every rank must
    call backward.
    """
    return tensor if world_size() == 1 else _GatherWithGradient.apply(tensor)
