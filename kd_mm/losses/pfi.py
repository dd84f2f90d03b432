"""Prediction-guided feature imitation."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.functional import apply_weights
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


@MODELS.register_module()
class PFILoss(KDLoss):
    """Prediction-guided feature imitation (Li et al., Knowledge Distillation for Object Detection via Rank Mimicking
    and Prediction-guided Feature Imitation, AAAI 2022).

    ``mean over cells of P * mean_c (F_s - F_t)^2`` with ``P`` the squared gap of the class scores in a cell: give
    ``region=dict(type='PredictionGapRegion', logits_at=...)``.  The divisor is the number of all cells: the loss fades
    as the predictions come to agree.

    Re-implementation from the description: no code of the authors was found and the weight is unchecked.

    Args:
        loss_weight: see :class:`KDLoss`. Default 1.5 [recalled].

    Without a region it is the mean squared difference; any region may take the place of the gap.

    Returns:
        Reduction: per level; mean over elements
        Summed over levels.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='PFILoss', loss_weight=1.0))(torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))
        tensor(1.)
    """

    takes = (4, )

    def __init__(self, loss_weight: Any = 1.5):
        super().__init__(loss_weight)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        return apply_weights((student - teacher).square(), mask).sum() / max(student.numel(), 1)
