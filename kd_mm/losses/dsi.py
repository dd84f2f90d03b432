"""Deep Semantic Injector: the direction of each cell's feature, taught by a foundation model."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean
from kd_mm.ops.functional import resize, unit_vectors, weighted_mean
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


def cell_cosine_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos`` of the channels of each cell, (N, 1, H, W), from 0 to 2; 1 where a side is 0.

    Example:
        >>> import torch
        >>> cell_cosine_gap(torch.tensor([3., 0.]).view(1, 2, 1, 1), torch.tensor([0., 1.]).view(1, 2, 1, 1)).item()
        1.0
    """
    return 1 - (unit_vectors(student) * unit_vectors(teacher)).sum(dim=1, keepdim=True)


@MODELS.register_module()
class DSILoss(KDLoss):
    """DSI (Liao et al., RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models,
    arXiv 2510.25257), the cosine of every cell.

    ``mean over cells of (1 - <x, t> / (|x| |t|))``: only the direction of a cell's feature counts, so that a foundation
    model of any scale can teach.  ``x`` is the student's cell after a linear layer.

    As published: ``adapter=dict(type='ConvAdapter', always=True)`` (a linear layer with bias is a 1x1 convolution) on
    the stride-32 map after the transformer encoder, the patch tokens of DINOv3 as teacher, resized to the student's
    size before the cosine.  The weight changes once an epoch by the share of the gradient that reaches the encoder:
    ``loss_weight=dict(type='GradientShareSchedule', ...)``, see
    :class:`kd_mm.ops.modulation.GradientShareSchedule`.

    Args:
        resize_student: where the sizes differ, resize the student to the teacher (bilinear); otherwise the teacher to
            the student. Default False [C].
        loss_weight: see :class:`KDLoss`. Default 5 [C: models S and M at the start; 15 for L, 20 for X].

    A region weights the cells.

    Returns:
        Reduction: per level; mean over cells
        0 to 2; summed over levels.

    Raises:
        ValueError: an option has a bad value.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='DSILoss'))(3 * x, x) < 1e-5)
        True
    """

    takes = (2, 4)
    same_size = False

    def __init__(self, resize_student: bool = False, loss_weight: Any = 5.0):
        super().__init__(loss_weight)
        self.resize_student = boolean('DSILoss', 'resize_student', resize_student)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        for level, tensor in enumerate(student):
            if tensor.shape[1] < 2:
                raise ValueError(f'DSILoss, level {level}: {tuple(tensor.shape)} has one channel, whose direction is '
                                 'its sign. Use FitNetLoss or CWDLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if student.dim() == 2:
            return cell_cosine_gap(student, teacher).mean()
        if self.resize_student:
            student = resize(student, (teacher.shape[2], teacher.shape[3]))
        else:
            teacher = resize(teacher, (student.shape[2], student.shape[3]))
        if mask is not None:
            mask = resize(mask, (student.shape[2], student.shape[3]))
        return weighted_mean(cell_cosine_gap(student, teacher), mask)
