"""Rank mimicking: the order in which the teacher would pick among the candidates of one object."""

from typing import Any, Dict, List

import torch
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.ops.checks import one_of, positive
from kd_mm.ops.functional import nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView

SCORES = ('logit', 'probability')


def grouped_log_softmax(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Logarithm of the softmax of each value among those of its group.

    Args:
        values: (R,).
        groups: (R,), from 0.
        count: number of groups; some may be empty.

    Returns:
        (R,).

    Example:
        >>> grouped_log_softmax(torch.tensor([0., 0., 5.]), torch.tensor([2, 2, 0]), 3).exp()
        tensor([0.5000, 0.5000, 1.0000])
    """
    highest = values.new_full((count, ), float('-inf')).scatter_reduce(0, groups, values.detach(), 'amax')
    shifted = values - highest[groups]
    total = values.new_zeros(count).index_add(0, groups, shifted.exp())
    return shifted - total[groups].log()


@MODELS.register_module()
class RMLoss(HeadLoss):
    """Rank mimicking (Li et al., Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided
    Feature Imitation, AAAI 2022).

    Which of an object's candidates wins the non-maximum suppression is a matter of the order of their scores.  For
    every object ``j`` the scores of its positive priors (of all levels, for the object's class) become a distribution,
    ``q = softmax_i(s_i / tau)``, and the student learns the teacher's order:

    ``loss = tau^2 * mean over objects of sum_i q_t(i) * log(q_t(i) / q_s(i))``

    The positives are those of the host's assignment.  A re-implementation from the description: no code of the authors
    was found, and that the scores are logits is our choice (probabilities lie so close together that their softmax is
    nearly flat).

    Args:
        scores: 'logit' (default) or 'probability'.
        tau: temperature, above 0. Default 1 [ours].
        loss_weight: see :class:`KDLoss`. Default 4 [recalled].

    Inputs are two :class:`kd_mm.types.dense.DenseView`, the student's with the host's assignment.  In a config
    ``at='bbox_head'``: any dense head that tells the object of each positive (not FoveaBox).

    Returns:
        Reduction: all levels; mean over instances
        Objects of the batch.

    Raises:
        ValueError: an option is not among its choices, or the host's head does not tell which object a prior has.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.dense import Assignment
        >>> host = Assignment([torch.tensor([[1, 1, 3]])], [torch.ones(1, 3)], 3, [torch.tensor([[0, 0, -1]])])
        >>> view = DenseView([torch.randn(1, 3, 3)], assignment=host)
        >>> bool(build(dict(type='RMLoss'))(view, view) < 1e-6)
        True
    """

    joint = True

    def __init__(self, scores: str = 'logit', tau: float = 1.0, loss_weight: Any = 4.0):
        super().__init__(loss_weight)
        self.scores = one_of('RMLoss', 'scores', scores, SCORES)
        self.tau = positive('RMLoss', 'tau', tau)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        if student.assignment.objects is None:
            raise ValueError(f'RMLoss: {student.name} does not tell which object a positive prior belongs to')

    def terms(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> Dict[str, List[Tensor]]:
        host = student.assignment
        assert host is not None and host.objects is not None
        labels, objects = torch.cat(list(host.labels), dim=1), torch.cat(list(host.objects), dim=1)
        image, row = ((labels >= 0) & (labels < host.background)).nonzero(as_tuple=True)
        objects = objects[image, row]
        # A group for each object of each image; the counts need not be known, only an upper end.
        width = int(objects.max()) + 1 if len(objects) else 1
        groups, count = image * width + objects, labels.shape[0] * width
        own, theirs = (torch.cat(list(view.logits), dim=1)[image, row, labels[image, row]]
                       for view in (student, teacher))
        if self.scores == 'probability':
            own, theirs = own.sigmoid(), theirs.sigmoid()
        log_s = grouped_log_softmax(own / self.tau, groups, count)
        log_t = grouped_log_softmax(theirs / self.tau, groups, count)
        seen = torch.zeros(count, device=own.device, dtype=own.dtype).index_fill(0, groups, 1.0).sum()
        return {'': [self.tau**2 * (log_t.exp() * (log_t - log_s)).sum() / nonzero(seen)]}
