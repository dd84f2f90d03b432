"""General instances: features of boxes, and the distances between them."""

from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.instances import instance_rows, pool_instances, rows_of_level
from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.mimic import ASSIGNMENTS
from kd_mm.ops.checks import from_zero, number, one_of, positive, whole
from kd_mm.ops.functional import apply_weights, nonzero, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.dense import DenseView
from kd_mm.types.targets import input_shape


def select_instances(student_scores: Tensor, teacher_scores: Tensor, student_boxes: Tensor, teacher_boxes: Tensor,
                     count: int = 10, iou: float = 0.3, candidates: int = 1000) -> Tensor:
    """The boxes of one image where student and teacher differ most: GID's general instances.

    At each place the score is ``|max_c p_t - max_c p_s|`` and the box is that of the side with the higher score; after
    non-maximum suppression the first ``count`` remain.  Boxes without an area are none.

    Args:
        student_scores: class scores in 0..1, (P, K).
        teacher_scores: (P, K).
        student_boxes: decoded boxes of the same places, (P, 4).
        teacher_boxes: (P, 4).
        count: how many boxes remain at most. Default 10 [C].
        iou: threshold of the suppression. Default 0.3 [C].
        candidates: how many of the highest scores enter the suppression, whose cost grows with their square. Default
            1000, as the hosts do before theirs.

    Returns:
        (M, 4), for ``KDBatch(instances=[...])``.

    Example:
        >>> scores, boxes = torch.tensor([[0.9], [0.2]]), torch.tensor([[0., 0., 8., 8.], [20., 20., 30., 30.]])
        >>> select_instances(scores, torch.tensor([[0.8], [0.9]]), boxes, boxes + 1, count=1).tolist()
        [[21.0, 21.0, 31.0, 31.0]]
    """
    from mmcv.ops import nms
    ours, theirs = student_scores.amax(dim=1), teacher_scores.amax(dim=1)
    boxes = torch.where((theirs > ours)[:, None], teacher_boxes, student_boxes)
    whole = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, gap = boxes[whole], (theirs - ours).abs()[whole]
    gap, first = gap.topk(min(candidates, len(gap)))
    boxes = boxes[first]
    kept = nms(boxes.float().contiguous(), gap.float().contiguous(), iou)[1]
    return boxes[kept[:count]]


def normalised_distances(rows: Tensor) -> Tensor:
    """Euclidean distances between rows, divided by the mean of those that are not 0.

    Args:
        rows: (M, D).

    Returns:
        (M, M), 0 on the diagonal.

    Example:
        >>> normalised_distances(torch.tensor([[0.], [1.], [3.]])).tolist()
        [[0.0, 0.5, 1.5], [0.5, 0.0, 1.0], [1.5, 1.0, 0.0]]
    """
    # By inner products: the differences of all pairs would be M times as large as the rows.
    squares = rows.square().sum(dim=1)
    both = squares[:, None] + squares[None]
    gap = both - 2 * rows @ rows.T
    # Equal rows differ by rounding here, on one processor and not on the next, and must not count in the mean.
    gap = torch.where(gap > 16 * torch.finfo(gap.dtype).eps * both, gap, torch.zeros_like(gap))
    distances = safe_sqrt(gap * (1 - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)))
    mean = distances.sum() / nonzero((distances > 0).sum().to(rows.dtype))
    return distances / nonzero(mean)


