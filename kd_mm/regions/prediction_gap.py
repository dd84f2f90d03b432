"""Regions where student and teacher disagree."""

from typing import Any

import torch

from kd_mm.ops.checks import texts
from kd_mm.ops.functional import lift, resize
from kd_mm.regions.base import RegionMask
from kd_mm.regions.teacher_score import check_logits
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


@MODELS.register_module()
class PredictionGapRegion(RegionMask):
    """Mean squared difference of the class scores in each cell, ``mean over A*K of (sigmoid(z_t) - sigmoid(z_s))^2``.

    Cells where the predictions agree have nothing to learn from the features (PFI).

    Args:
        logits_at: tap of the class logits of both sides, one (N, A*K, H, W) a level, such as
            ``'bbox_head.retina_cls'``; a dict with ``student`` and ``teacher`` where they differ.

    Returns:
        L tensors (N, 1, H, W) in 0..1, without gradient; resized where logits and features differ in size.

    Raises:
        ValueError: logits are missing, not as many levels as features, or of different shapes.

    Example:
        >>> ours, theirs = torch.zeros(1, 9, 2, 2), torch.full((1, 9, 2, 2), 99.0)
        >>> batch = KDBatch(student_logits=(ours, ), teacher_logits=(theirs, ))
        >>> PredictionGapRegion('bbox_head.retina_cls')((torch.zeros(1, 8, 2, 2), ), batch)[0].max()
        tensor(0.2500)
    """

    def __init__(self, logits_at: Any):
        super().__init__()
        if hasattr(logits_at, 'get'):
            if set(logits_at) != {'student', 'teacher'}:
                raise ValueError(f'PredictionGapRegion: logits_at={dict(logits_at)!r} must have the keys `student` and '
                                 '`teacher`')
            self.logits_at = dict(logits_at)
        else:
            self.logits_at = {'student': logits_at, 'teacher': logits_at}
        for side, value in self.logits_at.items():
            texts('PredictionGapRegion', f'logits_at[{side!r}]', value, "'bbox_head.retina_cls'")

    def forward(self, features: Features, batch: KDBatch) -> Features:
        check_logits('PredictionGapRegion', features, batch.given.student_logits, 'student')
        check_logits('PredictionGapRegion', features, batch.given.teacher_logits, 'teacher')
        masks = []
        with torch.no_grad():
            for level, (s, t) in enumerate(zip(batch.given.student_logits, batch.given.teacher_logits)):
                if s.shape != t.shape:
                    raise ValueError(f'PredictionGapRegion, level {level}: logits {tuple(s.shape)} of the student and '
                                     f'{tuple(t.shape)} of the teacher differ. Both need the same classes, anchors and '
                                     'strides')
                gap = (lift(t).sigmoid() - lift(s).sigmoid()).square().mean(dim=1, keepdim=True)
                masks.append(resize(gap, (features[level].shape[2], features[level].shape[3])))
        return tuple(masks)
