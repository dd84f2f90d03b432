"""Regions made of the teacher's class scores."""

from typing import Any

import torch

from kd_mm.ops.checks import texts
from kd_mm.ops.functional import lift, resize
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


@MODELS.register_module()
class TeacherScoreRegion(RegionMask):
    """The teacher's highest class score in each cell, ``max over A*K of sigmoid(z_t)``: the feature richness of FRS.

    It needs no boxes, finds objects outside of the labelled ones too, and leaves out cells inside a box that the
    teacher takes for background.

    Args:
        logits_at: tap of the teacher's class logits, one (N, A*K, H, W) a level, such as ``'bbox_head.retina_cls'``;
            the objectness ``'rpn_head.rpn_cls'`` for a two-stage detector. They must have a sigmoid.

    Returns:
        L tensors (N, 1, H, W) in 0..1, without gradient; resized where logits and features differ in size.

    Raises:
        ValueError: the logits are missing, or not as many levels as features.

    Example:
        >>> batch = KDBatch(teacher_logits=(torch.zeros(1, 9, 2, 2), ))
        >>> TeacherScoreRegion('bbox_head.retina_cls')((torch.zeros(1, 8, 2, 2), ), batch)[0].max()
        tensor(0.5000)
    """

    def __init__(self, logits_at: Any):
        super().__init__()
        self.logits_at = {'teacher': texts('TeacherScoreRegion', 'logits_at', logits_at, "'bbox_head.retina_cls'")}

    def forward(self, features: Features, batch: KDBatch) -> Features:
        check_logits('TeacherScoreRegion', features, batch.given.teacher_logits, 'teacher')
        with torch.no_grad():
            return tuple(
                resize(lift(logits).sigmoid().amax(dim=1, keepdim=True), (tensor.shape[2], tensor.shape[3]))
                for logits, tensor in zip(batch.given.teacher_logits, features))


def check_logits(name: str, features: Features, logits: Features, side: str) -> None:
    """Raise a ValueError unless there is one map of logits for every level of features."""
    if len(logits) != len(features) or any(level.dim() != 4 for level in logits):
        found = ', '.join(str(tuple(level.shape)) for level in logits) or 'none'
        raise ValueError(f"{name}: {len(features)} feature levels need as many maps of the {side}'s class logits, got "
                         f'{found}. Set `logits_at` to the module that returns them, one call or item a level (in '
                         f'plain-tensor use: KDBatch({side}_logits=...))')
