"""Inter-class distance distillation."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of, whole
from kd_mm.ops.functional import class_centres, nonzero
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch
from kd_mm.types.targets import class_members

SCALES = ('none', 'mean')


def centre_distances(features: Tensor, members: Tensor) -> Tuple[Tensor, Tensor]:
    """Distances between the mean features of the classes of an image.

    Args:
        features: (N, C, H, W).
        members: (N, H*W, K), see :func:`kd_mm.types.targets.class_members`.

    Returns:
        (N, K, K), and 1 for each pair k < l of classes that are both there, 0 elsewhere, (N, K, K).

    Example:
        >>> features = torch.tensor([0., 3., 5.]).view(1, 1, 1, 3)
        >>> distances, pairs = centre_distances(features, torch.tensor([[[1., 0.], [1., 0.], [0., 1.]]]))
        >>> distances[0, 0, 1].item(), pairs[0].tolist()
        (3.5, [[0.0, 1.0], [0.0, 0.0]])
    """
    centres, counts = class_centres(features.flatten(2), members)
    centres = centres.transpose(1, 2)
    # Not by products, whose rounding would be the distance of near classes.
    distances = torch.cdist(centres, centres, compute_mode='donot_use_mm_for_euclid_dist')
    there = (counts > 0).to(distances.dtype)
    return distances, (there[:, :, None] * there[:, None, :]).triu(1)


@MODELS.register_module()
class IDDLoss(KDLoss):
    """Inter-class distance (Zhang et al., Distilling Inter-Class Distance for Semantic Segmentation, IJCAI 2022).

    ``mean over images and pairs of classes of (d_s - d_t)^2``, ``d`` the Euclidean distance between the mean features
    of two classes that are both in the image.  Labels are brought to the size of the map (nearest); channels need not
    agree, and the student's centres carry gradient.

    A re-implementation from the description; no code was seen, and no weight is known to us.  The paper's second part,
    which distils the position information of a feature, is not here: its formula is not known to us.

    Args:
        scale: 'none' (default: distances as they are, so the student has to take the teacher's scale) or 'mean'
            (divided by the mean distance in the image, which leaves nothing to compare where there are two classes).
        num_classes: labels from this number on count as ignored. Default None: as many as there are, which waits for
            the device once a step.
        loss_weight: see :class:`KDLoss`. Default 1; not tuned.

    A region weights the cells in the centres.

    Returns:
        Reduction: per level; mean over pairs
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, or the data has no segmentation map.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.randint(0, 5, (2, 32, 32)))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> build(dict(type='IDDLoss'))(x, x, batch).item() < 1e-6
        True
    """

    takes = (4, )
    same_channels = False
    needs_seg_map = True

    def __init__(self, scale: str = 'none', num_classes: Optional[int] = None, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.scale = one_of('IDDLoss', 'scale', scale, SCALES)
        self.num_classes = None if num_classes is None else whole('IDDLoss', 'num_classes', num_classes)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        members = class_members(batch, student, self.num_classes, mask)
        sides = []
        for tensor in (student, teacher):
            distances, pairs = centre_distances(tensor, members)
            if self.scale == 'mean':
                mean = (distances * pairs).sum(dim=(1, 2)) / nonzero(pairs.sum(dim=(1, 2)))
                distances = distances / nonzero(mean)[:, None, None]
            sides.append(distances)
        return ((sides[0] - sides[1]).square() * pairs).sum() / nonzero(pairs.sum())
