"""Adaptive inter-class similarity distillation."""

from typing import Any, Dict, Optional

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_channels
from kd_mm.losses.kd import mean_divergence
from kd_mm.ops.checks import boolean, from_zero, one_of, positive
from kd_mm.ops.functional import channel_affinity, spatial_log_softmax, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

SIMILARITIES = ('kl', 'released')


def inter_class_divergence(logits: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """``KL(p_k || p_l)`` between the spatial distributions of every two classes, each row brought to length 1.

    Args:
        logits: (N, K, H, W).
        mask: (N, 1, H, W) or None; the distributions are over its cells.

    Returns:
        (N, K, K), zero for an image whose mask is empty.

    Example:
        >>> import torch
        >>> gaps = inter_class_divergence(torch.tensor([[0., 0.], [0., 1.]]).view(1, 2, 1, 2))
        >>> torch.allclose(gaps, torch.tensor([[[0., 1.], [1., 0.]]]), atol=1e-5)
        True
    """
    log_p, filled = spatial_log_softmax(logits, 1.0, mask)
    p = log_p.exp()
    # KL does not see a constant; near 0 the logarithms of nearly even distributions keep their digits.
    shifted = log_p - log_p.amax(dim=(1, 2), keepdim=True).detach()
    rows = (p * shifted).sum(dim=2, keepdim=True) - p @ shifted.transpose(1, 2)
    rows = unit_vectors(rows, dim=2)
    return rows if filled is None else rows * filled[:, :, None].to(rows.dtype)


def released_similarity(logits: Tensor) -> Tensor:
    """What the authors' released code computes instead of :func:`inter_class_divergence`: (K, K) for the batch.

    The softmax is over the rows H of each column alone, the first argument of the divergence is a probability and not
    its logarithm, the upper triangle fills the lower, and the images are summed: ``m_kl = sum p_l (log p_l - p_k) / N``
    for k <= l.

    Example:
        >>> import torch
        >>> released_similarity(torch.zeros(1, 1, 1, 1))
        tensor([[-1.]])
    """
    log_p = F.log_softmax(logits, dim=2)
    p = log_p.exp()
    count, classes = max(logits.shape[0], 1), logits.shape[1]
    own = (p * log_p).sum(dim=(0, 2, 3)) / count
    flat = p.transpose(0, 1).reshape(classes, -1)
    upper = (own[None, :] - flat @ flat.t() / count).triu()
    return unit_vectors(upper + upper.triu(1).t(), dim=1)


@MODELS.register_module()
class AICSDLoss(KDLoss):
    """Inter-class similarity (Mansurian et al., AICSD: Adaptive Inter-Class Similarity Distillation for Semantic
    Segmentation, arXiv 2308.04243).

    On the class logits, with ``p_k`` the distribution of class k over the cells::

        similarity * mean over images and pairs of (R_s - R_t)^2    R[k] = KL(p_k || p_l) for all l, of length 1
      + pixel * mean over pixels and classes of the KL of the softmax over the classes
      + channel * (1 / (N K)) * sum (G_s - G_t)^2                   G: as in :class:`ICKDLoss`

    A re-implementation from the description: the released code (``matrix='released'``, which also divides the first
    term by N and sums the images before) takes the softmax over the height alone and a KL of probabilities that are no
    logarithms, see :func:`released_similarity`.  Its training adds the first two terms only, and its change of weights
    over time is switched off; use a schedule for that.

    Args:
        similarity: weight of the first term, not negative. Default 100 [C].
        pixel: weight of the second. Default 20 [C].
        channel: weight of the third. Default 0 [C: computed, never added]; 1 where it is listed.
        tau: temperature of the second term, above 0; the others have none. Default 1 [C].
        matrix: 'kl' (default) or 'released'.
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels. Default True; 'released'
            never does in the first term.
        standardise: mean and deviation of a cell's logits in the second term are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: factor of the three terms, see :class:`KDLoss`. Default 1.

    With a region the distributions are over its cells and the pixels are weighted by it.

    Returns:
        Reduction: per level; mean over pairs
        Reduction: per level; mean over elements
        Reduction: per level; mean over channels
        Parts: similarity, pixel, channel
        The three terms in turn; summed over levels.

    Raises:
        ValueError: an option has a bad value, one class only (or two, where the first term is the only one, which is
            then 0), a region together with ``matrix='released'``, or RoI rows.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> z = torch.randn(2, 5, 8, 8)
        >>> abs(build(dict(type='AICSDLoss'))(z, z).item()) < 1e-5
        True
    """

    takes = (4, )
    logits = True
    competes = True

    def __init__(self, similarity: float = 100.0, pixel: float = 20.0, channel: float = 0.0, tau: float = 1.0,
                 matrix: str = 'kl', mask_ignored: bool = True, standardise: bool = False,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        given = {'similarity': similarity, 'pixel': pixel, 'channel': channel}
        self.factors = {name: from_zero('AICSDLoss', name, value) for name, value in given.items()}
        self.tau = positive('AICSDLoss', 'tau', tau)
        self.matrix = one_of('AICSDLoss', 'matrix', matrix, SIMILARITIES)
        self.mask_ignored = boolean('AICSDLoss', 'mask_ignored', mask_ignored)
        self.standardise = boolean('AICSDLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        # Rows of K numbers of length 1, 0 in their own column: of two classes each has one entry, which is 1.
        least = 2 if (self.factors['pixel'] and not self.standardise) or self.factors['channel'] else 3
        needs_channels('AICSDLoss', student, least,
                       'it compares classes with each other. Use SigmoidKDLoss or CWDLoss')

    def terms(self, student: Tensor, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Dict[str, Tensor]:
        """The three terms without their weights: similarity, pixel and channel."""
        if student.dim() != 4:
            raise ValueError(f'AICSDLoss needs maps (N, K, H, W), not {tuple(student.shape)}')
        if self.matrix == 'released':
            if mask is not None:
                raise ValueError("AICSDLoss: matrix='released' knows no region; use matrix='kl'")
            gap = (released_similarity(student) - released_similarity(teacher)).square()
            similarity = gap.mean() / max(student.shape[0], 1)
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        images: Any = max(student.shape[0], 1)
        if mask is not None:
            images = (mask > 0).flatten(1).any(dim=1).sum().clamp(min=1)
        if self.matrix == 'kl':
            gap = (inter_class_divergence(student, mask) - inter_class_divergence(teacher, mask)).square()
            similarity = gap.sum() / (images * student.shape[1]**2)
        pixel = self.tau**2 * mean_divergence(student, teacher, mask, self.tau, reduction='element_mean',
                                             standardise=self.standardise)
        channel = (channel_affinity(student, mask) - channel_affinity(teacher, mask)).square()
        return {'similarity': similarity, 'pixel': pixel, 'channel': channel.sum() / (images * student.shape[1])}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(student, teacher, batch, mask)
