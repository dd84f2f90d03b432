"""Distillation of mask transformers: queries matched one to one, their classes and masks compared."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.query import check_standardised
from kd_mm.ops.checks import boolean, entries, factors, from_zero, whole
from kd_mm.ops.divergences import sigmoid_divergence, softmax_divergence
from kd_mm.ops.functional import nonzero
from kd_mm.ops.matching import hungarian, take_queries
from kd_mm.registry import MODELS
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import MaskQueryView


def dice_loss(logits: Tensor, target: Tensor, eps: float = 1.0) -> Tensor:
    """``1 - (2 sum p q + eps) / (sum p + sum q + eps)`` with ``p = sigmoid(logits)`` over the last dimension.

    Args:
        logits: (..., P).
        target: (..., P), probabilities.
        eps: keeps empty masks finite. Default 1, as in the host's matching.

    Example:
        >>> dice_loss(torch.tensor([99., -99.]), torch.tensor([1., 0.])).item()
        0.0
    """
    scores = logits.sigmoid()
    return 1 - (2 * (scores * target).sum(dim=-1) + eps) / (scores.sum(dim=-1) + target.sum(dim=-1) + eps)


@MODELS.register_module()
class MaskQueryLoss(HeadLoss):
    """Matched-query mask distillation (the matching of DETRDistill, Chang et al., ICCV 2023, on the masks of
    Mask2Former, Cheng et al., CVPR 2022).

    In every decoder layer each query of the student gets the query of the teacher that an optimal one-to-one matching
    gives it, of cost ``c_c CE(p_t, p_s) + c_m BCE(m_s, m_t) + c_d dice(m_s, m_t)``, and learns its class distribution
    ("no object" included) and its soft mask:

    ``loss_l = w_c mean over pairs of KL(p_t || p_s)
    + sum over pairs of a * (w_m KL(m_t || m_s) + w_d dice(m_s, m_t)) / sum over pairs of a``

    with the probability ``a`` that the teacher gives to "any object": the mask of a query that stands for nothing means
    nothing.  Masks are compared at ``points`` places of each image, drawn anew in every step, the mask terms being
    means over them; the two masks may differ in size.

    No published reference for this combination is known: a formula of ours, from published parts.

    Args:
        class_weight: ``w_c``, from 0. Default 2 [the host's weight of its class loss].
        mask_weight: ``w_m``, from 0. Default 5 [the host's].
        dice_weight: ``w_d``, from 0. Default 5 [the host's]. For soft masks it is not 0 at equality.
        match_weights: factors of the three costs. Default (2, 5, 5) [the host's own matching].
        points: places an image, at least 1. Default 12544 [the host's number].
        standardise: mean and deviation of a query's class logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1.

    In a config ``at='panoptic_head'`` (mmdet) or ``at='decode_head'`` (mmseg): two mask transformers with the same
    classes and number of decoder layers.  On plain tensors two :class:`kd_mm.types.query.MaskQueryView`.

    Returns:
        Reduction: per level; mean over pairs
        Reduction: per level; sum over pairs; divided by weights
        Parts: class, mask, dice
        Classes, then masks. A level is a decoder layer; summed over layers.

    Raises:
        ValueError: an option is out of range, or the heads do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.query import MaskQueryView
        >>> view = MaskQueryView(torch.randn(2, 1, 5, 4), [torch.randn(1, 5, 8, 8)] * 2)
        >>> bool(build(dict(type='MaskQueryLoss', dice_weight=0.))(view, view) < 1e-5)
        True
    """

    compares = MaskQueryView
    needs_assignment = False

    def __init__(self, class_weight: float = 2.0, mask_weight: float = 5.0, dice_weight: float = 5.0,
                 match_weights: Tuple[float, float, float] = (2.0, 5.0, 5.0), points: int = 12544,
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = dict(zip(('class', 'mask', 'dice'), factors(
            'MaskQueryLoss', class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)))
        self.match_weights = entries('MaskQueryLoss', 'match_weights', match_weights, from_zero)
        if len(self.match_weights) != 3 or not any(self.match_weights):
            raise ValueError(f'MaskQueryLoss: match_weights={match_weights!r} must be three factors: class, mask, '
                             'dice, and one above 0')
        self.points = whole('MaskQueryLoss', 'points', points)
        self.standardise = boolean('MaskQueryLoss', 'standardise', standardise)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        if not isinstance(student, MaskQueryView) or not isinstance(teacher, MaskQueryView):
            raise ValueError("MaskQueryLoss compares two mask transformers: give two MaskQueryViews, or in a config "
                             "at='panoptic_head' (mmdet) or at='decode_head' (mmseg)")
        for what, axis in (('decoder layers', 0), ('images', 1), ('class logits', 3)):
            own, theirs = student.logits.shape[axis], teacher.logits.shape[axis]
            if own != theirs:
                raise ValueError(f'MaskQueryLoss: {own} {what} of {student.name} and {theirs} of {teacher.name}; the '
                                 'same number is needed')
        if student.logits.shape[3] < 2:
            raise ValueError(f'MaskQueryLoss: {student.name} has one class logit; an object class and "no object" are '
                             'needed')
        if self.standardise:
            check_standardised('MaskQueryLoss', student, student.logits)

    def draw_points(self, images: int, batch: KDBatch) -> Tensor:
        """(N, P, 2), (x, y) in 0..1 of the padded input, inside each image."""
        generator = batch.info.generator()
        points = torch.rand(images, self.points, 2, generator=generator)
        shapes = targets.img_shapes(batch)
        if shapes and batch.targets.input_shape is not None:
            height, width = batch.targets.input_shape
            points = points * points.new_tensor([[(w / width, h / height)] for h, w in shapes]).clamp(max=1)
        return points

    @torch.no_grad()
    def match(self, student: Tensor, teacher: Tensor, own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The teacher's query of each query of the student, -1 for none: (L, N, Qs).

        Args:
            student, teacher: class logits (L, N, Q, K+1).
            own, theirs: sampled mask logits, L tensors (N, Q, P).
        """
        by_class, by_mask, by_dice = self.match_weights
        costs = -by_class * (F.log_softmax(student, dim=-1) @ teacher.softmax(dim=-1).transpose(-1, -2))
        for cost, layer, target in zip(costs, own, theirs):
            target = target.sigmoid().transpose(-1, -2)
            # BCE(z, p) = softplus(z) - p * z
            cost += by_mask * (F.softplus(layer).sum(dim=-1)[..., None] - layer @ target) / layer.shape[-1]
            scores = layer.sigmoid()
            sums = scores.sum(dim=-1)[..., None] + target.sum(dim=-2)[..., None, :]
            cost += by_dice * (1 - (2 * scores @ target + 1) / (sums + 1))
        return hungarian(costs)

    def terms(self, student: MaskQueryView, teacher: MaskQueryView,  # type: ignore[override]
              batch: KDBatch) -> Dict[str, List[Tensor]]:
        points = self.draw_points(student.logits.shape[1], batch)
        # Layer by layer: tensors of all layers at once are slower to get from the system than to fill.
        own, theirs = ([sample_masks(layer, points) for layer in view.masks] for view in (student, teacher))
        partner = self.match(student.logits, teacher.logits, own, theirs)
        wanted = take_queries(teacher.logits, partner)
        paired = (partner >= 0).to(wanted)
        sure = (1 - wanted.softmax(dim=-1)[..., -1]) * paired
        classes = softmax_divergence(student.logits.flatten(0, 2), wanted.flatten(0, 2),
                                     standardise=self.standardise).sum(dim=1).view_as(paired)
        result = {'class': list((classes * paired).sum(dim=(1, 2)) / nonzero(paired.sum(dim=(1, 2))))}
        compared = [self.compare(layer, take_queries(target[None], chosen[None])[0])
                    for layer, target, chosen in zip(own, theirs, partner)]
        for name in compared[0]:
            masks = torch.stack([layer[name] for layer in compared])
            result[name] = list((masks * sure).sum(dim=(1, 2)) / nonzero(sure.sum(dim=(1, 2))))
        return result

    def compare(self, own: Tensor, theirs: Tensor) -> Dict[str, Tensor]:
        """The mask terms of pairs without their factors, (N, Q) each, of mask logits (N, Q, P)."""
        result = {'mask': sigmoid_divergence(own, theirs).mean(dim=-1)}
        if self.factors['dice']:
            result['dice'] = dice_loss(own, theirs.sigmoid())
        return result


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of all masks of an image at the same points.

    Args:
        masks: (N, Q, H, W).
        points: (N, P, 2), (x, y) in 0..1 of the padded input.

    Returns:
        (N, Q, P).

    Example:
        >>> ramp = torch.arange(4.).view(1, 1, 1, 4)
        >>> sample_masks(ramp, torch.tensor([[[0.5, 0.5]]])).item()
        1.5
    """
    grid = (2 * points - 1)[:, :, None].to(masks)
    return F.grid_sample(masks, grid, align_corners=False, padding_mode='border')[..., 0]
