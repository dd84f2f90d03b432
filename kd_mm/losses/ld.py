"""Localization distillation: the box distributions of GFL-like heads."""

from typing import Any, Dict, List

import torch
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.ops import distributed
from kd_mm.ops.boxes import centers, intersection
from kd_mm.ops.checks import boolean, factors, number, one_of, positive, whole
from kd_mm.ops.divergences import softmax_divergence
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView, Rows
from kd_mm.types.targets import batch_boxes

BINS = ('sum', 'mean')


def distribution_divergence(student: Tensor, teacher: Tensor, tau: float = 10.0, bins: str = 'sum',
                            standardise: bool = False) -> Tensor:
    """``tau^2 * KL`` between the distributions of box sides, one number a side.

    Args:
        student: (..., B) logits over the bins.
        teacher: (..., B).
        tau: temperature, above 0. Default 10 [C].
        bins: 'sum' over the bins, which is the KL divergence, or their 'mean', as published (B times smaller).
        standardise: both sides go through :func:`kd_mm.ops.divergences.standardise_logits` first.

    Returns:
        (...,).

    Example:
        >>> z = torch.randn(5, 4, 17)
        >>> distribution_divergence(z, z).abs().max().item() < 1e-4
        True
    """
    terms = softmax_divergence(student.flatten(0, -2), teacher.flatten(0, -2), tau, standardise=standardise)
    total = terms.sum(dim=1) if bins == 'sum' else terms.mean(dim=1)
    return tau**2 * total.view(student.shape[:-1])


def enough_bins(owner: str, bins: int, standardise: bool) -> None:
    """Raise a ValueError where the distributions over so few bins are the same for every student.

    Two standardised logits are always the same two numbers, up to their order.
    """
    if bins < 2:
        raise ValueError(f'{owner}: the box distribution over {bins} bin is always 1; reg_max must be above 0')
    if standardise and bins < 3:
        raise ValueError(f'{owner}: standardise=True leaves nothing but the order of {bins} bins; use '
                         'standardise=False, or reg_max above 1')


def valuable_region(anchors: Rows, boxes: Tensor, real: Tensor, valid: Tensor, gamma: float = 0.25,
                    topk: int = 9) -> Tensor:
    """Weights of the valuable localization region: anchors that are near an object without being its best ones.

    ``t`` of a box is ATSS's threshold: mean plus standard deviation of its IoU with the ``topk`` anchors a level whose
    centres are nearest.  An anchor belongs to the region if its DIoU with some box is in ``[gamma * t, t)``; its
    weight is its IoU with that box, the largest where there are several.

    Args:
        anchors: L tensors (P_l, 4), input pixels.
        boxes: (N, M, 4), filled up.
        real: (N, M), whether each is a box.
        valid: (N, P), false for anchors that do not count (off the image).
        gamma: lower end of the region, from 0 to 1. Default 0.25 [C, P].
        topk: candidates a level. Default 9 [C].

    Returns:
        (N, P), from 0 to 1; 0 outside the region.

    Example:
        >>> anchors = (torch.tensor([[0., 0., 8., 8.], [8., 0., 16., 8.], [4., 0., 12., 8.]]), )
        >>> box, yes = torch.tensor([[[0., 0., 9., 8.]]]), torch.tensor([[True]])
        >>> region = valuable_region(anchors, box, yes, torch.ones(1, 3, dtype=torch.bool))
        >>> (region > 0).tolist()
        [[False, False, True]]
    """
    every = torch.cat(list(anchors))
    overlap, union = intersection(every[None, :, None], boxes[:, None])  # (N, P, M)
    iou = overlap / union.clamp(min=1e-6)
    centre, target = centers(every)[None, :, None], centers(boxes)[:, None]
    distance = (centre - target).square().sum(dim=-1)
    low = torch.minimum(every[None, :, None, :2], boxes[:, None, :, :2])
    high = torch.maximum(every[None, :, None, 2:], boxes[:, None, :, 2:])
    diou = iou - distance / (high - low).square().sum(dim=-1).clamp(min=1e-6)

    far = distance.masked_fill(~valid[..., None], float('inf'))
    found, kept, start = [], [], 0
    for level in anchors:
        stop = start + len(level)
        near = far[:, start:stop].topk(min(topk, len(level)), dim=1, largest=False)
        found.append(iou[:, start:stop].gather(1, near.indices))
        kept.append(near.values.isfinite())
        start = stop
    chosen, counted = torch.cat(found, dim=1), torch.cat(kept, dim=1).to(iou.dtype)  # (N, candidates, M)
    number = counted.sum(dim=1)
    mean = (chosen * counted).sum(dim=1) / nonzero(number)
    spread = ((chosen - mean[:, None]).square() * counted).sum(dim=1) / nonzero((number - 1).clamp(min=0))
    threshold = (mean + spread.sqrt())[:, None]
    inside = (diou >= gamma * threshold) & (diou < threshold) & real[:, None] & valid[..., None]
    if not inside.shape[2]:
        return iou.new_zeros(iou.shape[:2])
    return (iou * inside).amax(dim=2)


