"""KD-DETR: the same distillation points through both decoders."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.losses.base.query import QueryLoss, check_standardised, class_divergence, image_shapes, paired_box_losses
from kd_mm.losses.ld import distribution_divergence, enough_bins
from kd_mm.ops.boxes import frames
from kd_mm.ops.checks import boolean, factors, from_zero, one_of, positive, whole
from kd_mm.ops.divergences import DIVERGENCES
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import Points, QueryView, join_views

POINTS = ('specific', 'general')
WEIGHTS = ('foreground', 'none')


@MODELS.register_module()
class KDDETRLoss(QueryLoss):
    """KD-DETR (Wang et al., KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation
    Points Sampling, CVPR 2024).

    Predictions of two DETRs have nothing in common but the image, unless both start from the same queries.  So both
    decoders are given the same *distillation points*, each on its own image features: the teacher's own queries
    (*specific*, with the predictions that it has just made) and queries drawn at random in every step (*general*, which
    look where neither has learned to look).  The student's own queries are left to the ground truth.

    ``loss_l = sum over points of w * (w_c KL(z_t || z_s) + w_1 L1(b_s, b_t) + w_g (1 - GIoU)) / sum over points of w``

    with the teacher's best foreground probability as weight ``w``: most points see nothing.  The divergence is summed
    over the classes.

    A re-implementation from the description: no code was published.  How random points are drawn for a decoder that
    takes embeddings (:func:`kd_mm.losses.kd_detr.random_points`) and the normaliser are ours.

    Args:
        points: 'specific', 'general' or both. Default both [P].
        general: random points an image, at least 1. Default 300, as many as most DETRs have queries [ours].
        class_weight: ``w_c``, from 0. Default 1 [recalled].
        l1_weight: ``w_1``, from 0. Default 5 [recalled].
        giou_weight: ``w_g``, from 0. Default 2 [recalled].
        distribution_weight: ``w_d``, from 0. Default 0 [ours]. Above 0 a point's loss has ``w_d tau^2 sum over sides of
            KL(softmax(d_t / tau) || softmax(d_s / tau))``, too, where ``d`` are the distributions of box sides that
            D-FINE and DEIM predict; they are about the box that a point begins with, so both must begin alike.
        tau: temperature of these, above 0. Default 5 [recalled: that of D-FINE's own self-distillation].
        weights: 'foreground' (default [P]) or 'none'.
        divergence: of the classes: 'kl' (default) or 'cross_entropy'.
        standardise: mean and deviation of a query's class logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False, and only for softmax classes.
        loss_weight: see :class:`KDLoss`. Default 1.

    In a config ``at='bbox_head'``: two detectors of one kind (DETR, Conditional DETR, DAB-DETR, Deformable DETR of one
    or two stages, DINO, RT-DETR and others with the same steps), the same width and classes; the numbers of queries may
    differ.  On plain tensors the two views are what both made of the same points.

    Returns:
        Reduction: per level; sum over queries; divided by weights
        Parts: class, l1, giou
        A level is a decoder layer; summed over layers.

    Raises:
        ValueError: an option is out of range, or the detectors cannot share queries.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> view = QueryView(torch.randn(2, 1, 5, 3), torch.rand(2, 1, 5, 4))
        >>> bool(build(dict(type='KDDETRLoss'))(view, view) < 1e-5)
        True
    """

    logits = True
    shared = True

    def __init__(self, points: Sequence[str] = POINTS, general: int = 300, class_weight: float = 1.0,
                 l1_weight: float = 5.0, giou_weight: float = 2.0, weights: str = 'foreground',
                 divergence: str = 'kl', standardise: bool = False, distribution_weight: float = 0.0, tau: float = 5.0,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        kinds = (points, ) if isinstance(points, str) else points
        if not isinstance(kinds, (list, tuple)) or not kinds:
            raise ValueError(f'KDDETRLoss: points={points!r} must be one or both of {", ".join(map(repr, POINTS))}')
        self.points = tuple(one_of('KDDETRLoss', 'points', kind, POINTS) for kind in kinds)
        self.general = whole('KDDETRLoss', 'general', general)
        self.factors = dict(zip(('class', 'l1', 'giou'), factors(
            'KDDETRLoss', class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)))
        self.tau = positive('KDDETRLoss', 'tau', tau)
        if from_zero('KDDETRLoss', 'distribution_weight', distribution_weight):
            self.factors['distribution'] = distribution_weight
        self.weights = one_of('KDDETRLoss', 'weights', weights, WEIGHTS)
        self.divergence = one_of('KDDETRLoss', 'divergence', divergence, DIVERGENCES)
        self.standardise = boolean('KDDETRLoss', 'standardise', standardise)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        if self.standardise and self.factors['class']:
            check_standardised('KDDETRLoss', student, student.logits)
        if 'distribution' in self.factors:
            for view in (student, teacher):
                if view.distributions is None:
                    raise ValueError(f'KDDETRLoss: distribution_weight is above 0, and {view.name} predicts no box '
                                     'distributions; it needs a head such as D-FINE\'s')
            own, theirs = student.distributions.shape[-1], teacher.distributions.shape[-1]
            if own != theirs:
                raise ValueError(f'KDDETRLoss: box distributions of {own} bins and {theirs} of the teacher: both heads '
                                 'need the same reg_max')
            enough_bins('KDDETRLoss', own, False)

    def shared_pass(self, student: QueryView, teacher: QueryView, batch: KDBatch) -> Tuple[QueryView, QueryView]:
        if student.decode is None or teacher.decode is None or teacher.points is None:
            return student, teacher
        pairs: List[Tuple[QueryView, QueryView]] = []
        if 'specific' in self.points:
            pairs.append((student.decode(teacher.points), teacher))
        if 'general' in self.points:
            generator = batch.info.generator()
            drawn = random_points(teacher.points, self.general, generator)
            pairs.append((student.decode(drawn), teacher.decode(drawn).detach()))
        return join_views([own for own, _ in pairs]), join_views([theirs for _, theirs in pairs])

    def terms(self, student: QueryView, teacher: QueryView,  # type: ignore[override]
              batch: KDBatch) -> Dict[str, List[Tensor]]:
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(f'KDDETRLoss: {student.logits.shape[2]} points of the student and '
                             f'{teacher.logits.shape[2]} of the teacher: both must decode the same')
        scores = teacher.scores().amax(dim=-1)
        weight = scores if self.weights == 'foreground' else scores.new_ones(scores.shape)
        total = nonzero(weight.sum(dim=(1, 2)))
        frame = frames(image_shapes(batch, weight.shape[1]), student.boxes)
        l1, giou = paired_box_losses(student.boxes, teacher.boxes, frame)
        classes = class_divergence(student, student.logits, teacher.logits, self.divergence, self.standardise)
        found = {name: list((values * weight).sum(dim=(1, 2)) / total)
                 for name, values in (('class', classes), ('l1', l1), ('giou', giou)) if self.factors[name]}
        if 'distribution' in self.factors:
            assert student.distributions is not None and teacher.distributions is not None
            count = min(len(student.distributions), len(teacher.distributions))
            sides = distribution_divergence(student.distributions[-count:], teacher.distributions[-count:], self.tau)
            values = (sides.sum(dim=-1) * weight[-count:]).sum(dim=(1, 2)) / total[-count:]
            # The layers before them, such as D-FINE's first prediction, have none.
            found['distribution'] = [*student.logits[:len(student) - count].sum(dim=(1, 2, 3)) * 0, *values]
        return found


def random_points(points: Points, count: int, generator: torch.Generator) -> Points:
    """Points drawn at random, of the same kind as given ones, the same for all images.

    Positions (reference points and boxes) are uniform over the image and over all sizes.  Embeddings are drawn from a
    normal distribution with the mean and deviation that the given ones have in each channel; where these do not differ
    (DETR's and DAB-DETR's zeros), neither do those.

    Args:
        points: of a detector, (N, Q, ...).
        count: how many, at least 1.
        generator: a CPU generator.

    Returns:
        The same names, (N, count, ...).

    Example:
        >>> given = dict(query=torch.zeros(2, 5, 8), reference_points=torch.rand(2, 5, 4))
        >>> drawn = random_points(given, 7, torch.Generator().manual_seed(0))
        >>> drawn['query'].abs().sum().item(), drawn['reference_points'].shape
        (0.0, torch.Size([2, 7, 4]))
    """
    result: Points = {}
    for name, value in points.items():
        images, _, width = value.shape
        anchors = name == 'query_pos' and 'query' in points and width != points['query'].shape[-1]
        if name == 'reference_points' or anchors:
            drawn = torch.rand(count, width, generator=generator).clamp(0.01, 0.99).to(value)
            if anchors:  # DAB-DETR's learned anchors are before their sigmoid
                drawn = torch.logit(drawn)
        else:
            drawn = torch.randn(count, width, generator=generator).to(value)
            rows = value.detach().flatten(0, 1)
            drawn = rows.mean(dim=0) + drawn * rows.std(dim=0, unbiased=False)
        result[name] = drawn.expand(images, count, width)
    return result
