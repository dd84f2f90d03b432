"""Bilinear resize of one side to the other."""

from typing import Tuple

from kd_mm.adapters.base import Adapter, check_maps
from kd_mm.ops.checks import boolean, one_of
from kd_mm.ops.functional import lift, resize
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features

SIDES = ('student', 'teacher')


@MODELS.register_module()
class ResizeAdapter(Adapter):
    """Resizes one side to the height and width of the other, level by level; equal sizes are left alone.

    Args:
        side: the side that is resized. Default 'student'.
        align_corners: as in ``torch.nn.functional.interpolate``; mmseg's heads have False. Default False.

    Raises:
        ValueError: ``side`` is not among its choices, or inputs that are no maps.

    Example:
        >>> import torch
        >>> student, teacher = ResizeAdapter()((torch.zeros(1, 4, 8, 8), ), (torch.zeros(1, 4, 16, 12), ))
        >>> student[0].shape
        torch.Size([1, 4, 16, 12])
    """

    def __init__(self, side: str = 'student', align_corners: bool = False):
        super().__init__()
        self.side = one_of('ResizeAdapter', 'side', side, SIDES)
        self.align_corners = boolean('ResizeAdapter', 'align_corners', align_corners)

    def prepare(self, student: Features, teacher: Features) -> None:
        check_maps('ResizeAdapter', student, teacher)

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        check_maps('ResizeAdapter', student, teacher)
        moving, fixed = (student, teacher) if self.side == 'student' else (teacher, student)
        moved = tuple(m if m.shape[2:] == f.shape[2:] else
                      resize(lift(m), (f.shape[2], f.shape[3]), self.align_corners) for m, f in zip(moving, fixed))
        return (moved, teacher) if self.side == 'student' else (student, moved)
