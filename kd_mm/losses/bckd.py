"""Bridging cross-task protocol inconsistency: class scores as independent yes-or-no tasks, boxes by IoU."""

from typing import Any, Dict, List

from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.ops.boxes import giou_loss
from kd_mm.ops.checks import factors
from kd_mm.ops.divergences import quality_focal, sigmoid_divergence_sum
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView


@MODELS.register_module()
class BCKDLoss(HeadLoss):
    """BCKD (Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, ICCV
    2023).

    Dense heads decide each class by a sigmoid of its own, so the scores are distilled as that many binary tasks, and
    the boxes by the IoU of what student and teacher decode at the same prior:

    ``loss_l = (1 / P) * sum over priors of m * (w_c * sum over classes |d|^beta * BCE(z_s, sigma(z_t))
    + w_b * max over classes |d| * (1 - GIoU(b_s, b_t)))``,  ``d = sigma(z_t) - sigma(z_s)``

    with the number of positives ``P`` of the host's assignment (mean over the ranks) and its label weight ``m``, 0
    where a prior is ignored.  The factor of the boxes has no gradient, the one of the classes has [C].

    The published code leaves a level out of both terms when it has no positive, although neither term needs any; here
    every level counts (the golden vector has positives everywhere).

    Args:
        class_weight: ``w_c``, from 0. Default 1 [C].
        box_weight: ``w_b``, from 0. Default 4 [C].
        beta: exponent of the class factor, 0 or at least 1. Default 1 [C].
        divergence: 'cross_entropy' (default [C]; its value at equality is not 0 but its gradient is, for the factor
            ``|d|`` is) or 'kl' (less the teacher's entropy).
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    Inputs are two :class:`kd_mm.types.dense.DenseView`, the student's with the host's assignment.  In a config
    ``at='bbox_head'``: any dense head with sigmoid classes and boxes, the same priors and classes in both models.

    Returns:
        Reduction: per level; sum over priors; divided by positives
        Parts: class, box
        Summed over levels.

    Raises:
        ValueError: an option is out of range, or a head does not fit.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.dense import Assignment, DenseView
        >>> host = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], background=3)
        >>> view = DenseView([torch.randn(1, 2, 3)], boxes=[torch.tensor([[[0., 0., 4., 4.]] * 2])], assignment=host)
        >>> abs(build(dict(type='BCKDLoss'))(view, view).item()) < 1e-5
        True
    """

    def __init__(self, class_weight: float = 1.0, box_weight: float = 4.0, beta: float = 1.0,
                 divergence: str = 'cross_entropy', loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = dict(zip(('class', 'box'), factors(
            'BCKDLoss', class_weight=class_weight, box_weight=box_weight)))
        self.beta, self.divergence = quality_focal('BCKDLoss', beta, divergence)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        self.sigmoid_only(student)
        if self.factors['box']:
            student.boxes, teacher.boxes  # noqa: B018  (raises where they are not known)

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        assert student.assignment is not None
        positives, result = student.assignment.num_pos, {}
        pairs = list(zip(student.logits, teacher.logits, student.assignment.weights))
        if self.factors['class']:
            result['class'] = [
                sigmoid_divergence_sum(
                    own.flatten(0, 1), theirs.flatten(0, 1), weight.flatten()[:, None], beta=self.beta,
                    divergence=self.divergence) / positives for own, theirs, weight in pairs]
        if self.factors['box']:
            result['box'] = []
            for (own, theirs, weight), box, other in zip(pairs, student.boxes, teacher.boxes):
                gap = (theirs.sigmoid() - own.detach().sigmoid()).abs().amax(dim=-1)
                result['box'].append((giou_loss(box, other) * gap * weight).sum() / positives)
        return result
