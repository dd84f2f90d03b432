"""Pure tensor operations shared by two or more methods, adapters or regions."""

import hashlib
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
    above = tensor > 0
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


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU random generator that depends on ``numbers`` alone; the global one is not touched.

    Example:
        >>> first, second = (torch.rand(3, generator=seeded_generator(1, 2)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    digest = hashlib.blake2b(','.join(map(str, numbers)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'big'))


def draw(weights: Tensor, limit: Optional[int], generator: torch.Generator) -> Tensor:
    """Indices of at most ``limit`` entries, drawn without replacement; the larger the weight, the likelier.

    An entry of weight 0 is never drawn.  Where ``limit`` entries or fewer have a weight they all are taken, in order.

    Args:
        weights: (M,), not negative.
        limit: the most to draw; None for no bound.
        generator: a CPU generator; what it draws depends on M alone, so that weights of 1 everywhere are no weights.

    Example:
        >>> draw(torch.tensor([1., 0., 1.]), 5, seeded_generator(0))
        tensor([0, 2])
        >>> draw(torch.ones(100), 5, seeded_generator(0)).unique().numel()
        5
    """
    inside = weights.nonzero()[:, 0]
    if limit is None or inside.numel() <= limit:
        return inside
    # The largest log(u) / w are a weighted draw without replacement (Efraimidis and Spirakis).
    keys = torch.rand(weights.numel(), generator=generator).clamp(min=1e-30).log().to(weights.device) / weights.float()
    return keys.topk(limit).indices  # a weight of 0 made the key -inf


#: What the relations of a map (N, C, H, W) are between: see :func:`relation_rows`.
SAMPLES = ('cell', 'image')


def relation_rows(student: Tensor, teacher: Tensor, mask: Optional[Tensor], samples: str, limit: Optional[int],
                  generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """The samples whose relations a loss compares, one a row, the same ones on both sides.

    Args:
        student: rows (M, Cs), or maps (N, Cs, H, W).
        teacher: rows (M, Ct), or maps (N, Ct, H, W); of another H and W only with 'image'.
        mask: region weights (N, 1, H, W) of the teacher's size, or None. Cells are drawn by their weight, and never
            where it is 0. With 'image' it multiplies the maps, and images where it is 0 everywhere are left out.
        samples: what a map gives: 'cell' (each cell of each image is a sample of C numbers) or 'image' (each entry of
            the first dimension, image or RoI, is one sample of C*H*W numbers).
        limit: the most samples; more are drawn at random. None for all.
        generator: of the draw.

    Returns:
        Rows (M', Ds) and (M', Dt), M' at most ``limit``.

    Example:
        >>> x = torch.randn(2, 8, 4, 5)
        >>> relation_rows(x, x, None, 'cell', 30, seeded_generator(0))[0].shape
        torch.Size([30, 8])
        >>> relation_rows(x, x, None, 'image', 30, seeded_generator(0))[0].shape
        torch.Size([2, 160])
    """
    if samples == 'cell' and teacher.dim() == 4:
        count, _, height, width = teacher.shape
        weights = teacher.new_ones(count * height * width) if mask is None else mask.flatten()
        chosen = draw(weights, limit, generator)
        image, cell = chosen // (height * width), chosen % (height * width)
        return student.flatten(2)[image, :, cell], teacher.flatten(2)[image, :, cell]
    weights = teacher.new_ones(teacher.shape[0]) if mask is None else (mask > 0).flatten(1).any(dim=1).to(teacher.dtype)
    if mask is not None:
        student = apply_weights(student, resize(mask, (student.shape[2], student.shape[3])))
        teacher = apply_weights(teacher, mask)
    chosen = draw(weights, limit, generator)
    return student.flatten(1)[chosen], teacher.flatten(1)[chosen]


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


def keep_mask(uniform: Tensor, mask_ratio: float) -> Tensor:
    """1 where a uniform number in [0, 1) keeps its place, 0 where it is masked out (above ``1 - mask_ratio``).

    Example:
        >>> keep_mask(torch.tensor([0.1, 0.9]), 0.5)
        tensor([1., 0.])
    """
    return (uniform <= 1 - mask_ratio).to(uniform.dtype)


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
