"""Distillation from a stronger teacher: relations of predictions."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_channels
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, from_zero, one_of, positive, whole
from kd_mm.ops.divergences import standardise_logits
from kd_mm.ops.functional import apply_weights, nonzero, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

ACTIVATIONS = ('softmax', 'sigmoid')


def pearson(first: Tensor, second: Tensor, dims: Sequence[int], weights: Optional[Tensor] = None,
            eps: float = 1e-8) -> Tensor:
    """Pearson correlation over ``dims``: ``sum(w a b) / (sqrt(sum w a^2) sqrt(sum w b^2) + eps)`` of centred a and b.

    Args:
        first: any shape.
        second: the same shape.
        dims: what is correlated.
        weights: not negative, broadcastable, or None for 1.
        eps: added to the product of the norms; the correlation of a constant is 0.

    Returns:
        The shape of ``first`` without ``dims``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1., 2., 4.]])
        >>> round(pearson(x, 3 * x + 1, [1]).item(), 4)
        1.0
    """
    dims = list(dims)
    if weights is None:
        a = first - first.mean(dim=dims, keepdim=True)
        b = second - second.mean(dim=dims, keepdim=True)
        wa, wb = a, b
    else:
        total = nonzero(weights.expand_as(first).sum(dim=dims, keepdim=True))
        a = first - (first * weights).sum(dim=dims, keepdim=True) / total
        b = second - (second * weights).sum(dim=dims, keepdim=True) / total
        wa, wb = a * weights, b * weights
    norms = safe_sqrt((wa * a).sum(dim=dims)) * safe_sqrt((wb * b).sum(dim=dims))
    return (wa * b).sum(dim=dims) / (norms + eps)


def dist_terms(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None, eps: float = 1e-8,
               scores: Optional[Callable[[Tensor], Tensor]] = None) -> Tuple[Tensor, Tensor]:
    """The two relations of DIST between class scores, in blocks of cells.

    Args:
        student: scores (M, K) or (N, K, H, W).
        teacher: scores of the same shape.
        mask: weights (N, 1, H, W) of the cells, or None.
        eps: see :func:`pearson`.
        scores: what makes scores of a block (N, K, H, W), if the two are given as logits. The scores never exist whole.

    Returns:
        inter, ``1 -`` the mean over cells of the correlation across classes; intra, ``1 -`` the mean over classes of
        the correlation across all cells of the batch. Both 0 where nothing is weighted.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
        >>> [abs(term.item()) < 1e-5 for term in dist_terms(p, p)]
        [True, True]
    """
    if student.dim() == 2:
        student, teacher = student[:, :, None, None], teacher[:, :, None, None]
    cells, dims = student[:, :1], [0, 2, 3]
    total = cells.new_tensor(float(cells.numel())) if mask is None else mask.to(cells.dtype).sum()

    def scored(block: Tensor) -> Tensor:
        return block if scores is None else scores(block)

    def sums(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor, ...]:
        return tuple(apply_weights(scored(tensor), weights).sum(dim=dims, keepdim=True) for tensor in (one, other))

    # A correlation does not see what is subtracted: with the means as constants the squares keep their digits.
    centres = [part / nonzero(total) for part in sum_in_blocks(sums, 'cells', student.detach(), teacher, mask)]

    def relations(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor, ...]:
        one, other = scored(one), scored(other)
        rows = 1 - pearson(one, other, [1], None, eps)[:, None]
        a, b = one - centres[0], other - centres[1]
        weighted_a, weighted_b = apply_weights(a, weights), apply_weights(b, weights)
        return (apply_weights(rows, weights).sum(), weighted_a.sum(dim=dims), weighted_b.sum(dim=dims),
                (weighted_a * a).sum(dim=dims), (weighted_b * b).sum(dim=dims), (weighted_a * b).sum(dim=dims))

    inter, a, b, aa, bb, ab = sum_in_blocks(relations, 'cells', student, teacher, mask)
    divisor = nonzero(total)
    norms = safe_sqrt(aa - a.square() / divisor) * safe_sqrt(bb - b.square() / divisor)
    columns = 1 - (ab - a * b / divisor) / (norms + eps)
    return inter / divisor, columns.mean() * (total > 0).to(columns.dtype)


@MODELS.register_module()
class DISTLoss(KDLoss):
    """DIST (Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022).

    With class scores p (softmax or sigmoid of logits / tau), Pearson's r, and cells (pixels, RoIs) as rows::

        tau^2 * (beta * (1 - mean over cells of r across the classes)
                 + gamma * (1 - mean over classes of r across all cells of the batch))

    A student only has to agree up to scale and offset of the scores, which a strong teacher's are far from.

    As published: one code for rows and, after all pixels of the batch have become rows, for segmentation; the sigmoid
    variant for RetinaNet takes the A*K channels of a cell as one row, unrelated anchors together
    (``anchors=1``).  mmrazor's ``DISTLoss`` is for rows only: a map given to it is correlated over the images at each
    pixel, which is not this loss.

    Args:
        beta: weight of the relation across classes. Default 1 [C].
        gamma: weight of the relation across cells. Default 1 [C].
        tau: temperature, above 0. Default 1 [C: detection, segmentation and ImageNet].
        activation: 'softmax' (default; segmentation, RoI heads) or 'sigmoid' (dense heads) [C].
        anchors: anchors of a cell, whose classes then are rows of their own; only for maps of channels (anchor, class),
            as mmdet's anchor heads order them. Default 1 [C].
        eps: added to the product of the two norms. Default 1e-8 [C]. It keeps classes that are nowhere in the batch
            quiet; equal inputs give about 1e-7 instead of 0.
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels (no reference does).
            Default True.
        standardise: mean and deviation of a cell's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False, and only with 'softmax'.
        loss_weight: see :class:`KDLoss`. Default 1 [C: detection and segmentation; 0.4 on an auxiliary head, 2 for
            ImageNet].

    Inputs are logits (N, K, H, W) or (M, K).  A region weights the cells; RoI rows take none.

    Returns:
        Reduction: per level; mean over cells
        Reduction: per level; mean over classes
        Parts: inter, intra
        The two terms in turn, together 0 to 4 for the default weights; summed over levels.

    Raises:
        ValueError: an option has a bad value, the channels are no multiple of ``anchors``, one class only (with a
            sigmoid ``gamma`` still teaches), or a region for RoI rows.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='DISTLoss'))
        >>> z = torch.randn(2, 19, 8, 8)
        >>> bool(loss(z, z) < 1e-5)
        True
    """

    takes = (2, 4)
    logits = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0, activation: str = 'softmax',
                 anchors: int = 1, eps: float = 1e-8, mask_ignored: bool = True,
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'inter': from_zero('DISTLoss', 'beta', beta), 'intra': from_zero('DISTLoss', 'gamma', gamma)}
        self.eps = positive('DISTLoss', 'eps', eps)
        self.tau = positive('DISTLoss', 'tau', tau)
        self.activation = one_of('DISTLoss', 'activation', activation, ACTIVATIONS)
        self.competes = self.activation == 'softmax'
        self.anchors = whole('DISTLoss', 'anchors', anchors)
        self.mask_ignored = boolean('DISTLoss', 'mask_ignored', mask_ignored)
        self.standardise = boolean('DISTLoss', 'standardise', standardise)
        if self.standardise and self.activation != 'softmax':
            raise ValueError(f"DISTLoss: standardise=True and activation={self.activation!r}: independent scores have "
                             "no mean to take away. Use activation='softmax'")

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        for tensor in student:
            if self.anchors > 1 and (tensor.dim() != 4 or tensor.shape[1] % self.anchors):
                raise ValueError(f'DISTLoss: anchors={self.anchors}, but the logits are {tuple(tensor.shape)}')
        if self.activation == 'softmax' or not self.factors['intra']:
            # Across the classes the correlation of two numbers with two others is 1 or -1.
            needs_channels('DISTLoss', student, self.anchors * (2 if self.factors['intra'] and not self.standardise
                                                                else 3),
                           "it correlates scores that compete. Use activation='sigmoid' with gamma above 0, "
                           'SigmoidKDLoss or CWDLoss')

    def scores(self, logits: Tensor) -> Tensor:
        """Class scores of logits."""
        logits = (standardise_logits(logits) if self.standardise else logits) / self.tau
        return logits.softmax(dim=1) if self.activation == 'softmax' else logits.sigmoid()

    def split(self, logits: Tensor) -> Tensor:
        """Logits whose anchors have become images of their own."""
        if self.anchors == 1:
            return logits
        return logits.reshape(-1, logits.shape[1] // self.anchors, *logits.shape[2:])

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        if mask is not None:
            mask = mask.to(student.dtype).repeat_interleave(self.anchors, dim=0)
        inter, intra = dist_terms(self.split(student), self.split(teacher), mask, self.eps, self.scores)
        return {'inter': self.tau**2 * inter, 'intra': self.tau**2 * intra}
