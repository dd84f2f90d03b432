"""What the losses on DETR-type detectors share: views of decoder layers and queries instead of lists of maps."""

from typing import Any, Dict, List, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.head import HeadLoss
from kd_mm.ops.boxes import giou_loss, to_corners
from kd_mm.ops.divergences import sigmoid_divergence, softmax_divergence
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import QueryView, same_layers


class QueryLoss(HeadLoss):
    """Base of the losses that compare two DETR-type detectors, decoder layer by decoder layer.

    ``at`` names the head (``'bbox_head'``); what the transformer before it did is read from the same forward pass.
    The levels of these losses are the decoder layers: ``loss_weight`` may be a list with one weight each.

    On plain tensors the loss is called with two :class:`kd_mm.types.query.QueryView`.

    With ``shared`` the student's decoder runs on given queries: :meth:`shared_pass` does it.

    Class attributes:
        layers: both sides must have the same number of decoder layers.
    """

    compares = QueryView
    needs_assignment = False
    layers = True

    def shared_pass(self, student: QueryView, teacher: QueryView, batch: KDBatch) -> Tuple[QueryView, QueryView]:
        """The views to compare, for a method whose students decode given queries; others keep what there is.

        On plain tensors (views without ``decode``) nothing can run: the views are taken for its result.
        """
        return student, teacher

    def parts(self, student: Any, teacher: Any, batch: Optional[KDBatch] = None,
              region: Optional[nn.Module] = None) -> List[Dict[str, Tensor]]:
        batch = KDBatch() if batch is None else batch
        # Before the base turns mixed precision off: a decoder runs as it does in its own model.
        if isinstance(student, QueryView) and isinstance(teacher, QueryView):
            student, teacher = self.shared_pass(student, teacher.detach(), batch)
            if self.layers:
                student, teacher = same_layers(student, teacher)
        return super().parts(student, teacher, batch, region)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        name = type(self).__name__
        if not isinstance(student, QueryView) or not isinstance(teacher, QueryView):
            raise ValueError(f"{name} compares two DETR-type heads: give two QueryViews, or in a config at='bbox_head'")
        if student.logits.shape[1] != teacher.logits.shape[1]:
            raise ValueError(f'{name}: {student.logits.shape[1]} images of the student and {teacher.logits.shape[1]} '
                             'of the teacher')
        if self.layers and len(student) != len(teacher):
            raise ValueError(f'{name}: {len(student)} decoder layers of {student.name} and {len(teacher)} of '
                             f'{teacher.name}; the same number is needed')
        own, theirs = student.logits.shape[3], teacher.logits.shape[3]
        if self.logits and (own != theirs or student.sigmoid != teacher.sigmoid):
            raise ValueError(
                f'{name}: {own} class logits of {student.name} ({"sigmoid" if student.sigmoid else "softmax"}) and '
                f'{theirs} of {teacher.name} ({"sigmoid" if teacher.sigmoid else "softmax"}): the classes must be the '
                'same. Use a feature loss, or a teacher trained on these classes')


def class_divergence(student: QueryView, logits: Tensor, target: Tensor, divergence: str,
                     standardise: bool = False) -> Tensor:
    """Divergence of class scores, summed over the classes, one number a query.

    Args:
        student: tells whether the classes are independent.
        logits: (..., K).
        target: (..., K), the teacher's logits.
        divergence: 'kl' or 'cross_entropy'.
        standardise: of a softmax, see :func:`kd_mm.ops.divergences.softmax_divergence`.
    """
    if student.sigmoid:
        return sigmoid_divergence(logits, target, divergence=divergence).sum(dim=-1)
    terms = softmax_divergence(logits.flatten(0, -2), target.flatten(0, -2), divergence=divergence,
                               standardise=standardise)
    return terms.sum(dim=-1).view(logits.shape[:-1])


def check_standardised(owner: str, view: Any, logits: Tensor) -> None:
    """Raise a ValueError for a head whose class logits ``standardise=True`` has nothing to do with.

    Args:
        owner: class name of the loss.
        view: of the head.
        logits: (..., K).
    """
    if getattr(view, 'sigmoid', False):
        raise ValueError(f'{owner}: standardise=True is for softmax classes, and {view.name} has independent (sigmoid) '
                         'ones. Use standardise=False')
    if logits.shape[-1] < 3:
        raise ValueError(f'{owner}: standardise=True leaves nothing but the order of the {logits.shape[-1]} logits of '
                         f'{view.name}. Use standardise=False')


def class_costs(student: QueryView, teacher: QueryView) -> Tensor:
    """Cross-entropy of every query of the student with every one of the teacher as soft target, summed over the
    classes: (L, N, Qs, Qt)."""
    target = teacher.scores() if teacher.sigmoid else teacher.logits.softmax(dim=-1)
    if student.sigmoid:
        # BCE(z, p) = softplus(z) - p * z
        return F.softplus(student.logits).sum(dim=-1)[..., None] - student.logits @ target.transpose(-1, -2)
    return -(F.log_softmax(student.logits, dim=-1) @ target.transpose(-1, -2))


def paired_box_losses(boxes: Tensor, target: Tensor, frame: Tensor) -> Tuple[Tensor, Tensor]:
    """L1 in parts of the image, and ``1 - GIoU`` in pixels, of paired boxes: (L, N, Q) twice.

    Args:
        boxes, target: (L, N, Q, 4), (cx, cy, w, h) in 0..1.
        frame: (N, 1, 4), see :func:`kd_mm.ops.boxes.frames`.
    """
    return ((boxes - target).abs().sum(dim=-1),
            giou_loss(to_corners(boxes) * frame, to_corners(target) * frame))


def image_shapes(batch: KDBatch, images: int) -> List[Tuple[int, int]]:
    """(h, w) of every image without padding; 1 by 1 where the batch does not know (boxes then stay in parts)."""
    return targets.img_shapes(batch) or [(1, 1)] * images
