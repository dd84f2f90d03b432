"""Class scores with a weight of their own for the background, and boxes with the teacher as a bound."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_classes
from kd_mm.ops.checks import boolean, number, one_of, positive
from kd_mm.ops.divergences import standardise_logits
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import row_targets

DIVISORS = ('sampled', 'positive')


def weighted_cross_entropy(student: Tensor, teacher: Tensor, background_weight: float = 1.5,
                           tau: float = 1.0, standardise: bool = False) -> Tensor:
    """``-sum_c w_c p_t,c log p_s,c`` of each row, ``p = softmax(z / tau)``; ``w`` is 1 but for the last class: (M,).

    Args:
        student: class logits (M, K + 1), the background last.
        teacher: logits of the same rows.
        background_weight: ``w`` of the background.
        tau: temperature, above 0.
        standardise: both sides go through :func:`kd_mm.ops.divergences.standardise_logits` first.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> round(weighted_cross_entropy(z, z, 2.0).item(), 4)  # (1/2 + 2 * 1/2) log 2
        1.0397
    """
    if standardise:
        student, teacher = standardise_logits(student), standardise_logits(teacher)
    terms = -F.softmax(teacher / tau, dim=1) * F.log_softmax(student / tau, dim=1)
    return terms.sum(dim=1) + (background_weight - 1) * terms[:, -1]


def bounded_squares(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """``||s - y||^2`` of each row, and 0 where the student is better than the teacher by more than the margin: (M,).

    Nothing is learned from the teacher's box itself, which may be far off: it only says how good is good enough.

    Args:
        student: box deltas (M, 4).
        teacher: of the same rows.
        target: encoded ground truth of the rows.
        margin: ``m`` of ``||s - y||^2 + m > ||t - y||^2``.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1., 0., 0., 0.], [1., 0., 0., 0.]])
        >>> bounded_squares(rows, torch.tensor([[0.5, 0., 0., 0.], [3., 0., 0., 0.]]), torch.zeros(2, 4))
        tensor([1., 0.])
    """
    ours, theirs = (side.sub(target).square().sum(dim=1) for side in (student, teacher))
    return ours * (ours.detach() + margin > theirs)


@MODELS.register_module()
class ChenClassLoss(KDLoss):
    """Weighted cross-entropy (Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation, NIPS
    2017).

    ``tau^2 * mean over rows of -sum_c w_c p_t,c log p_s,c`` with a weight of its own for the background, since most
    rows are background and a mistake about it is of another kind than one between two classes.

    In a config ``at='@roi_logits'`` for the second stage and ``'@rpn_logits'`` for the first: both models' logits for
    the proposals (anchors) that the host has sampled in this step.

    Re-implementation from the description.  There the class loss is ``mu CE(p_s, y) + (1 - mu) L_soft`` with ``mu =
    1/2``.  The student's own cross-entropy stays as in its config; ``loss_weight=1`` keeps the ratio of the two.

    With a background weight other than 1 the minimum is not at the teacher's scores but at ``w_c p_t,c`` made to sum to
    1: the student is drawn towards the background.  The value at equal scores is the weighted entropy, not 0.

    Args:
        background_weight: ``w`` of the background, above 0. Default 1.5 [recalled].
        tau: temperature, above 0. Default 1 (the paper: none is best for detection).
        standardise: mean and deviation of a row's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1: ``(1 - mu) / mu``.

    Inputs are rows (M, K + 1), the background last.

    Returns:
        Reduction: per level; mean over rows
        Summed over levels.

    Raises:
        ValueError: an option is out of range, there is one logit a row only, or the logits are maps.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='ChenClassLoss', background_weight=1.0))
        >>> round(loss(torch.zeros(8, 4), torch.zeros(8, 4)).item(), 4)  # log 4
        1.3863
    """

    takes = (2, )
    logits = True
    rows_only = True

    def __init__(self, background_weight: float = 1.5, tau: float = 1.0, standardise: bool = False,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.background_weight = positive('ChenClassLoss', 'background_weight', background_weight)
        self.tau = positive('ChenClassLoss', 'tau', tau)
        self.standardise = boolean('ChenClassLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_classes('ChenClassLoss', student, self.standardise, 'The background needs a logit of its own')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        rows = weighted_cross_entropy(student, teacher, self.background_weight, self.tau, self.standardise)
        return self.tau**2 * rows.sum() / max(len(rows), 1)


@MODELS.register_module()
class ChenBoxLoss(KDLoss):
    """Teacher bounded regression (Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation,
    NIPS 2017).

    ``1 / rows * sum over positive rows of ||s - y||^2``, a row counting only while ``||s - y||^2 + m > ||t - y||^2``,
    see :func:`bounded_squares`.  ``s`` and ``t`` are the encoded boxes of student and teacher, ``y`` the ground truth
    as the host has encoded it.

    In a config ``at='@roi_boxes'`` for the second stage and ``'@rpn_boxes'`` for the first.

    Re-implementation from the description.

    Args:
        margin: ``m``. Default 0: the bound is the teacher itself (no published value is known to us). With a
            negative margin, a student only slightly worse than the teacher is not penalised.
        divisor: 'sampled' (default: all sampled rows, as the host's own box loss) or 'positive'.
        loss_weight: see :class:`KDLoss`. Default 0.5 (``nu`` of the paper) [recalled].

    Inputs are the deltas (P, 4) of positive rows; ``KDBatch.row_targets`` holds their regression targets,
    ``row_totals`` the number of sampled rows.

    Returns:
        Reduction: per level; sum over positives; divided by rows
        By default; summed over levels.

    Raises:
        ValueError: ``divisor`` is not among its choices, or there are no targets.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(row_targets=torch.zeros(1, 4), row_totals=[4])
        >>> build(dict(type='ChenBoxLoss', loss_weight=1.0))(torch.ones(1, 4), torch.zeros(1, 4), batch).item()
        1.0
    """

    takes = (2, )
    rows_only = True

    def __init__(self, margin: float = 0.0, divisor: str = 'sampled', loss_weight: Any = 0.5):
        super().__init__(loss_weight)
        self.margin = number('ChenBoxLoss', 'margin', margin)
        self.divisor = one_of('ChenBoxLoss', 'divisor', divisor, DIVISORS)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        targets, total = row_targets(batch, student, level)
        rows = bounded_squares(student, teacher, targets, self.margin)
        count = total if self.divisor == 'sampled' else len(rows)
        return rows.sum() / max(count, 1)
