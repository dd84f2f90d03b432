"""Pure tensor operations shared by two or more methods, adapters or regions."""

import hashlib
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lift(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are.

    Example:
        >>> lift(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def parameter_options(tensor: Tensor) -> Dict[str, Any]:
    """``device`` and ``dtype`` for parameters that act on ``tensor``: its own, but never half precision.

    Example:
        >>> parameter_options(torch.zeros(1, dtype=torch.float16))['dtype']
        torch.float32
    """
    return {'device': tensor.device, 'dtype': lift(tensor.new_empty(0)).dtype}


def one_of(owner: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """``value`` if it is among ``choices``.

    Raises:
        ValueError: it is not; the choices are listed.

    Example:
        >>> one_of('CWDLoss', 'divisor', 'teacher', ('teacher', 'student'))
        'teacher'
    """
    if value not in choices:
        raise ValueError(f'{owner}: {name}={value!r} is not one of {", ".join(map(repr, choices))}')
    return value


def positive(owner: str, name: str, value: float) -> float:
    """``value`` if it is above 0.

    Raises:
        ValueError: it is not.

    Example:
        >>> positive('CWDLoss', 'tau', 4)
        4.0
    """
    if not value > 0:
        raise ValueError(f'{owner}: {name}={value!r} must be above 0')
    return float(value)


def resize(tensor: Tensor, size: Tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of (N, C, H, W) to ``size``; the tensor itself when it has that size.

    Example:
        >>> resize(torch.ones(1, 2, 4, 4), (8, 6)).shape
        torch.Size([1, 2, 8, 6])
    """
    if tuple(tensor.shape[2:]) == tuple(size):
        return tensor
    return F.interpolate(tensor, size=tuple(size), mode='bilinear', align_corners=align_corners)


def nonzero(divisor: Tensor) -> Tensor:
    """``divisor`` with zeros replaced by one, so that an empty sum divided by it stays zero.

    Example:
        >>> nonzero(torch.tensor([0., 0.5]))
        tensor([1.0000, 0.5000])
    """
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def safe_sqrt(tensor: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite (which would turn into NaN upstream).

    Example:
        >>> x = torch.tensor([0., 4.], requires_grad=True)
        >>> safe_sqrt(x).sum().backward(); x.grad
        tensor([0.0000, 0.2500])
    """
    above = tensor > 0
    return torch.where(above, torch.where(above, tensor, torch.ones_like(tensor)).sqrt(), torch.zeros_like(tensor))


def apply_weights(values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """``values`` (N, C, H, W) times ``mask`` (N, 1, H, W); the values themselves without mask.

    Example:
        >>> apply_weights(torch.ones(1, 2, 1, 1), torch.full((1, 1, 1, 1), 3.)).flatten()
        tensor([3., 3.])
    """
    return values if mask is None else values * mask.to(values.dtype)


def weighted_mean(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Mean over all elements, weighted by a region.

    ``sum(m * v) / (C * sum(m))``; the plain mean without mask, and 0 (still connected to ``values``) where the whole
    mask is zero.

    Args:
        values: (N, C, H, W).
        mask: (N, 1, H, W), not negative, or None.

    Returns:
        A scalar.

    Example:
        >>> weighted_mean(torch.tensor([1., 3.]).view(1, 1, 1, 2), torch.tensor([3., 1.]).view(1, 1, 1, 2))
        tensor(1.5000)
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    mask = mask.to(values.dtype)
    return (values * mask).sum() / (nonzero(mask.sum()) * max(values.shape[1], 1))


def unit_vectors(tensor: Tensor, dim: int = 1) -> Tensor:
    """Vectors along ``dim`` divided by their length; a zero vector stays zero, with a finite gradient.

    (``F.normalize`` multiplies the gradient at a zero vector, which a ReLU makes now and then, by 1e12.)

    Example:
        >>> unit_vectors(torch.tensor([[3., 4.], [0., 0.]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = safe_sqrt(tensor.square().sum(dim=dim, keepdim=True))
    return tensor / torch.where(length > 1e-12, length, torch.ones_like(length))


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU random generator that depends on ``numbers`` alone; the global one is not touched.

    Example:
        >>> first, second = (torch.rand(3, generator=seeded_generator(1, 2)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    digest = hashlib.blake2b(','.join(map(str, numbers)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'big'))


def keep_mask(uniform: Tensor, mask_ratio: float) -> Tensor:
    """1 where a uniform number in [0, 1) keeps its place, 0 where it is masked out (above ``1 - mask_ratio``).

    Example:
        >>> keep_mask(torch.tensor([0.1, 0.9]), 0.5)
        tensor([1., 0.])
    """
    return (uniform <= 1 - mask_ratio).to(uniform.dtype)


class _RelationDivergence(torch.autograd.Function):
    """The gradient is computed along with the value, block by block, so that no block has to be kept or repeated."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor,
                weights: Tensor, bonus: Optional[Tensor], tau: float, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = student.new_zeros(())
        grad = torch.zeros_like(student) if wanted else None
        grad_keys = torch.zeros_like(student_keys) if wanted else None
        for start in range(0, student.shape[0], rows):
            block = slice(start, start + rows)
            for group in range(student_keys.shape[0]):
                log_s = student[block] @ student_keys[group].T / tau
                log_t = teacher[block] @ teacher_keys[group].T / tau
                if bonus is not None:
                    log_s, log_t = log_s + bonus[group], log_t + bonus[group]
                log_s, log_t = F.log_softmax(log_s, dim=1), F.log_softmax(log_t, dim=1)
                share = log_t.exp()
                weight = weights[block, group]
                total += (share * (log_t - log_s)).sum(dim=1) @ weight
                if grad is not None and grad_keys is not None:
                    slope = (log_s.exp() - share) * (weight[:, None] / tau)
                    grad[block] += slope @ student_keys[group]
                    grad_keys[group] += slope.T @ student[block]
        if grad is not None and grad_keys is not None:
            ctx.save_for_backward(grad, grad_keys)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        grad, grad_keys = ctx.saved_tensors
        return (upstream[0] * grad, upstream[0] * grad_keys, None, None, None, None, None, None)


def relation_divergence(student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor,
                        weights: Tensor, tau: float, key_weights: Optional[Tensor] = None,
                        max_block: int = 2**23) -> Tensor:
    """Divergence between the relations of rows to keys, student against teacher, without ever holding all relations.

    ``sum_{a,g} w[a, g] * KL(p_t[a, g] || p_s[a, g])`` with ``p[a, g]`` the softmax over the B keys of group g of
    ``row_a . key_b / tau``.  Rows are taken in blocks; values do not depend on the size of a block but for rounding.

    Args:
        student: rows (A, Cs).
        student_keys: (G, B, Cs); they may need a gradient too.
        teacher: rows (A, Ct), no gradient.
        teacher_keys: (G, B, Ct), no gradient.
        weights: (A, G).
        tau: temperature, above 0.
        key_weights: (G, B), not negative: ``p`` is proportional to them; a group of zeros alone must have weights 0.
        max_block: largest number of similarities of one matrix at a time. Default 2**23, 32 MiB in float32.

    Returns:
        A scalar; differentiable once.

    Example:
        >>> x = torch.randn(6, 4)
        >>> relation_divergence(x, x[None], 2 * x, 2 * x[None], torch.ones(6, 1), 1.0) > 0
        tensor(True)
    """
    bonus = None
    if key_weights is not None:
        inside = key_weights > 0
        # A finite stand-in for -inf: the difference of two -inf would be NaN.
        bonus = torch.where(inside, key_weights, torch.ones_like(key_weights)).log().masked_fill(~inside, -1e30)
    rows = max(max_block // max(student_keys.shape[1], 1), 1)
    return _RelationDivergence.apply(student, student_keys, teacher.detach(), teacher_keys.detach(), weights.detach(),
                                     bonus, tau, rows)
