"""Decoupled features: foreground and background weighted apart."""

from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_classes
from kd_mm.ops.checks import boolean, factors, from_zero, positive
from kd_mm.ops.divergences import softmax_divergence
from kd_mm.ops.functional import apply_weights
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, build
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import row_labels


def half_mean(gap: Tensor, mask: Tensor) -> Tensor:
    """``sum(m * gap) / max(1, 2 * C * sum(m))``, half the mean over the elements of a region.

    Example:
        >>> half_mean(torch.ones(1, 3, 2, 2), torch.ones(1, 1, 2, 2))
        tensor(0.5000)
    """
    return apply_weights(gap, mask).sum() / (2 * gap.shape[1] * mask.to(gap.dtype).sum()).clamp(min=1)


def decoupled_divergence(student: Tensor, teacher: Tensor, labels: Tensor, background: Optional[int] = None,
                         tau: float = 1.0, standardise: bool = False) -> Dict[str, Tensor]:
    """Divergence of class scores, averaged over foreground rows and over background rows.

    ``tau^2 * (1 / rows) * sum over rows of KL(softmax(z_t / tau) || softmax(z_s / tau))``, for each of the two groups;
    0 for an empty one.

    Args:
        student: class logits of RoIs, (M, K).
        teacher: logits of the same RoIs, (M, K).
        labels: class index of every row, (M,).
        background: index of the background; None for the last column. (The authors' code takes the highest label that
            occurs, which is a foreground class in a batch without background.)
        tau: temperature, above 0.
        standardise: both sides go through :func:`kd_mm.ops.divergences.standardise_logits` first.

    Returns:
        The terms ``'fg'`` and ``'bg'``, unweighted.

    Example:
        >>> z = torch.randn(4, 3)
        >>> terms = decoupled_divergence(z, z, torch.tensor([0, 1, 2, 2]))
        >>> abs(terms['fg'].item()) < 1e-5, abs(terms['bg'].item()) < 1e-5
        (True, True)
    """
    rows = tau**2 * softmax_divergence(student, teacher.detach(), tau, standardise=standardise).sum(dim=1)
    is_background = labels == (student.shape[1] - 1 if background is None else background)
    return {name: (rows * group).sum() / group.sum().clamp(min=1)
            for name, group in (('fg', ~is_background), ('bg', is_background))}


@MODELS.register_module()
class DeFeatLoss(KDLoss):
    """Decoupled features (Guo et al., Distilling Object Detectors via Decoupled Features, CVPR 2021), neck term.

    The mean over levels of ``fg * half_mean((F_s - F_t)^2, m) + bg * half_mean((F_s - F_t)^2, 1 - m)``, see
    :func:`half_mean`: background is a lesson of its own, with its own weight.  ``m`` is 1 in the boxes, each on
    one level by its size (:class:`kd_mm.regions.level_box.LevelBoxRegion`).

    As published with ``ConvAdapter(kernel_size=3, always=True)`` on the neck (no ReLU; the optional adapters on the
    backbone end with one).  The method's second term, on the class scores of RoIs, is
    :class:`DeFeatClassLoss`; the authors' released neck config leaves it off.

    Args:
        fg: weight of the foreground, from 0. Default 3 [C].
        bg: weight of the background, from 0. Default 12 [C].
        foreground: config of the region that is the foreground. Default ``dict(type='LevelBoxRegion')``; use
            ``dict(type='SegClassRegion', classes=[...])`` for segmentation, where 3 and 12 need not be right.
        loss_weight: see :class:`KDLoss`; one number for all levels. Default 1.

    A ``region`` weights both parts and enters both divisors.

    Returns:
        Reduction: all levels; mean over levels, elements
        Parts: fg, bg
        Half of the mean of each part.

    Raises:
        ValueError: a weight is negative, or ``foreground`` is not a region.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8., 8., 24., 24.]])])
        >>> build(dict(type='DeFeatLoss'))(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), batch).item()
        7.5
    """

    takes = (4, )
    joint = True

    def __init__(self, fg: float = 3.0, bg: float = 12.0, foreground: Any = None, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'fg': from_zero('DeFeatLoss', 'fg', fg), 'bg': from_zero('DeFeatLoss', 'bg', bg)}
        self.foreground = build(dict(type='LevelBoxRegion') if foreground is None else foreground, RegionMask,
                                'region')
        self.needs_boxes, self.needs_seg_map = self.foreground.needs_boxes, self.foreground.needs_seg_map

    def terms(self, student: Features, teacher: Features, batch: KDBatch,
              masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        """Means over the levels of the two parts, unweighted: fg and bg."""
        parts: Dict[str, list] = {'fg': [], 'bg': []}
        for s, t, mask, inside in zip(student, teacher, masks, self.foreground(teacher, batch)):
            gap = (s - t).square()
            parts['fg'].append(half_mean(gap, apply_weights(inside, mask)))
            parts['bg'].append(half_mean(gap, apply_weights(1 - inside, mask)))
        return {name: torch.stack(values).mean() for name, values in parts.items()}

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        return self.terms(student, teacher, batch, masks)


@MODELS.register_module()
class DeFeatClassLoss(KDLoss):
    """Decoupled class scores (Guo et al., Distilling Object Detectors via Decoupled Features, CVPR 2021), head term.

    ``tau^2 * (fg * mean over foreground rows of KL + bg * mean over background rows of KL)``, see
    :func:`decoupled_divergence`: the many background rows do not drown the few others.

    In a config ``at='@roi_logits'``: both heads on the same proposals, labelled as the host did in this step.  The
    authors' code takes the teacher's proposals (``proposals='teacher'``), for which the student's head runs once more;
    the default here is the student's own.

    Args:
        fg: weight of the foreground, from 0. Default 2 [C].
        bg: weight of the background, from 0. Default 2 [C].
        tau: temperature, above 0. Default 1 [C].
        standardise: mean and deviation of a row's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1.

    Inputs are rows (M, K + 1), the background last, with ``KDBatch.row_labels``.

    Returns:
        Reduction: per level; mean over rows
        Parts: fg, bg
        Over the rows of each part; summed over levels.

    Raises:
        ValueError: an option is out of range, there are no labels, one logit a row only, or the logits are maps.

    Example:
        >>> from kd_mm.registry import build
        >>> z = torch.randn(4, 3)
        >>> batch = KDBatch(row_labels=torch.tensor([0, 1, 2, 2]))
        >>> abs(build(dict(type='DeFeatClassLoss'))(z, z, batch).item()) < 1e-5
        True
    """

    takes = (2, )
    logits = True
    rows_only = True

    def __init__(self, fg: float = 2.0, bg: float = 2.0, tau: float = 1.0, standardise: bool = False,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = dict(zip(('fg', 'bg'), factors('DeFeatClassLoss', fg=fg, bg=bg)))
        self.tau = positive('DeFeatClassLoss', 'tau', tau)
        self.standardise = boolean('DeFeatClassLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_classes('DeFeatClassLoss', student, self.standardise, 'The background needs a logit of its own')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        labels = row_labels(batch, len(student), level).to(student.device)
        return decoupled_divergence(student, teacher, labels, tau=self.tau, standardise=self.standardise)
