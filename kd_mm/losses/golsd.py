"""GO-LSD of D-FINE: box distributions of matched and of unmatched predictions, balanced by their numbers."""

from typing import Any, Dict, List

import torch
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.ld import distribution_divergence, enough_bins
from kd_mm.ops.boxes import intersection
from kd_mm.ops.checks import boolean, positive
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView
from kd_mm.types.targets import batch_boxes


def balanced_mean(values: Tensor, matched: Tensor, counted: Tensor) -> Tensor:
    """``(sqrt(P) * mean over matched + sqrt(U) * mean over unmatched) / (sqrt(P) + sqrt(U))``, a scalar.

    The few matched rows weigh more than in a plain mean, and less than in a mean of two means.

    Args:
        values: (...,).
        matched: (...,), the P rows.
        counted: (...,), false for rows that are in neither group; all others are the U rows.

    Returns:
        A scalar; 0 without any row.

    Example:
        >>> balanced_mean(torch.tensor([4., 1., 1., 1., 1.]), torch.tensor([1, 0, 0, 0, 0]).bool(),
        ...               torch.ones(5).bool()).item()
        2.0
    """
    total, weights = values.sum() * 0, values.new_zeros(())
    for group in (matched & counted, ~matched & counted):
        number = group.sum().to(values)
        total = total + number.sqrt() * (values * group).sum() / nonzero(number)
        weights = weights + number.sqrt()
    return total / nonzero(weights)


@MODELS.register_module()
class GOLSDLoss(HeadLoss):
    """GO-LSD (Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement, ICLR
    2025), its decoupled distillation focal loss.

    Each side of a box is a distribution over bins, and the student's learn the teacher's:

    ``loss = balanced mean over (prediction, side) of w * tau^2 * KL(p_t || p_s)``,
    ``balanced = (sqrt(P) mean over matched + sqrt(U) mean over unmatched) / (sqrt(P) + sqrt(U))``

    The weight ``w`` of a prediction, without gradient, is the IoU of the student's box with its object where it is
    matched with one, else the teacher's largest class probability: what the teacher sees and the ground truth does not
    count as well, by how sure it is.

    D-FINE distils its last decoder layer into the earlier ones, and calls matched what any layer has matched.  mmdet
    3.3 has no such head; what it has are dense heads with box distributions, and there the matched predictions are the
    positives of the host's assignment and the teacher is another model.  That use is ours, the formula the authors'.

    The published code sets the loss to 0 by hand for equal distributions (it is 0 anyway), and scales P and U by the
    batch size, which cancels out.

    Args:
        tau: temperature, above 0. Default 5 [C].
        standardise: mean and deviation of a side's logits are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: see :class:`KDLoss`. Default 1.5 [C].

    Inputs are two :class:`kd_mm.types.dense.DenseView` with ``distributions``, the student's with boxes and the host's
    assignment.  In a config ``at='bbox_head'``: two heads of the GFL family with the same strides, bins and classes.

    Returns:
        Reduction: all levels; mean over sides
        Rows of all levels are counted together, matched and unmatched ones apart.

    Raises:
        ValueError: a head has no distributions or one bin, or the bins differ.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.dense import Assignment
        >>> host = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], 3, [torch.tensor([[0, -1]])])
        >>> view = DenseView([torch.randn(1, 2, 3)], [torch.rand(1, 2, 4)], [torch.randn(1, 2, 4, 9)], assignment=host)
        >>> batch = KDBatch(boxes=[torch.tensor([[0., 0., 4., 4.]])], input_shape=(8, 8))
        >>> bool(build(dict(type='GOLSDLoss'))(view, view, batch) < 1e-5)
        True
    """

    joint = True
    needs_boxes = True

    def __init__(self, tau: float = 5.0, standardise: bool = False, loss_weight: Any = 1.5):
        super().__init__(loss_weight)
        self.tau = positive('GOLSDLoss', 'tau', tau)
        self.standardise = boolean('GOLSDLoss', 'standardise', standardise)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        self.sigmoid_only(teacher)
        for view in (student, teacher):
            if view.distributions is None:
                raise ValueError(f'GOLSDLoss: {view.name} predicts no box distributions; GFL and its relatives do')
        bins = [[level.shape[-1] for level in view.distributions] for view in (student, teacher)]
        if bins[0] != bins[1]:
            raise ValueError(f'GOLSDLoss: {bins[0]} bins of {student.name} and {bins[1]} of {teacher.name}: reg_max '
                             'must be the same')
        enough_bins('GOLSDLoss', min(bins[0]), self.standardise)
        self.same_bins(student, teacher)
        if student.assignment.objects is None:
            raise ValueError(f'GOLSDLoss: {student.name} does not tell which object a positive prior belongs to')

    @torch.no_grad()
    def weights(self, student: DenseView, teacher: DenseView, matched: Tensor, batch: KDBatch) -> Tensor:
        """IoU with its object for a matched prediction, the teacher's best score for another: (N, P)."""
        host = student.assignment
        assert host is not None and host.objects is not None
        score = torch.cat(list(teacher.logits), dim=1).sigmoid().amax(dim=-1)
        boxes, _, _ = batch_boxes(batch, 'input', score[..., None])
        if not boxes.shape[1]:
            return score
        objects = torch.cat(list(host.objects), dim=1).clamp(min=0)
        overlap, union = intersection(torch.cat(list(student.boxes), dim=1),
                                      boxes.gather(1, objects[..., None].expand(*objects.shape, 4)))
        return torch.where(matched, overlap / nonzero(union), score)

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        host = student.assignment
        assert host is not None and student.distributions is not None and teacher.distributions is not None
        matched = torch.cat([host.positive(level) for level in range(len(student))], dim=1)
        counted = torch.cat([weight > 0 for weight in host.weights], dim=1)
        own, theirs = torch.cat(student.distributions, dim=1), torch.cat(teacher.distributions, dim=1)
        sides = distribution_divergence(own, theirs, self.tau, standardise=self.standardise).mean(dim=-1)
        return {'': [balanced_mean(self.weights(student, teacher, matched, batch) * sides, matched, counted)]}
