"""Mimicking the pooled features of instances."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.instances import instance_rows, pool_instances, rows_of_level
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of, positive, whole
from kd_mm.ops.functional import apply_weights
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import input_shape

ASSIGNMENTS = ('all', 'size')


@MODELS.register_module()
class MimicLoss(KDLoss):
    """Mimicking of pooled features (Li et al., Mimicking Very Efficient Network for Object Detection, CVPR 2017).

    ``1 / (2 M) * sum_i (1 / m_i) ||u_i - v_i||^2`` over M boxes, ``u_i`` and ``v_i`` the teacher's and the (adapted)
    student's features of box i, pooled to one grid of ``m_i`` numbers: half of the mean squared difference.

    Re-implementation from the description: the paper pools at the proposals of the RPN by spatial pyramid pooling; here
    the boxes are ``batch.given.instances`` if something fills them in, else the ground truth; the pooling is RoIAlign.

    Args:
        size: edge of the pooled grid, above 0. Default 7 (RoIAlign's usual one).
        assign: 'all' (default: every level is pooled at every box) or 'size' (each box on one level by its size).
        scale: for ``assign='size'``: boxes of up to twice this edge are on the first level. Default 56, for P2; 112 for
            a pyramid that starts at P3.
        loss_weight: see :class:`KDLoss`. Default 1 (no published weight is known to us).

    A region weights both maps before they are pooled.

    Returns:
        Reduction: per level; mean over elements
        Half of it, over the pooled features; 0 without boxes; summed over levels.

    Raises:
        ValueError: an option is out of range, or the data has no boxes.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8., 8., 24., 24.]])])
        >>> build(dict(type='MimicLoss'))(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), batch).item()
        0.5
    """

    takes = (4, )
    needs_boxes = True

    def __init__(self, size: int = 7, assign: str = 'all', scale: float = 56.0, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.size = whole('MimicLoss', 'size', size)
        self.assign = one_of('MimicLoss', 'assign', assign, ASSIGNMENTS)
        self.scale = positive('MimicLoss', 'scale', scale)
        self.levels = 0

    def prepare(self, student: Features, teacher: Features) -> None:
        self.levels = len(teacher)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        rows = instance_rows(batch, teacher)
        if self.assign == 'size':
            rows = rows_of_level(rows, level, self.levels, self.scale)
        # Pooling is linear: the difference is pooled once.
        gap = pool_instances(apply_weights(student - teacher, mask), rows, input_shape(batch), self.size)
        return gap.square().sum() / (2 * max(gap.numel(), 1))
