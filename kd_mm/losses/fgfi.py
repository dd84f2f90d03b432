"""Fine-grained feature imitation."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.functional import cell_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


@MODELS.register_module()
class FGFILoss(KDLoss):
    """Fine-grained feature imitation (Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation,
    CVPR 2019).

    ``sum(m * (F_s - F_t)^2) / (2 * sum(m))``, a sum over channels and a mean over the cells with anchors near an
    object: give ``region=dict(type='FineGrainedRegion', strides=..., scales=..., ratios=...)``.  The published adapter
    is ``ConvAdapter(kernel_size=3, relu=True, always=True)``: its ReLU suits a tap after a ReLU, not an FPN.

    As published, but that an image without boxes adds 0 (the original divides by 0) and that several images and levels
    are possible: the mean of a level is over the batch.  The authors' code leaves the loss out for the first 400
    iterations: ``loss_weight=dict(type='WindowSchedule', ...)``.  DeFeat's code of the method also divides by the
    number of channels and has the weight 3.

    Args:
        loss_weight: see :class:`KDLoss`. Default 0.01 [C].

    Without a region every cell counts; any region may take the place of the anchors.

    Returns:
        Reduction: per level; mean over cells
        Half of it, a sum over channels in each cell; summed over levels.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='FGFILoss', loss_weight=1.0))(torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))
        tensor(2.)
    """

    takes = (4, )

    def __init__(self, loss_weight: Any = 0.01):
        super().__init__(loss_weight)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        return cell_mean((student - teacher).square(), mask) / 2
