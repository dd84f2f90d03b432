"""Cross-head distillation: the student's tower features through the rest of the teacher's head."""

from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.ld import distribution_divergence, enough_bins
from kd_mm.ops.boxes import giou_loss
from kd_mm.ops.checks import boolean, factors, one_of, positive, whole
from kd_mm.ops.divergences import quality_focal, sigmoid_divergence_sum
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import STAGES, CrossHead, DenseView


@MODELS.register_module()
class CrossKDLoss(HeadLoss):
    """CrossKD (Wang et al., CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024).

    Features of the student's class and box towers, taken after convolution number ``index`` and before its activation,
    are rescaled to the teacher's mean and deviation per channel (:func:`kd_mm.ops.functional.align_moments`) and go
    through the teacher's activation, the rest of its towers and its predictors.  These *cross-head* predictions learn
    the teacher's; so the student's own predictors hear the ground truth alone.  With ``p = sigma(z)``, teacher ``t``:

    - classes: ``w_c / P * sum m * |p - p_t|^beta * BCE(z, p_t)``;
    - boxes: ``w = m * max over classes p_t``; where the heads predict distributions,
      ``w_b / 4 * sum w * tau^2 KL / sum over levels of w``; else ``w_b / P * sum w * (1 - GIoU)``;
    - centerness (objectness, IoU) where a head predicts it: ``w_q / P * sum over positives of BCE(q, sigma(q_t))``;

    ``P`` is the number of positives of the host's assignment (mean over the ranks), ``m`` its label weight, 0 where a
    prior is ignored.

    Where the published code and the paper differ [C]: it keeps the tower features by reference and then applies the
    in-place activation, so what it rescales has been activated already; ``stage='post_activation'`` does that on
    purpose.  The default is the paper's.

    Args:
        index: convolutions of each tower that stay the student's, from 1. Default None: all but the last, 3 of the
            usual 4 [C: GFL, RetinaNet, ATSS; 2 for FCOS].
        stage: 'pre_activation' (default, as the paper says) or 'post_activation' (as the published code runs).
        align: rescale the features. Default True [C].
        class_weight: ``w_c``, from 0. Default 1 [C; 0.4 for FCOS].
        box_weight: ``w_b``, from 0. Default None: 4 where the heads predict distributions, else 1 [C; FCOS differs, see
            the card].
        quality_weight: ``w_q``, from 0. Default 1 [C: ATSS].
        beta: exponent of the class factor, 0 or at least 1. Default 1 [C]; its gradient is kept [C].
        divergence: of the classes: 'cross_entropy' (default [C]) or 'kl' (less the teacher's entropy).
        tau: temperature of the distributions, above 0. Default 1 [C].
        standardise: mean and deviation of a box side's logits, where the heads predict distributions, are made equal
            before the temperature, see :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1.

    In a config ``at='bbox_head'``: heads with ``cls_convs`` and ``reg_convs`` (RetinaNet, FCOS, ATSS, GFL, PAA, DDOD,
    VFNet, RTMDet, FSAF, FoveaBox), YOLOX or YOLOF, the same kind and ``feat_channels`` in both models.  On plain
    tensors the student's :class:`kd_mm.types.dense.DenseView` holds the cross-head predictions.

    Returns:
        Reduction: per level; sum over priors; divided by positives
        Reduction: per level; sum over sides; divided by weights
        Parts: class, box, quality
        Box distributions as the second line, all else as the first; summed over levels.

    Raises:
        ValueError: an option is not among its choices, or the heads do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.dense import Assignment
        >>> host = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], background=3)
        >>> view = DenseView([torch.randn(1, 2, 3)], boxes=[torch.tensor([[[0., 0., 4., 4.]] * 2])], assignment=host)
        >>> abs(build(dict(type='CrossKDLoss'))(view, view).item()) < 1e-5
        True
    """

    def __init__(self, index: Optional[int] = None, stage: str = 'pre_activation', align: bool = True,
                 class_weight: float = 1.0, box_weight: Optional[float] = None, quality_weight: float = 1.0,
                 beta: float = 1.0, divergence: str = 'cross_entropy', tau: float = 1.0,
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.index = None if index is None else whole('CrossKDLoss', 'index', index)
        self.align = boolean('CrossKDLoss', 'align', align)
        self.stage = one_of('CrossKDLoss', 'stage', stage, STAGES)
        self.factors = dict(zip(('class', 'box', 'quality'), factors(
            'CrossKDLoss', class_weight=class_weight, box_weight=1.0 if box_weight is None else box_weight,
            quality_weight=quality_weight)))
        # Which default applies is for the heads to say, so the 4 of distributions stands in the term, not in factors.
        self.sides_weight = 1.0 if box_weight is None else 1 / 4
        self.beta, self.divergence = quality_focal('CrossKDLoss', beta, divergence)
        self.tau = positive('CrossKDLoss', 'tau', tau)
        self.standardise = boolean('CrossKDLoss', 'standardise', standardise)
        self.cross_head = CrossHead(index, self.stage, align)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        self.sigmoid_only(student)
        if (student.distributions is None) != (teacher.distributions is None):
            raise ValueError(f'CrossKDLoss: only one of {student.name} and {teacher.name} predicts distributions')
        if student.distributions is None and self.factors['box']:
            student.boxes, teacher.boxes  # noqa: B018  (raises where they are not known)
        if self.factors['box']:
            self.same_bins(student, teacher)
        if student.distributions is not None and self.factors['box'] and self.standardise:
            enough_bins('CrossKDLoss', student.distributions[0].shape[-1], True)

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        assert student.assignment is not None
        positives, ignored = student.assignment.num_pos, student.assignment.weights
        result: Dict[str, List[Tensor]] = {}
        if self.factors['class']:
            result['class'] = [
                sigmoid_divergence_sum(
                    own.flatten(0, 1), theirs.flatten(0, 1), weight.flatten()[:, None], beta=self.beta,
                    divergence=self.divergence) / positives
                for own, theirs, weight in zip(student.logits, teacher.logits, ignored)]
        if self.factors['box']:
            weights = [logits.sigmoid().amax(dim=-1) * (weight > 0)
                       for logits, weight in zip(teacher.logits, ignored)]
            result['box'] = self._boxes(student, teacher, weights, positives)
        if self.factors['quality'] and student.quality is not None and teacher.quality is not None:
            result['quality'] = [
                (F.binary_cross_entropy_with_logits(own, theirs.sigmoid(), reduction='none')
                 * student.assignment.positive(level)).sum() / positives
                for level, (own, theirs) in enumerate(zip(student.quality, teacher.quality))]
        return result

    def _boxes(self, student: DenseView, teacher: DenseView, weights: List[Tensor],
               positives: Tensor) -> List[Tensor]:
        if student.distributions is None or teacher.distributions is None:
            return [(giou_loss(own, theirs) * weight).sum() / positives
                    for own, theirs, weight in zip(student.boxes, teacher.boxes, weights)]
        # Of this rank alone, as published: the sum is over the very rows that it divides.
        total = nonzero(torch.stack([weight.sum() for weight in weights]).sum())
        sides = [distribution_divergence(own, theirs, self.tau, standardise=self.standardise)
                 for own, theirs in zip(student.distributions, teacher.distributions)]
        return [self.sides_weight * (level * weight[..., None]).sum() / total for level, weight in zip(sides, weights)]
