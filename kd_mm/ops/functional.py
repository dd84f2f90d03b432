"""Pure tensor operations shared by two or more methods, adapters or regions."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def resize(tensor: Tensor, size: Tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of (N, C, H, W) to ``size``; the tensor itself when it has that size.

    Example:
        >>> resize(torch.ones(1, 2, 4, 4), (8, 6)).shape
        torch.Size([1, 2, 8, 6])
    """
    if tuple(tensor.shape[2:]) == tuple(size):
        return tensor
    return F.interpolate(tensor, size=tuple(size), mode='bilinear', align_corners=align_corners)


def resize_part(tensor: Tensor, size: Tuple[int, int], part: Tuple[float, float]) -> Tensor:
    """Bilinear resize of the upper left part of (N, C, H, W) to ``size``.

    Args:
        tensor: maps.
        size: (H, W) of the result.
        part: share of height and width that is taken; edges may lie within a cell. All of it is :func:`resize`.

    Example:
        >>> resize_part(torch.arange(4.).view(1, 1, 1, 4), (1, 2), (1.0, 0.5)).flatten()
        tensor([0., 1.])
    """
    if part == (1.0, 1.0):
        return resize(tensor, size)
    rows, columns = ((torch.arange(count, dtype=torch.float32, device=tensor.device) + 0.5) / count * share * 2 - 1
                     for count, share in zip(size, part))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing='ij')[::-1], dim=-1)
    return F.grid_sample(tensor, grid.to(tensor.dtype).expand(tensor.shape[0], -1, -1, -1), mode='bilinear',
                         padding_mode='border', align_corners=False)


def average_to(tensor: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, C, H, W) brought to ``size`` by adaptive average pooling; the tensor itself when it has that size.

    Each cell is the mean of the cells that it touches; towards a finer size cells are repeated.

    Example:
        >>> average_to(torch.tensor([1., 3., 5., 7.]).view(1, 1, 1, 4), (1, 2)).flatten()
        tensor([2., 6.])
    """
    return tensor if tuple(tensor.shape[2:]) == tuple(size) else F.adaptive_avg_pool2d(tensor, size)


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
    above = ~(tensor <= 0)  # NaN stays NaN
    return torch.where(above, torch.where(above, tensor, torch.ones_like(tensor)).sqrt(), torch.zeros_like(tensor))


def unit_norm(features: Tensor, eps: float = 1e-12) -> Tensor:
    """Each sample divided by the L2 norm of all its elements (at least ``eps``).

    Example:
        >>> unit_norm(torch.full((1, 4, 1, 1), 3.0)).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    norm = safe_sqrt(features.flatten(1).square().sum(dim=1)).clamp(min=eps)
    return features / norm.view(-1, *[1] * (features.dim() - 1))


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


def unit_vectors(tensor: Tensor, dim: int = 1, eps: float = 0.0) -> Tensor:
    """``x / (|x| + eps)`` along ``dim``; a zero vector stays zero and its gradient stays finite.

    Example:
        >>> unit_vectors(torch.tensor([[3., 4.], [0., 0.]]), dim=1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = safe_sqrt(tensor.square().sum(dim=dim, keepdim=True))
    return tensor / (nonzero(norm) + eps)


def attention_vector(features: Tensor, p: float = 2.0, mask: Optional[Tensor] = None,
                     size: Optional[Tuple[int, int]] = None) -> Tensor:
    """``mean_c |F|^p`` over the cells as one vector of length 1 for each image.

    Args:
        features: (N, C, H, W).
        p: exponent, at least 1.
        mask: (N, 1, H, W) or None; the attention is multiplied by it before it is brought to length 1.
        size: the attention is averaged to this size first, if it has another.

    Returns:
        (N, H*W); zero for an image whose mask is empty.

    Example:
        >>> attention_vector(torch.tensor([1., 2.]).view(1, 1, 1, 2), p=1)
        tensor([[0.4472, 0.8944]])
    """
    energy = features.square() if p == 2 else features.abs().pow(p)
    energy = apply_weights(energy.mean(dim=1, keepdim=True), mask)
    if size is not None and tuple(energy.shape[2:]) != tuple(size):
        energy = F.adaptive_avg_pool2d(energy, size)
    return unit_vectors(energy.flatten(1), dim=1)


def channel_affinity(features: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """``sum_i m_i F_ci F_di`` between all pairs of channels, each row brought to length 1.

    Args:
        features: (N, C, H, W).
        mask: (N, 1, H, W) or None.

    Returns:
        (N, C, C).

    Example:
        >>> channel_affinity(torch.tensor([3., 4.]).view(1, 2, 1, 1))[0]
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000]])
    """
    weighted = apply_weights(features, mask).flatten(2)
    return unit_vectors(weighted @ features.flatten(2).transpose(1, 2), dim=2)


def spatial_log_softmax(features: Tensor, tau: float = 1.0,
                        mask: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
    """Logarithm of the distribution over the cells, ``p(i)`` proportional to ``m_i * exp(F_i / tau)``.

    Outside of the mask it is a large negative number and not infinite: the difference of two infinities is NaN.

    Args:
        features: (N, C, H, W).
        tau: temperature, above 0.
        mask: (N, 1, H, W), not negative, or None.

    Returns:
        (N, C, H*W).  Also a bool (N, 1): does the image's mask have any cell?  (None without a mask.)  Discard the rows
        of images where it is false.

    Example:
        >>> log_p, _ = spatial_log_softmax(torch.zeros(1, 1, 2, 2))
        >>> log_p.exp().flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    values = features.flatten(2) / tau
    if mask is None:
        return F.log_softmax(values, dim=2), None
    weights = mask.to(values.dtype).flatten(2)
    filled = (weights > 0).any(dim=2)
    inside = (weights > 0) | ~filled[:, :, None]
    bonus = torch.where(weights > 0, weights, torch.ones_like(weights)).log()
    return F.log_softmax((values + bonus).masked_fill(~inside, -1e30), dim=2), filled


