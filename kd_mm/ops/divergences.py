"""Divergences of class scores, with softmax and with independent sigmoids."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import from_zero, one_of
from kd_mm.ops.functional import apply_weights, safe_sqrt


def standardise_logits(logits: Tensor, dim: int = 1, mask: Optional[Tensor] = None, eps: float = 1e-7) -> Tensor:
    """``(z - mean) / (std + eps)`` over what a softmax is over, with the unbiased deviation.

    Standardised logits of student and teacher have the same mean and scale, so that their order and their shape alone
    are compared (Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024).  Equal logits become 0 with
    gradient 0; the authors' code has a gradient of ``1 / eps`` there.

    Args:
        logits: any shape.
        dim: of the classes (bins, cells). Default 1.
        mask: weights that can be broadcast to the logits, not negative; mean and deviation are those of the weighted
            entries, and ``n / (n - 1)`` counts those whose weight is not 0. None: 1 for all.
        eps: added to the deviation. Default 1e-7 [C].

    Example:
        >>> standardise_logits(torch.tensor([[0., 1., 2.], [5., 5., 5.]])).round().tolist()
        [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if mask is None:
        centred = logits - logits.mean(dim=dim, keepdim=True)
        spread = centred.square().sum(dim=dim, keepdim=True) / max(logits.shape[dim] - 1, 1)
    else:
        weights = mask.to(logits.dtype).expand_as(logits)
        total = weights.sum(dim=dim, keepdim=True)
        total = torch.where(total > 0, total, torch.ones_like(total))
        centred = logits - (logits * weights).sum(dim=dim, keepdim=True) / total
        count = (weights > 0).sum(dim=dim, keepdim=True)
        spread = (centred.square() * weights).sum(dim=dim, keepdim=True) / total
        spread = spread * count / (count - 1).clamp(min=1)
    std = safe_sqrt(spread)
    return torch.where(std > 0, centred / (std + eps), centred * 0)


def softmax_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0, divergence: str = 'kl',
                       standardise: bool = False) -> Tensor:
    """Terms of the divergence between two softmax distributions over dimension 1, one an element.

    ``p_t * (log p_t - log p_s)`` (kl) or ``-p_t * log p_s`` (cross_entropy), ``p = softmax(z / tau)``.

    Args:
        student: logits (M, K) or (N, K, H, W).
        teacher: logits of the same shape.
        tau: temperature, above 0.
        divergence: 'kl' or 'cross_entropy'.
        standardise: both sides go through :func:`standardise_logits` first.

    Returns:
        Terms of the shape of ``student``; their sum over dimension 1 is the divergence. Not multiplied by tau squared.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 1.0]])
        >>> softmax_divergence(z, z).abs().sum().item() < 1e-6
        True
    """
    if standardise:
        student, teacher = standardise_logits(student), standardise_logits(teacher)
    log_s = F.log_softmax(student / tau, dim=1)
    log_t = F.log_softmax(teacher / tau, dim=1)
    return log_t.exp() * (log_t - log_s if divergence == 'kl' else -log_s)


DIVERGENCES = ('kl', 'cross_entropy')


class _BernoulliKL(torch.autograd.Function):
    """Keeps the logits alone, where autograd would keep six more tensors of their size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        # By differences of logarithms and not of two entropies, whose rounding would leave negative numbers.
        inside = F.logsigmoid(teacher).sub_(F.logsigmoid(student))
        outside = F.logsigmoid(-teacher).sub_(F.logsigmoid(-student))
        return outside.lerp_(inside, teacher.sigmoid())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        student, teacher = ctx.saved_tensors
        target = teacher.sigmoid()
        to_teacher = target * (1 - target) * (teacher - student) * upstream if ctx.needs_input_grad[1] else None
        return (student.sigmoid() - target) * upstream, to_teacher


def sigmoid_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0, beta: float = 0.0,
                       divergence: str = 'kl') -> Tensor:
    """Terms of the divergence between Bernoulli distributions, one an element.

    With ``q = sigmoid(z_t / tau)`` and ``p = sigmoid(z_s / tau)``:
    ``|q - p|^beta * (BCE(z_s / tau, q) - [H(q) if divergence == 'kl'])``, where ``H(q) = min_z BCE(z, q)``.

    Args:
        student: logits of any shape.
        teacher: logits of the same shape.
        tau: temperature, above 0.
        beta: exponent of the quality-focal factor, 0 or at least 1; its gradient is kept, as published.
        divergence: 'kl' or 'cross_entropy'.

    Returns:
        Terms of the shape of ``student``, not multiplied by tau squared.

    Example:
        >>> round(sigmoid_divergence(torch.zeros(1), torch.zeros(1), divergence='cross_entropy').item(), 4)
        0.6931
    """
    if tau != 1:
        student, teacher = student / tau, teacher / tau
    if divergence == 'kl':
        terms = _BernoulliKL.apply(student, teacher.to(student))
    else:
        terms = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction='none')
    return terms if beta == 0 else terms * (teacher.sigmoid() - student.sigmoid()).abs().pow(beta)


def sigmoid_divergence_sum(student: Tensor, teacher: Tensor, weights: Optional[Tensor], tau: float = 1.0,
                           beta: float = 0.0, divergence: str = 'kl') -> Tensor:
    """Sum of :func:`sigmoid_divergence` over all elements, in blocks: the gradient is the only tensor of their number.

    Args:
        student, teacher, tau, beta, divergence: see :func:`sigmoid_divergence`; logits (N, C, H, W) or (M, K). No
            gradient reaches the teacher.
        weights: (N, 1, H, W) or (M, 1), or None.

    Example:
        >>> sigmoid_divergence_sum(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 1), divergence='cross_entropy')
        tensor(4.1589)
    """
    def total_of(one: Tensor, other: Tensor, weight: Optional[Tensor]) -> Tuple[Tensor]:
        return (apply_weights(sigmoid_divergence(one, other, tau, beta, divergence), weight).sum(), )

    total, = sum_in_blocks(total_of, 'cells', student, teacher, weights)
    return total


def quality_focal(owner: str, beta: float, divergence: str) -> Tuple[float, str]:
    """``beta`` and ``divergence`` of :func:`sigmoid_divergence`, checked.

    Raises:
        ValueError: one is not possible.

    Example:
        >>> quality_focal('BCKDLoss', 1, 'kl')
        (1.0, 'kl')
    """
    # Between 0 and 1 the gradient of |d|^beta is infinite at d = 0, where training is meant to arrive.
    beta = from_zero(owner, 'beta', beta)
    if 0 < beta < 1:
        raise ValueError(f'{owner}: beta={beta!r} must be 0 or at least 1')
    return beta, one_of(owner, 'divergence', divergence, DIVERGENCES)
