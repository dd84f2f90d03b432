"""Feature richness: hints weighted by the teacher's scores."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.functional import cell_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


@MODELS.register_module()
class FRSLoss(KDLoss):
    """Feature richness (Du et al., Distilling Object Detectors with Feature Richness, NeurIPS 2021), feature term.

    ``sum(m * (F_s - F_t)^2) / sum(m)``, a sum over channels and a weighted mean over cells, with ``m`` the teacher's
    highest class score in a cell: give ``region=dict(type='TeacherScoreRegion', logits_at=...)``.  The class term is
    ``SigmoidKDLoss(reduction='teacher_score', divergence='cross_entropy')`` on the logits, the adapter
    ``ConvAdapter(kernel_size=3, always=True)`` [C].

    Args:
        loss_weight: see :class:`KDLoss`. Default 0.005 [C: RetinaNet]; 0.002 Faster R-CNN, 0.01 FCOS, 0.1 GFL [C]. The
            authors' code grows it linearly over the first 500 iterations: ``dict(type='LinearWarmup', ...)``.

    Without a region every cell counts the same; any region may take the place of the teacher's scores.

    Returns:
        Reduction: per level; mean over cells
        A sum over channels in each cell; summed over levels.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='FRSLoss', loss_weight=1.0))(torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))
        tensor(4.)
    """

    takes = (4, )

    def __init__(self, loss_weight: Any = 0.005):
        super().__init__(loss_weight)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        return cell_mean((student - teacher).square(), mask)
