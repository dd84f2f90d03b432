"""Double similarity distillation."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled
from kd_mm.ops.checks import boolean, from_zero, number, positive
from kd_mm.ops.functional import attention_vector, nonzero, spatial_log_softmax, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def smallest(features: Features) -> Tuple[int, int]:
    """(H, W) of the map with the fewest cells.

    Example:
        >>> import torch
        >>> smallest((torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 2, 3)))
        (2, 3)
    """
    return min(((tensor.shape[2], tensor.shape[3]) for tensor in features), key=lambda edges: edges[0] * edges[1])


def attention_residuals(features: Features, p: float = 2.0, masks: Sequence[Optional[Tensor]] = ()) -> List[Tensor]:
    """Differences between the attention vectors of every two maps, each brought to length 1.

    Args:
        features: maps (N, C, H, W), whose attentions are averaged to the size of the smallest map.
        p: exponent, see :func:`kd_mm.ops.functional.attention_vector`.
        masks: weights of the cells, one a map, or none.

    Returns:
        One (N, H*W) for each pair.

    Example:
        >>> import torch
        >>> len(attention_residuals(tuple(torch.rand(3, 2, 4, 4, 4))))
        3
    """
    chosen = list(masks) or [None] * len(features)
    size = smallest(features)
    vectors = [attention_vector(tensor, p, mask, size) for tensor, mask in zip(features, chosen)]
    return [unit_vectors(vectors[later] - vectors[earlier], dim=1)
            for later in range(len(vectors)) for earlier in range(later)]


def category_similarity(logits: Tensor, tau: float = 4.0, pool: int = 2,
                        mask: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
    """Products between the spatial distributions of every two classes.

    Args:
        logits: (N, K, H, W).
        tau: temperature, above 0.
        pool: the logits are averaged over windows of so many cells first.
        mask: (N, 1, H, W) or None.

    Returns:
        (N, K, K), zero for an image whose mask is empty; and whether it has any cell, (N, 1), or None without mask.

    Example:
        >>> import torch
        >>> category_similarity(torch.zeros(1, 2, 4, 4))[0]
        tensor([[[0.2500, 0.2500],
                 [0.2500, 0.2500]]])
    """
    if mask is None:
        pooled, weights = F.avg_pool2d(logits, pool, pool, ceil_mode=True), None
    else:
        mask = mask.to(logits.dtype)
        weights = F.avg_pool2d(mask, pool, pool, ceil_mode=True)
        pooled = F.avg_pool2d(logits * mask, pool, pool, ceil_mode=True) / nonzero(weights)
    log_p, filled = spatial_log_softmax(pooled, tau, weights)
    p = log_p.exp() if filled is None else log_p.exp() * filled[:, :, None].to(log_p.dtype)
    return p @ p.transpose(1, 2), filled


@MODELS.register_module()
class DSDLoss(KDLoss):
    """Double similarity distillation (Feng et al., Double Similarity Distillation for Semantic Image Segmentation,
    TIP 2021).

    All levels together; the last one is the class logits, the others are features, such as that of the auxiliary head
    and that of the decode head::

        psd * mean over pairs of levels of mean((r_s - r_t)^2)     r: difference of two attention vectors, of length 1
      + csd * mean over images and pairs of classes of (p_k.p_l |_s - p_k.p_l |_t)^2

    with ``p_k = softmax over cells of the logits of class k, averaged over 2x2 cells, / tau``.

    As published: the authors' code is not public; the formula and the weights are those of CIRKD's re-implementation.
    There the maps must have one size; here the attention of larger ones is averaged to that of the smallest.

    Args:
        psd: weight of the pixel-wise similarity, not negative. Default 1000 [C: CIRKD].
        csd: weight of the category-wise similarity, not negative. Default 10 [C: CIRKD].
        tau: temperature, above 0. Default 4 [C].
        p: exponent of the attention, at least 1. Default 2 [C].
        mask_ignored: leave the pixels whose label is ignored out of the second term, where the data has labels (the
            published code does not). Default True.
        loss_weight: factor of both terms, one number or schedule, see :class:`KDLoss`. Default 1.

    With a region the attention and the distributions are those of its cells.

    Returns:
        Reduction: all levels; mean over cells, pairs
        Reduction: all levels; mean over pairs
        Parts: psd, csd
        Attention, then classes.

    Raises:
        ValueError: an option has a bad value, there is only one level, or the last levels differ in classes.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> levels = torch.randn(2, 8, 6, 6), torch.randn(2, 19, 6, 6)
        >>> build(dict(type='DSDLoss'))(levels, levels).item() < 1e-6
        True
    """

    takes = (4, )
    joint = True
    same_channels = False

    def __init__(self, psd: float = 1000.0, csd: float = 10.0, tau: float = 4.0, p: float = 2.0,
                 mask_ignored: bool = True, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'psd': from_zero('DSDLoss', 'psd', psd), 'csd': from_zero('DSDLoss', 'csd', csd)}
        self.p = number('DSDLoss', 'p', p, 1)
        self.tau = positive('DSDLoss', 'tau', tau)
        self.mask_ignored = boolean('DSDLoss', 'mask_ignored', mask_ignored)

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(student) < 2:
            raise ValueError('DSDLoss: one level has no other to differ from; tap features and, last, the logits')
        if student[-1].shape[1] != teacher[-1].shape[1]:
            raise ValueError(f'DSDLoss: the last level must be logits of the same classes, but the student has '
                             f'{tuple(student[-1].shape)} and the teacher {tuple(teacher[-1].shape)}')

    def terms(self, student: Features, teacher: Features, batch: KDBatch,
              masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        """The two terms without their weights: psd and csd."""
        size = smallest(student)
        sides = [attention_residuals(side, self.p, masks) for side in (student, teacher)]
        cells = student[0].new_tensor(float(max(student[0].shape[0] * size[0] * size[1], 1)))
        last = masks[-1]
        if last is not None:
            cells = (F.adaptive_avg_pool2d(last.to(cells.dtype), size) > 0).sum().clamp(min=1).to(cells.dtype)
        psd = sum(((s - t).square().sum() for s, t in zip(*sides)), cells.new_zeros(())) / (cells * len(sides[0]))
        mask = labelled(student[-1], batch, masks[-1]) if self.mask_ignored else masks[-1]
        gap, filled = category_similarity(student[-1], self.tau, mask=mask)
        gap = (gap - category_similarity(teacher[-1], self.tau, mask=mask)[0]).square()
        images = gap.new_tensor(float(max(gap.shape[0], 1))) if filled is None else filled.sum().clamp(min=1)
        return {'psd': psd, 'csd': gap.sum() / (images * gap.shape[1]**2)}

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        return self.terms(student, teacher, batch, masks)