@MODELS.register_module()
class GIDLoss(KDLoss):
    """General instance distillation (Dai et al., General Instance Distillation for Object Detection, CVPR 2021),
    feature and relation terms.

    With the features ``u_i`` (teacher) and ``v_i`` (student) of M boxes, pooled to one grid::

        feature  * 1 / (M * cells of the grid) * sum ||u_i - v_i||^2
      + relation * 1 / (M^2 - M) * sum smooth_L1(d(v_i, v_j) - d(u_i, u_j))     d: see :func:`normalised_distances`

    The relation needs three boxes and is between all those of the batch.

    Re-implementation from the description and from an unofficial port, whose weights these are.  GID picks its boxes by
    the gap of the predictions of both dense heads, without labels, see :func:`select_instances`: ``heads_at`` names the
    head.  Without it the boxes are ``batch.given.instances``, or the ground truth.  The response term of the method is
    not part of this loss.

    Args:
        feature: weight of the feature term, from 0. Default 5e-3 (the port).
        relation: weight of the relation term, from 0. Default 40 (the port).
        size: edge of the pooled grid, above 0. Default 10 (the port).
        assign: 'all' (default: every level is pooled at every box) or 'size' (each box on one level by its size, as the
            port does).
        scale: for ``assign='size'``: boxes of up to twice this edge are on the first level. Default 112, for P3.
        heads_at: path of the dense head in both models, such as 'bbox_head' ('rpn_head' of a two-stage detector): the
            boxes are where their predictions differ most. Default None: the ground truth.
        count: boxes an image, from 1. Default 10 (the port, which takes 10 a batch and level; here an image).
        iou: threshold of the suppression between them, from 0 to 1. Default 0.3 (the port).
        loss_weight: see :class:`KDLoss`. Default 1.

    A region weights both maps before they are pooled.

    Returns:
        Reduction: per level; mean over cells
        Reduction: per level; mean over pairs
        Parts: feature, relation
        Cells of the grid of each instance, then pairs of instances; 0 without boxes; summed over levels.

    Raises:
        ValueError: an option is out of range, the data has no boxes, or the two heads have other priors.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8., 8., 24., 24.]])])
        >>> build(dict(type='GIDLoss', feature=1.0))(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), batch).item()
        4.0
    """

    takes = (4, )
    needs_boxes = True

    def __init__(self, feature: float = 5e-3, relation: float = 40.0, size: int = 10, assign: str = 'all',
                 scale: float = 112.0, heads_at: Optional[str] = None, count: int = 10, iou: float = 0.3,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'feature': from_zero('GIDLoss', 'feature', feature),
                        'relation': from_zero('GIDLoss', 'relation', relation)}
        self.size = whole('GIDLoss', 'size', size)
        self.assign = one_of('GIDLoss', 'assign', assign, ASSIGNMENTS)
        self.scale = positive('GIDLoss', 'scale', scale)
        if heads_at is not None and not isinstance(heads_at, str):
            raise ValueError(f"GIDLoss: heads_at={heads_at!r} must be the path of a head, such as 'bbox_head'")
        self.heads_at, self.needs_boxes = heads_at, heads_at is None
        self.count = whole('GIDLoss', 'count', count)
        self.iou = number('GIDLoss', 'iou', iou, 0, 1)
        self.levels = 0

    @torch.no_grad()
    def choose_instances(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> List[Tensor]:
        sizes = [[level.shape[:2] for level in view.logits] for view in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(f'GIDLoss: {student.name} and {teacher.name} have other priors; the heads must have the '
                             'same strides and the same number of anchors a cell')
        height, width = input_shape(batch)
        sides = []
        for view in (student, teacher):
            logits, boxes = torch.cat(view.logits, dim=1), torch.cat(view.boxes, dim=1)
            scores = logits.sigmoid() if view.sigmoid else logits.softmax(dim=-1)[..., :-1]
            corner = boxes.new_tensor([width, height, width, height])
            sides.append((scores, torch.minimum(boxes.clamp(min=0), corner)))
        (ours, our_boxes), (theirs, their_boxes) = sides
        return [select_instances(ours[image], theirs[image], our_boxes[image], their_boxes[image], self.count, self.iou)
                for image in range(len(ours))]

    def prepare(self, student: Features, teacher: Features) -> None:
        self.levels = len(teacher)

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The two terms of one level without their weights."""
        rows = instance_rows(batch, teacher)
        if self.assign == 'size':
            rows = rows_of_level(rows, level, self.levels, self.scale)
        ours, theirs = (pool_instances(apply_weights(side, mask), rows, input_shape(batch), self.size)
                        for side in (student, teacher))
        count = len(rows)
        feature = (ours - theirs).square().sum() / max(count * self.size**2, 1)
        relation = ours.sum() * 0
        if count >= 3:
            pairs = F.smooth_l1_loss(normalised_distances(ours.flatten(1)), normalised_distances(theirs.flatten(1)),
                                     reduction='sum')
            relation = pairs / (count**2 - count)
        return {'feature': feature, 'relation': relation}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, batch, mask)
