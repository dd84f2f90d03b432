"""Decoupled knowledge distillation of class logits."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_channels
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, from_zero, one_of, positive
from kd_mm.ops.divergences import standardise_logits
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import row_labels, seg_map

TARGETS = ('labels', 'teacher_argmax')


def decoupled_terms(student: Tensor, teacher: Tensor, target: Tensor, tau: float = 1.0,
                    standardise: bool = False) -> Tuple[Tensor, Tensor]:
    """The two parts of a softmax divergence, one number for each row or pixel.

    TCKD is ``KL(b_t || b_s)`` of the two outcomes "target class or not", NCKD is ``KL`` of the softmax over the other
    classes.  ``TCKD + (1 - p_t(target)) * NCKD`` is the whole divergence.

    Args:
        student: logits (M, K) or (N, K, H, W), K at least 2.
        teacher: logits of the same shape.
        target: class indices in 0..K-1, (M,) or (N, H, W).
        tau: temperature, above 0.
        standardise: both sides go through :func:`kd_mm.ops.divergences.standardise_logits` first.

    Returns:
        TCKD and NCKD, each of the shape of ``target``, not multiplied by tau squared.

    Example:
        >>> z = torch.tensor([[0., 1., 2.]])
        >>> [abs(term.item()) < 1e-5 for term in decoupled_terms(z, z, torch.tensor([1]))]
        [True, True]
    """
    index = target[:, None]
    hidden = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index, True)
    sides = []
    if standardise:
        student, teacher = standardise_logits(student), standardise_logits(teacher)
    for logits in (student / tau, teacher / tau):
        whole = logits.logsumexp(dim=1)
        # A finite stand-in for -inf, whose differences are no NaN.
        others = logits.masked_fill(hidden, -1e30)
        sides.append((logits.gather(1, index)[:, 0] - whole, others.logsumexp(dim=1) - whole,
                      F.log_softmax(others, dim=1)))
    (hit_s, miss_s, rest_s), (hit_t, miss_t, rest_t) = sides
    tckd = hit_t.exp() * (hit_t - hit_s) + miss_t.exp() * (miss_t - miss_s)
    return tckd, (rest_t.exp() * (rest_t - rest_s)).sum(dim=1)


@MODELS.register_module()
class DKDLoss(KDLoss):
    """Decoupled distillation (Zhao et al., Decoupled Knowledge Distillation, CVPR 2022).

    ``tau^2 * mean over rows or pixels of (alpha * TCKD + beta * NCKD)``: how sure the teacher is of the target class,
    and how it ranks the other classes, see :func:`decoupled_terms`.  In a plain divergence NCKD has the factor
    ``1 - p_t(target)``, so that it vanishes just where the teacher is sure.

    As published: detectron2's Faster R-CNN on RoI rows, mmrazor and mdistiller with the same formula.  mmrazor's
    ``reduction='mean'`` and ``'none'`` both run as a sum (a deprecated argument wins) and are not offered.  For pixels
    nothing was published; the weights are those of RoIs.

    The target class comes from

    - maps (N, K, H, W) with ``target='labels'``: the segmentation map at the size of the logits; pixels without one are
      left out always;
    - rows (M, K) with ``target='labels'``: ``KDBatch.row_labels``; in a config ``at='@roi_logits'`` gives them:
      what the host has assigned to the proposals of the step;
    - ``target='teacher_argmax'``: the teacher's best class, for either shape and without labels. TCKD then has no truth
      in it: it only says how sure to be of what the teacher believes.

    Args:
        alpha: weight of TCKD, not negative. Default 1 [C].
        beta: weight of NCKD, not negative. Default 0.25 [C: detection]; 8 with tau=4 in classification [C].
        tau: temperature, above 0. Default 1 [C: detection].
        target: 'labels' (default [C]) or 'teacher_argmax'.
        mask_ignored: with 'teacher_argmax', leave out the pixels whose label is ignored, where the data has labels.
            Default True.
        standardise: mean and deviation of a cell's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False; True with tau=2, alpha=9 and
            beta=72 [C: logit-standardization-KD, classification].
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    A region weights the pixels; RoI rows take none.

    Returns:
        Reduction: per level; mean over cells
        Parts: tckd, nckd
        Over valid pixels, or rows; summed over levels.

    Raises:
        ValueError: an option has a bad value, there are less than two classes, or there are no labels.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='DKDLoss'))
        >>> batch = KDBatch(seg_map=torch.randint(0, 5, (2, 32, 32)))
        >>> z = torch.randn(2, 5, 8, 8)
        >>> abs(loss(z, z, batch).item()) < 1e-5
        True
    """

    takes = (2, 4)
    logits = True
    competes = True

    def __init__(self, alpha: float = 1.0, beta: float = 0.25, tau: float = 1.0, target: str = 'labels',
                 mask_ignored: bool = True, standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'tckd': from_zero('DKDLoss', 'alpha', alpha), 'nckd': from_zero('DKDLoss', 'beta', beta)}
        self.tau = positive('DKDLoss', 'tau', tau)
        self.target = one_of('DKDLoss', 'target', target, TARGETS)
        self.mask_ignored = boolean('DKDLoss', 'mask_ignored', mask_ignored)
        self.standardise = boolean('DKDLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        # With two classes there is one that is not the target: nothing to rank. Two standardised logits never change.
        needs_channels('DKDLoss', student, 2 if self.factors['tckd'] and not self.standardise else 3,
                       'there are no other classes to rank. Use SigmoidKDLoss')

    def targets(self, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor],
                level: int = 0) -> Tuple[Tensor, Tensor]:
        """Class indices (M,) or (N, H, W), and the weights of the same shape: 0 where there is no target."""
        if self.target == 'teacher_argmax':
            target = teacher.argmax(dim=1)
            if self.mask_ignored:
                mask = labelled(teacher, batch, mask)
            known = torch.ones_like(target, dtype=torch.bool)
        else:
            if teacher.dim() == 4:
                target = seg_map(batch, (teacher.shape[2], teacher.shape[3])).to(teacher.device).long()
                known = target != batch.targets.ignore_index
            else:
                target = row_labels(batch, teacher.shape[0], level).to(teacher.device).long()
                known = torch.ones_like(target, dtype=torch.bool)
            known = known & (target >= 0) & (target < teacher.shape[1])
            target = target.where(known, torch.zeros_like(target))
        weights = known.to(teacher.dtype)
        return target, weights if mask is None else weights * mask[:, 0].to(teacher.dtype)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        target, weights = self.targets(teacher, batch, mask, level)

        def sums(one: Tensor, other: Tensor, index: Tensor, shares: Tensor) -> Tuple[Tensor, ...]:
            return tuple((term * shares[:, 0]).sum() for term in decoupled_terms(
                one, other, index[:, 0], self.tau, self.standardise))

        found = sum_in_blocks(sums, 'cells', student, teacher, target[:, None], weights[:, None])
        return {name: self.tau**2 * value / nonzero(weights.sum()) for name, value in zip(('tckd', 'nckd'), found)}