@MODELS.register_module()
class LDLoss(HeadLoss):
    """Localization distillation (Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022).

    A GFL-like head predicts for each side of a box a distribution over B bins; the student learns the teacher's:

    ``loss_l = tau^2 / 4 * sum over priors, sides of w * KL(softmax(z_t / tau) || softmax(z_s / tau))``

    In the *main* region, the positives that the host has assigned, ``w`` is the student's highest class score (without
    gradient), as in the host's own box losses.  In the *valuable localization* region, priors near an object that are
    not its best ones (see :func:`valuable_region`), ``w`` is the IoU with the object.

    By default each region's sum is divided by the sum of its ``w`` over all levels (mean over the ranks, at least 1),
    as the host divides its box losses, and the KL is the sum over the bins.  As published (all [C]):

    ====================================  =========================================================================
    main region; mmdet's ``LDHead``       ``bins='mean', normalise=False, valuable_weight=0, loss_weight=0.25``
    both regions, the authors' code       ``bins='mean', normalise=False, valuable_weight=0.25, loss_weight=0.25``
    ====================================  =========================================================================

    The published loss is divided neither by the number of positives nor by the batch size, so it grows with both, and
    its mean over the bins makes it B times smaller than a KL.  The authors' best rows add a class term and feature
    imitation; use other losses for these.

    Args:
        tau: temperature, above 0. Default 10 [C].
        main_weight: factor of the main region, from 0. Default 1.
        valuable_weight: factor of the valuable region, from 0 (off). Default 0.25 [C: divided by 16 where the main
            region is divided by 4].
        gamma: lower end of the valuable region, from 0 to 1. Default 0.25 [C, P].
        topk: candidates a level for its threshold. Default 9 [C].
        bins: 'sum' (default) or 'mean', see :func:`distribution_divergence`.
        normalise: divide by the sum of the weights. Default True.
        standardise: mean and deviation of a side's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 0.75 [ours: about the published size, at 50 summed weights a GPU].

    Inputs are two :class:`kd_mm.types.dense.DenseView` with distributions; the student's with the host's assignment.
    In a config ``at='bbox_head'``: GFL and heads derived from it, MMYOLO's heads with DFL; and heads of MMRotate whose
    angle is a distribution over bins (CSL): then it is the angle's, one "side", and ``valuable_weight`` is 0.

    Returns:
        Reduction: per level; sum over sides; divided by weights
        Parts: main, valuable
        By default, box sides in each region by the weights of all levels; summed over levels.

    Raises:
        ValueError: an option is not among its choices, a head has no distributions or one bin, or their bins differ.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.dense import Assignment, DenseView
        >>> loss = build(dict(type='LDLoss', valuable_weight=0))
        >>> host = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], background=3)
        >>> s, t = (DenseView([torch.zeros(1, 2, 3)], distributions=[torch.randn(1, 2, 4, 17)], assignment=host)
        ...         for _ in range(2))
        >>> bool(loss(s, t) > 0), bool(loss(t, t) < 1e-4)
        (True, True)
    """

    logits = False

    def __init__(self, tau: float = 10.0, main_weight: float = 1.0, valuable_weight: float = 0.25,
                 gamma: float = 0.25, topk: int = 9, bins: str = 'sum', normalise: bool = True,
                 standardise: bool = False, loss_weight: Any = 0.75):
        super().__init__(loss_weight)
        self.tau = positive('LDLoss', 'tau', tau)
        self.factors = dict(zip(('main', 'valuable'), factors(
            'LDLoss', main_weight=main_weight, valuable_weight=valuable_weight)))
        self.gamma, self.topk = number('LDLoss', 'gamma', gamma, 0, 1), whole('LDLoss', 'topk', topk)
        self.bins = one_of('LDLoss', 'bins', bins, BINS)
        self.normalise = boolean('LDLoss', 'normalise', normalise)
        self.standardise = boolean('LDLoss', 'standardise', standardise)
        self.needs_boxes = self.factors['valuable'] > 0

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        for view in (student, teacher):
            if view.distributions is None:
                raise ValueError(f'LDLoss: {view.name} predicts no box distributions; it needs a head such as GFL\'s')
        for level, (s, t) in enumerate(zip(student.distributions, teacher.distributions)):
            if s.shape != t.shape:
                raise ValueError(f'LDLoss, level {level}: box distributions {tuple(s.shape)} and {tuple(t.shape)} '
                                 'differ; both heads need the same reg_max')
            enough_bins('LDLoss', s.shape[3], self.standardise)
        self.same_bins(student, teacher, sides=False)

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        assert student.assignment is not None
        result = {}
        if self.factors['main']:
            weights = tuple(logits.detach().sigmoid().amax(dim=-1) * student.assignment.positive(level)
                            for level, logits in enumerate(student.logits))
            result['main'] = self._region(student, teacher, weights)
        if self.factors['valuable']:
            result['valuable'] = self._region(student, teacher, self._valuable(student, batch))
        return result

    def _region(self, student: DenseView, teacher: DenseView, weights: Rows) -> List[Tensor]:
        """The loss of a region without its factor, one scalar a level, from the weights (N, P) of its priors."""
        assert student.distributions is not None and teacher.distributions is not None
        divisor = student.distributions[0].shape[2] * self._divisor(weights)  # 4 sides, or one angle
        result = []
        for own, theirs, weight in zip(student.distributions, teacher.distributions, weights):
            inside = weight > 0
            sides = distribution_divergence(own[inside], theirs[inside], self.tau, self.bins, self.standardise)
            # A level without rows must stay connected.
            result.append((sides * weight[inside][:, None].to(sides.dtype)).sum() / divisor + own.sum() * 0)
        return result

    def _divisor(self, weights: Rows) -> Any:
        if not self.normalise:
            return 1.0
        return distributed.mean(torch.stack([weight.sum() for weight in weights]).sum()).clamp(min=1)

    def _valuable(self, student: DenseView, batch: KDBatch) -> Rows:
        """Weights (N, P) of the valuable region by level."""
        assert student.assignment is not None
        if student.priors is None or any(level.shape[-1] != 4 for level in student.priors):
            raise ValueError(f'LDLoss: {student.name} has no anchors, from which the valuable region is made. Use '
                             'valuable_weight=0')
        boxes, real, _ = batch_boxes(batch, 'input', student.logits[0])
        valid = torch.cat([level > 0 for level in student.assignment.weights], dim=1)
        weights = valuable_region(student.priors, boxes, real, valid, self.gamma, self.topk)
        return weights.split([len(level) for level in student.priors], dim=1)


