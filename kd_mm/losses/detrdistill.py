"""DETRDistill: predictions matched one to one, encoder features where the objects are, and the teacher's queries."""

from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.query import (
    QueryLoss,
    check_standardised,
    class_costs,
    class_divergence,
    image_shapes,
    paired_box_losses,
)
from kd_mm.ops.boxes import frames, intersection, to_centre, to_corners
from kd_mm.ops.checks import boolean, entries, factors, from_zero, number, one_of, positive, whole
from kd_mm.ops.divergences import DIVERGENCES
from kd_mm.ops.functional import nonzero, unit_vectors
from kd_mm.ops.matching import hungarian, pair_costs, take_queries
from kd_mm.registry import MODELS
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import QueryAssignment, QueryView
from kd_mm.types.targets import batch_boxes

FEATURES = ('memory', 'neck')


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017), summed over the classes, one number a query.

    Args:
        logits: (..., K).
        labels: (...,), K for a query without object.
        alpha: weight of the object's class; the others have ``1 - alpha``.
        gamma: exponent of the factor that makes sure scores count less.

    Example:
        >>> round(focal_loss(torch.zeros(1, 1), torch.tensor([0])).item(), 4)  # 0.25 * 0.5^2 * log 2
        0.0433
    """
    classes = logits.shape[-1]
    target = F.one_hot(labels, classes + 1)[..., :classes].to(logits)
    wrong = (logits.sigmoid() - target).abs()
    weight = (alpha * target + (1 - alpha) * (1 - target)) * wrong.pow(gamma)
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction='none')).sum(dim=-1)


@MODELS.register_module()
class DETRDistillLogitsLoss(QueryLoss):
    """DETRDistill, matched logits (Chang et al., DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families, ICCV 2023).

    The predictions of two DETRs are sets without common order.  In every decoder layer each query of the student gets
    the query of the teacher that an optimal one-to-one matching gives it (Hungarian algorithm, all queries of the
    teacher take part), of cost ``CE(z_s, p_t) + 5 L1(b_s, b_t) - 2 GIoU(b_s, b_t)``, and learns what it predicts:

    ``loss_l = (1 / M) * sum over pairs of w_c CE(z_s, p_t) + w_1 L1(b_s, b_t) + w_g (1 - GIoU(b_s, b_t))``

    with ``M`` pairs in the batch, the cross-entropy summed over the classes (sigmoid, or softmax with "no object"), and
    the teacher's boxes clipped to the image.  A student with more queries than its teacher has some without a partner;
    they learn nothing here (the published code gives them a target that is no probability).

    Args:
        class_weight: ``w_c``, from 0. Default 1 [C].
        l1_weight: ``w_1``, from 0. Default 5 [C].
        giou_weight: ``w_g``, from 0. Default 2 [C].
        match_weights: factors of the three costs of the matching. Default (1, 5, 2) [C].
        divergence: of the classes: 'cross_entropy' (default [C]; not 0 at equality, but its gradient is) or 'kl' (less
            the teacher's entropy).
        standardise: mean and deviation of a query's class logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False, and only for softmax classes.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    In a config ``at='bbox_head'``: any two DETR-type detectors of the same classes and number of decoder layers; the
    number of queries may differ, denoising queries are left out.

    Returns:
        Reduction: per level; mean over pairs
        Parts: class, l1, giou
        A level is a decoder layer; summed over layers.

    Raises:
        ValueError: an option is out of range, or the heads do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.query import QueryView
        >>> view = QueryView(torch.randn(2, 1, 5, 3), torch.rand(2, 1, 5, 4) * 0.2 + 0.4)
        >>> bool(build(dict(type='DETRDistillLogitsLoss', divergence='kl'))(view, view) < 1e-5)
        True
    """

    logits = True

    def __init__(self, class_weight: float = 1.0, l1_weight: float = 5.0, giou_weight: float = 2.0,
                 match_weights: Tuple[float, float, float] = (1.0, 5.0, 2.0), divergence: str = 'cross_entropy',
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        name = type(self).__name__
        self.factors = dict(zip(('class', 'l1', 'giou'), factors(
            name, class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)))
        self.match_weights = entries(name, 'match_weights', match_weights, from_zero)
        if len(self.match_weights) != 3 or not any(self.match_weights):
            raise ValueError(f'{name}: match_weights={match_weights!r} must be three factors: class, L1, GIoU, and one '
                             'above 0')
        self.divergence = one_of(name, 'divergence', divergence, DIVERGENCES)
        self.standardise = boolean(name, 'standardise', standardise)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        if self.standardise and self.factors['class']:
            check_standardised('DETRDistillLogitsLoss', student, student.logits)

    @torch.no_grad()
    def match(self, student: QueryView, teacher: QueryView) -> Tensor:
        """(L, N, Qs), the teacher's query of each query of the student, -1 for none."""
        by_class, l1, giou = self.match_weights
        return hungarian(by_class * class_costs(student, teacher)
                         + pair_costs(student.boxes, clipped(teacher.boxes), l1, giou))

    def terms(self, student: QueryView, teacher: QueryView,  # type: ignore[override]
              batch: KDBatch) -> Dict[str, List[Tensor]]:
        partner = self.match(student, teacher)
        paired = (partner >= 0).to(student.logits)
        pairs = nonzero(paired.sum(dim=(1, 2)))
        frame = frames(image_shapes(batch, partner.shape[1]), student.boxes)
        wanted = take_queries(clipped(teacher.boxes), partner)
        l1, giou = paired_box_losses(student.boxes, wanted, frame)
        classes = class_divergence(student, student.logits, take_queries(teacher.logits, partner), self.divergence,
                                   self.standardise)
        return {name: list((values * paired).sum(dim=(1, 2)) / pairs)
                for name, values in (('class', classes), ('l1', l1), ('giou', giou)) if self.factors[name]}


def clipped(boxes: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) in 0..1 cut off at the border of the image.

    Example:
        >>> clipped(torch.tensor([0.0, 0.5, 0.5, 0.5])).tolist()
        [0.125, 0.5, 0.25, 0.5]
    """
    return to_centre(to_corners(boxes).clamp(0, 1))


@MODELS.register_module()
class DETRDistillFeatureLoss(QueryLoss):
    """DETRDistill, target-aware features (Chang et al., DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families, ICCV 2023).

    Each decoder layer of the teacher says where its objects are: with the ``top`` best (query, class) pairs,

    ``m = max(sum_n a_n cos(q_n, F_t), floor)``, divided by its maximum over the image,
    ``a_n = score_n * (largest IoU of box n with a ground-truth box; 1 in an image without any)``

    and ``loss = sum over decoder layers and levels of mean((m F_t - m F_s)^2)``: one mean over images, channels and
    cells for each.  ``q`` are the teacher's queries behind that layer, ``F`` features of the encoder, both with the
    transformer's width.

    Args:
        top: pairs an image that count, at least 1. Default 100 [C].
        floor: lower end of the mask, above 0. Default 0.01 [C].
        features: 'memory' (default), what the encoder gives, as the paper describes it [recalled], or 'neck', what it
            gets.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    In a config ``at='bbox_head'``: two detectors of the same width and strides; there is no adapter, for a query of the
    teacher means something in the teacher's space alone.  On plain tensors the views hold ``memory`` (or ``neck``) and
    the teacher's also logits, boxes and ``queries``.

    Returns:
        Reduction: all levels; mean over elements
        Summed over the decoder layers and the levels of the memory.

    Raises:
        ValueError: an option is out of range, or the features do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.query import QueryView
        >>> views = [QueryView(torch.randn(2, 1, 5, 3), torch.rand(2, 1, 5, 4), torch.randn(2, 1, 5, 8),
        ...                    memory=[torch.randn(1, 8, 4, 4)]) for _ in range(2)]
        >>> batch = KDBatch(boxes=[torch.tensor([[0., 0., 20., 20.]])], img_shapes=[(32, 32)], input_shape=(32, 32))
        >>> bool(build(dict(type='DETRDistillFeatureLoss', top=4))(*views, batch) > 0)
        True
    """

    joint = True
    layers = False
    logits = False
    needs_boxes = True

    def __init__(self, top: int = 100, floor: float = 0.01, features: str = 'memory', loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.top = whole('DETRDistillFeatureLoss', 'top', top)
        self.floor = positive('DETRDistillFeatureLoss', 'floor', floor)
        self.features = one_of('DETRDistillFeatureLoss', 'features', features, FEATURES)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        own, theirs = getattr(student, self.features), getattr(teacher, self.features)
        shapes = [[tuple(level.shape) for level in side] for side in (own, theirs)]
        if not own or shapes[0] != shapes[1]:
            raise ValueError(f'DETRDistillFeatureLoss: {self.features} of the student {shapes[0]} and of the teacher '
                             f'{shapes[1]} must have the same shapes. For transformers of different width or strides '
                             "use a feature loss with an adapter, at='@memory'")
        if teacher.queries is None or teacher.queries.shape[-1] != theirs[0].shape[1]:
            raise ValueError("DETRDistillFeatureLoss needs the teacher's queries, as wide as its features")

    @torch.no_grad()
    def query_weights(self, teacher: QueryView, batch: KDBatch) -> Tuple[Tensor, Tensor]:
        """Score times IoU of the best (query, class) pairs, and which queries they are: (L, N, top) twice."""
        scores = teacher.scores()
        best = scores.flatten(2).topk(min(self.top, scores.shape[2] * scores.shape[3]), dim=2)
        query = best.indices // scores.shape[3]
        boxes, real, _ = batch_boxes(batch, 'image', teacher.boxes[0])
        guess = to_corners(teacher.boxes) * frames(image_shapes(batch, len(boxes)), teacher.boxes)
        overlap, union = intersection(guess[:, :, :, None], boxes[None, :, None])
        iou = overlap / union.clamp(min=1e-6) * real[:, None]
        # Where there is nothing to find the score alone counts.
        near = iou.amax(dim=-1) if iou.shape[-1] else iou.new_ones(iou.shape[:-1])
        near = torch.where(real.any(dim=1)[:, None], near, torch.ones_like(near))
        return best.values * near.gather(2, query), query

    @torch.no_grad()
    def masks(self, teacher: QueryView, batch: KDBatch) -> List[Tensor]:
        """The mask of every decoder layer at each feature level, (L, N, H, W)."""
        assert teacher.queries is not None
        weights, query = self.query_weights(teacher, batch)
        # The cosines are linear in the unit queries: their weighted sum is one direction an image.
        direction = (take_queries(unit_vectors(teacher.queries, dim=-1), query) * weights[..., None]).sum(dim=2)
        result = []
        for feature in getattr(teacher, self.features):
            mask = torch.einsum('lnc,nchw->lnhw', direction, unit_vectors(feature, dim=1)).clamp(min=self.floor)
            result.append(mask / mask.amax(dim=(2, 3), keepdim=True))
        return result

    def terms(self, student: QueryView, teacher: QueryView,  # type: ignore[override]
              batch: KDBatch) -> Dict[str, List[Tensor]]:
        total = student.logits.sum() * 0
        for own, theirs, mask in zip(getattr(student, self.features), getattr(teacher, self.features),
                                     self.masks(teacher, batch)):
            error = (own - theirs).square().sum(dim=1)
            total = total + (mask.square().sum(dim=0) * error).sum() / own.numel()
        return {'': [total]}


@MODELS.register_module()
class DETRDistillQueryPriorLoss(QueryLoss):
    """DETRDistill, query-prior assignment (Chang et al., DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families, ICCV 2023).

    A young DETR's queries mean nothing yet and change their objects from step to step.  The student's decoder runs once
    more, on its own image features but from the *teacher's* queries, and learns the ground truth by the assignment
    that the host makes on the *teacher's* predictions:

    ``loss_l = (1 / P) * (w_c sum over queries of focal(z, y)
    + sum over positives of w_1 L1(b, b_gt) + w_g (1 - GIoU(b, b_gt)))``

    with the ``P`` queries of the teacher that stand for an object (mean over the ranks).

    Args:
        class_weight: ``w_c``, from 0. Default 2 [C].
        l1_weight: ``w_1``, from 0. Default 5 [C].
        giou_weight: ``w_g``, from 0. Default 2 [C].
        alpha: weight of the object's class in the focal loss, within 0..1. Default 0.25 [C].
        gamma: exponent of the focal loss, from 0. Default 2 [C].
        loss_weight: see :class:`KDLoss`. Default 1.

    In a config ``at='bbox_head'``: two detectors of one kind and width with independent (sigmoid) classes; not DDQ,
    whose decoder takes no queries but its own.  On plain tensors the student's view is what it made of the teacher's
    queries, and the teacher's has the assignment.

    Returns:
        Reduction: per level; sum over queries; divided by positives
        Parts: class, l1, giou
        A level is a decoder layer; summed over layers.

    Raises:
        ValueError: an option is out of range, or the heads do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.query import QueryAssignment, QueryView
        >>> found = QueryAssignment(torch.tensor([[[1, 3]]]), torch.tensor([[[0, -1]]]), 3, torch.ones(1))
        >>> view = QueryView(torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 4), assignment=found)
        >>> batch = KDBatch(boxes=[torch.tensor([[0., 0., 20., 20.]])], labels=[torch.tensor([1])],
        ...                 img_shapes=[(32, 32)], input_shape=(32, 32))
        >>> bool(build(dict(type='DETRDistillQueryPriorLoss'))(view, view, batch) > 0)
        True
    """

    logits = True
    shared = True
    needs_boxes = True

    def __init__(self, class_weight: float = 2.0, l1_weight: float = 5.0, giou_weight: float = 2.0,
                 alpha: float = 0.25, gamma: float = 2.0, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        name = type(self).__name__
        self.factors = dict(zip(('class', 'l1', 'giou'), factors(
            name, class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)))
        self.alpha, self.gamma = number(name, 'alpha', alpha, 0, 1), from_zero(name, 'gamma', gamma)

    def shared_pass(self, student: QueryView, teacher: QueryView, batch: KDBatch) -> Tuple[QueryView, QueryView]:
        if student.decode is None or teacher.points is None:
            return student, teacher
        return student.decode(teacher.points), teacher

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        self.sigmoid_only(student)

    def assign(self, student: QueryView, teacher: QueryView, batch: KDBatch) -> QueryAssignment:
        """The host's assignment of the teacher's predictions; the view's own where it is there already."""
        if teacher.assignment is not None:
            return teacher.assignment
        match = teacher.match or student.match
        if match is None:
            raise ValueError("DETRDistillQueryPriorLoss: neither head has an assigner, and the teacher's view has no "
                             'assignment')
        return match(teacher, targets.gt_boxes(batch), targets.gt_labels(batch),
                     image_shapes(batch, teacher.logits.shape[1]), teacher.logits.shape[3])

    def terms(self, student: QueryView, teacher: QueryView,  # type: ignore[override]
              batch: KDBatch) -> Dict[str, List[Tensor]]:
        found = self.assign(student, teacher, batch)
        if found.labels.shape != student.logits.shape[:3]:
            raise ValueError(f'DETRDistillQueryPriorLoss: an assignment of {tuple(found.labels.shape)} (layers, '
                             f'images, queries) for predictions of {tuple(student.logits.shape[:3])}')
        frame = frames(image_shapes(batch, found.labels.shape[1]), student.boxes)
        boxes, _, _ = batch_boxes(batch, 'image', student.boxes[0])
        # One row more, for batches without any object.
        truth = to_centre(F.pad(boxes, (0, 0, 0, 1)) / frame)
        wanted = take_queries(truth.expand(len(student), *truth.shape), found.objects)
        l1, giou = paired_box_losses(student.boxes, wanted, frame)
        positives = (found.objects >= 0).to(l1)
        classes = focal_loss(student.logits, found.labels, self.alpha, self.gamma)
        number = found.num_pos.to(l1)
        return {name: list(values.sum(dim=(1, 2)) / number)
                for name, values in (('class', classes), ('l1', l1 * positives), ('giou', giou * positives))
                if self.factors[name]}
