"""Region masks: where on the feature map to imitate."""

from typing import Any, Dict, Tuple

from torch import Tensor, nn

from kd_mm.ops.problems import named
from kd_mm.types.batch import Features, KDBatch


class RegionMask(nn.Module):
    """Weights per cell for each level: L tensors (N, 1, H, W), float32 or wider, not negative.

    A region made of objects is all zero for an image without any; its complement is then all one.  Losses turn a mean
    into a weighted mean and multiply the terms of a sum, so an empty region gives 0.

    Class attributes:
        needs_boxes, needs_seg_map: the targets the region is made of.

    Attributes:
        logits_at: for a region made of predictions, the tap paths of its own: ``'student'`` and ``'teacher'``, those of
            the two that it needs. Their outputs arrive as ``student_logits`` and ``teacher_logits`` of
            ``batch.given``, with the same ``levels`` as the features. Empty for all others.
    """

    needs_boxes = False
    #: Whether it reads the data's instance masks.
    needs_masks = False
    needs_seg_map = False
    logits_at: Dict[str, Any] = {}

    def forward(self, features: Features, batch: KDBatch) -> Features:
        """Weights for ``features``, which only give sizes, device and dtype."""
        raise NotImplementedError


def weights_of(region: nn.Module, features: Features, batch: KDBatch) -> Features:
    """What a region gives for ``features``, looked at: the region may be a class of the user's.

    Raises:
        ValueError: it fails, or does not give one map of weights for each level.
    """
    name = type(region).__name__
    with named(name, 'Its forward(features, batch) is given L tensors (N, C, H, W) and returns L tensors (N, 1, H, W)'):
        masks = region(features, batch)
    wanted: Tuple[Tuple[int, ...], ...] = tuple((len(level), 1, *level.shape[2:]) for level in features)
    given = tuple(tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__ for mask in masks) \
        if isinstance(masks, (list, tuple)) else type(masks).__name__
    if given != wanted:
        raise ValueError(f'{name} returned {given}; a region returns a tuple of weights (N, 1, H, W), one for each '
                         f'level: {wanted}')
    return tuple(masks)
