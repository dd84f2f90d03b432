"""Elastic response distillation: a detector that learns new classes keeps the responses of the old one."""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.ld import distribution_divergence, enough_bins
from kd_mm.ops.boxes import around, centers
from kd_mm.ops.checks import boolean, factors, from_zero, number, one_of, positive
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView

DECODES = ('boxes', 'published')
REDUCTIONS = ('mean', 'sum')
BINS = ('sum', 'mean')


def elastic_selection(values: Tensor, factor: float = 2.0) -> Tensor:
    """Which values of an image are above ``mean + factor * std`` (unbiased, strict), bool; none of a single one.

    Args:
        values: (P,).
        factor: of the deviation.

    Example:
        >>> elastic_selection(torch.tensor([0., 0., 0., 0., 0., 0., 0., 1.])).nonzero().tolist()
        [[7]]
    """
    if len(values) < 2:  # no deviation, of which torch would warn
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean() + factor * values.std()


def suppressed(boxes: Tensor, scores: Tensor, classes: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that class-wise NMS keeps, best first; in float32, as mmcv's operator wants it.

    Args:
        boxes: (M, 4).
        scores: (M,).
        classes: (M,).
        iou: overlap from which the worse of two is dropped.
    """
    from mmcv.ops import batched_nms
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    # An overlap is all that counts; beyond this the areas of float32 overflow.
    bounded = boxes.detach().float().nan_to_num().clamp(-1e6, 1e6).contiguous()
    return batched_nms(bounded, scores.detach().float().contiguous(), classes, dict(type='nms', iou_threshold=iou))[1]


@MODELS.register_module()
class ERDLoss(HeadLoss):
    """ERD (Feng et al., Overcoming Catastrophic Forgetting in Incremental Object Detection via Elastic Response
    Distillation, CVPR 2022).

    The teacher is the detector before it grew: it knows the first K classes of the student.  In each image, over the
    priors of all levels together:

    - classes: where the teacher's best score is above ``mean + 2 std`` of its best scores, the mean over these priors
      and the K classes of ``(z_s - z_t)^2``, on logits;
    - boxes: where the teacher's largest box logit (over sides and bins) is above ``mean + 2 std`` of those, class-wise
      NMS of its boxes with overlap 0.005, and on the priors that are left ``sum over priors, sides of
      w * tau^2 * KL(p_t || p_s) / 4``, ``w`` the student's best score among the K classes, without gradient.

    ``loss = class_weight * classes + box_weight * boxes``, averaged over the images.

    Where the published code goes wrong and what is done here: it decodes the boxes for the NMS without the stride, so
    that nearly all of them are a few pixels large and survive; here the host decodes
    (``decode='published'`` for theirs).  Without any prior above the threshold its class term is NaN; here 0.  It sums
    over the images, so that the weight depends on the batch size (``reduction='sum'``).  The KL is the mean over the
    bins (``bins='mean'``) and not divided by the number of boxes, as published.

    Args:
        class_weight: factor of the classes, from 0. Default 1 [C].
        box_weight: factor of the boxes, from 0. Default 0.25 [C]. 0 for heads without box distributions.
        tau: temperature of the box distributions, above 0. Default 10 [C].
        std_factor: deviations above the mean, from 0. Default 2 [C].
        iou: overlap of the NMS, from 0 to 1. Default 0.005 [C].
        bins: 'mean' over the bins (default [C]) or their 'sum', which is the KL divergence.
        decode: 'boxes' of the head (default) or 'published', see above.
        reduction: over the images: 'mean' (default) or 'sum' [C].
        standardise: mean and deviation of a side's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    In a config ``at='bbox_head'``: heads of the GFL family with the same strides and bins; with ``box_weight=0`` any
    dense head with sigmoid classes, the same anchors in both models.  The student's own classes must begin with the
    teacher's, in the same order.  Label the new classes alone in the student's data; its own loss then learns these.

    Returns:
        Reduction: all levels; mean over images, priors, classes
        Reduction: all levels; sum over sides; divided by images
        Parts: class, box
        Classes, then boxes.

    Raises:
        ValueError: an option is out of range, or the heads do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> old = DenseView([torch.randn(1, 50, 3)], torch.rand(1, 1, 50, 4), [torch.randn(1, 50, 4, 9)])
        >>> new = DenseView([torch.randn(1, 50, 5)], torch.rand(1, 1, 50, 4), [torch.randn(1, 50, 4, 9)])
        >>> bool(build(dict(type='ERDLoss', box_weight=0))(new, old) > 0)
        True
    """

    joint = True
    grows = True
    needs_assignment = False

    def __init__(self, class_weight: float = 1.0, box_weight: float = 0.25, tau: float = 10.0,
                 std_factor: float = 2.0, iou: float = 0.005, bins: str = 'mean', decode: str = 'boxes',
                 reduction: str = 'mean', standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = dict(zip(('class', 'box'), factors('ERDLoss', class_weight=class_weight,
                                                          box_weight=box_weight)))
        self.tau = positive('ERDLoss', 'tau', tau)
        self.std_factor = from_zero('ERDLoss', 'std_factor', std_factor)
        self.iou = number('ERDLoss', 'iou', iou, 0, 1)
        self.bins = one_of('ERDLoss', 'bins', bins, BINS)
        self.decode = one_of('ERDLoss', 'decode', decode, DECODES)
        self.reduction = one_of('ERDLoss', 'reduction', reduction, REDUCTIONS)
        self.standardise = boolean('ERDLoss', 'standardise', standardise)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        self.sigmoid_only(teacher)
        self.sigmoid_only(student)
        if not self.factors['box']:
            return
        for view in (student, teacher):
            if view.distributions is None:
                raise ValueError(f'ERDLoss: {view.name} predicts no box distributions, as GFL and its relatives do. '
                                 'Use box_weight=0')
        for level, (own, theirs) in enumerate(zip(student.distributions, teacher.distributions)):
            if own.shape != theirs.shape:
                raise ValueError(f'ERDLoss, level {level}: box distributions {tuple(own.shape)} and '
                                 f'{tuple(theirs.shape)} differ; both heads need the same reg_max')
            enough_bins('ERDLoss', own.shape[3], self.standardise)
        self.same_bins(student, teacher)
        if self.decode == 'boxes':
            teacher.boxes  # noqa: B018  (raises where they are not known)
        elif teacher.priors is None:
            raise ValueError(f"ERDLoss: decode='published' needs the priors of {teacher.name}, which are not known. "
                             "Use decode='boxes'")

    def selections(self, teacher: DenseView) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """For each image the indices of its chosen priors (levels one after the other): of the classes, of the boxes
        before the NMS, and which of the latter the NMS keeps; the last two are empty without a box term."""
        logits = torch.cat(list(teacher.logits), dim=1)
        best, kind = logits.sigmoid().max(dim=2)
        chosen = [elastic_selection(values, self.std_factor).nonzero()[:, 0] for values in best]
        if not self.factors['box'] or teacher.distributions is None:
            return chosen, [], []
        sides = torch.cat(list(teacher.distributions), dim=1)
        sure = [elastic_selection(values, self.std_factor).nonzero()[:, 0] for values in sides.flatten(2).amax(dim=2)]
        if self.decode == 'boxes':
            boxes = torch.cat(list(teacher.boxes), dim=1)
        else:
            steps = torch.arange(sides.shape[3], dtype=sides.dtype, device=sides.device)
            points = torch.cat([centers(level) for level in teacher.priors or ()]).to(sides)
            boxes = around(points.expand(len(sides), *points.shape), sides.softmax(dim=3) @ steps)
        kept = [suppressed(boxes[image, index], best[image, index], kind[image, index], self.iou)
                for image, index in enumerate(sure)]
        return chosen, sure, kept

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        old = teacher.logits[0].shape[2]
        own, theirs = (torch.cat([level[..., :old] for level in view.logits], dim=1) for view in (student, teacher))
        divisor = len(own) if self.reduction == 'mean' else 1
        chosen, sure, kept = self.selections(teacher)
        result: Dict[str, List[Tensor]] = {}
        if self.factors['class']:
            each = [(own[image, index] - theirs[image, index]).square().sum() / max(len(index) * old, 1)
                    for image, index in enumerate(chosen)]
            result['class'] = [torch.stack(each).sum() / divisor]
        if self.factors['box'] and student.distributions is not None and teacher.distributions is not None:
            sides = [torch.cat(list(view.distributions or ()), dim=1) for view in (student, teacher)]
            each = []
            for image, (index, best) in enumerate(zip(sure, kept)):
                left = index[best]
                weight = own[image, left].detach().sigmoid().amax(dim=1) if old else own.new_zeros(len(left))
                gaps = distribution_divergence(sides[0][image, left], sides[1][image, left], self.tau, self.bins,
                                               self.standardise)
                # A sum over no rows must still be connected.
                each.append((gaps * weight[:, None]).sum() / 4 + sides[0][image].sum() * 0)
            result['box'] = [torch.stack(each).sum() / divisor]
        return result