def class_centres(features: Tensor, members: Tensor) -> Tuple[Tensor, Tensor]:
    """Weighted mean of the cells of each class, for each image: one product of matrices, no loop over classes.

    Args:
        features: (N, C, P).
        members: weight of each cell in each class, (N, P, K).

    Returns:
        Centres (N, C, K), zero for a class without cells; the sums of the weights (N, K).

    Example:
        >>> members = torch.tensor([[[1., 0.], [1., 0.], [0., 1.]]])
        >>> centres, counts = class_centres(torch.tensor([[[1., 3., 5.]]]), members)
        >>> centres.flatten(), counts.flatten()
        (tensor([2., 5.]), tensor([2., 1.]))
    """
    counts = members.sum(dim=1)
    return features @ members / nonzero(counts)[:, None], counts


def cell_mean(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Sum over channels, mean over images and cells, weighted by a region.

    ``sum(m * v) / sum(m)``; 0 (still connected to ``values``) where the whole mask is zero.

    Args:
        values: (N, C, H, W).
        mask: (N, 1, H, W), not negative, or None.

    Returns:
        A scalar, C times :func:`weighted_mean`.

    Example:
        >>> cell_mean(torch.tensor([1., 3.]).view(1, 1, 1, 2), torch.tensor([3., 1.]).view(1, 1, 1, 2))
        tensor(1.5000)
    """
    return weighted_mean(values, mask) * max(values.shape[1], 1)


def dice_similarity(masks: Tensor) -> Tensor:
    """Mean Dice coefficient of the pairs of masks of an image: 1 if all are equal, 0 if they do not overlap.

    Args:
        masks: (N, T, h, w), not negative.

    Example:
        >>> dice_similarity(torch.eye(2).view(1, 2, 1, 2))
        tensor(0.)
    """
    count, tokens = masks.shape[:2]
    flat = masks.flatten(2)
    inner = flat @ flat.transpose(1, 2)
    square = inner.diagonal(dim1=1, dim2=2)
    dice = 2 * inner / (square[:, :, None] + square[:, None, :] + 2e-12)
    others = dice.sum() - dice.diagonal(dim1=1, dim2=2).sum()
    return others / max(count * tokens * (tokens - 1), 1)


def align_moments(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """The student's feature with the teacher's mean and standard deviation of every channel.

    ``(s - mean(s)) / (std(s) + eps) * std(t) + mean(t)`` over (N, H, W), ``std`` unbiased, the teacher's without
    gradient.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W) of the same C.
        eps: added to the student's deviation. Default 1e-6 [C].

    Example:
        >>> x = torch.randn(2, 3, 4, 5)
        >>> torch.allclose(align_moments(2 * x + 1, x), x, atol=1e-5)
        True
    """
    axes = (0, 2, 3)
    # The single value of one image of one cell has no unbiased deviation; its own is 0.
    correction = 0 if student[:, 0].numel() == 1 else 1
    mean, std = student.mean(dim=axes, keepdim=True), student.std(dim=axes, keepdim=True, correction=correction)
    teacher = teacher.detach()
    wanted = teacher.std(dim=axes, keepdim=True, correction=correction), teacher.mean(dim=axes, keepdim=True)
    return (student - mean) / (std + eps) * wanted[0] + wanted[1]
