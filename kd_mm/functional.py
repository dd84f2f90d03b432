"""Pure tensor operations shared by two or more methods, adapters or regions."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

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


def factors(owner: str, **given: float) -> List[float]:
    """Factors from 0, not all of them 0.

    Raises:
        ValueError: they are not.

    Example:
        >>> factors('BCKDLoss', class_weight=1, box_weight=0)
        [1.0, 0.0]
    """
    if any(not value >= 0 for value in given.values()) or not any(given.values()):
        said = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(f'{owner}: {said} must not be negative, and one above 0')
    return [float(value) for value in given.values()]


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


def intersection(boxes: Tensor, others: Tensor) -> Tuple[Tensor, Tensor]:
    """Area of the overlap and of the union of boxes, element by element (or broadcast).

    Args:
        boxes, others: (..., 4), x1 y1 x2 y2. One that is inside out (some heads predict such) has no area.

    Example:
        >>> overlap, union = intersection(torch.tensor([0., 0., 2., 2.]), torch.tensor([1., 1., 3., 3.]))
        >>> overlap.item(), union.item()
        (1.0, 7.0)
    """
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(part[..., 2:] - part[..., :2]).clamp(min=0).prod(dim=-1) for part in (boxes, others)]
    return overlap, areas[0] + areas[1] - overlap


def giou_loss(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """``1 - GIoU`` of paired boxes (Rezatofighi et al., CVPR 2019), from 0 (equal) to 2: (...,).

    ``GIoU = overlap / union - (hull - union) / hull`` with the smallest box around both as hull.

    Args:
        boxes, others: (..., 4), x1 y1 x2 y2.
        eps: smallest area that is divided by.

    Example:
        >>> giou_loss(torch.tensor([0., 0., 2., 2.]), torch.tensor([0., 0., 2., 2.])).item()
        0.0
    """
    overlap, union = intersection(boxes, others)
    union = union.clamp(min=eps)
    low, high = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1).clamp(min=eps)
    return 1 - (overlap / union - (hull - union) / hull)
