"""Intra-class feature variation distillation."""

from typing import Any, Optional

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops.checks import boolean, one_of, whole
from kd_mm.ops.functional import class_centres, nonzero, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import class_members

CENTRES = ('image', 'batch')


def class_similarity(features: Tensor, members: Tensor, centres: str = 'image') -> Tensor:
    """Cosine of each cell with the centre of its own class.

    Neither a loop over classes nor a map of centres: the cells meet the K centres in one product of matrices.

    Args:
        features: (N, C, H, W).
        members: (N, H*W, K), the weight of a cell in its class, all 0 for a cell without.
        centres: 'image' (of the cells of the same image) or 'batch' (of all images).

    Returns:
        (N, H*W); 1 for a cell without class, as if it were its own centre.

    Example:
        >>> features = torch.tensor([[1., 0.], [0., 1.]]).view(1, 2, 1, 2)
        >>> class_similarity(features, torch.ones(1, 2, 1))
        tensor([[0.7071, 0.7071]])
    """
    flat = features.flatten(2)
    if centres == 'batch':
        # Images in a row are one image.
        middle, _ = class_centres(flat.transpose(0, 1).flatten(1)[None], members.flatten(0, 1)[None])
        middle = middle.expand(flat.shape[0], -1, -1)
    else:
        middle, _ = class_centres(flat, members)
    own = (members > 0).to(flat.dtype)
    dots = (flat.transpose(1, 2) @ middle * own).sum(dim=2)
    lengths = (safe_sqrt(middle.square().sum(dim=1))[:, None] * own).sum(dim=2)
    cosine = dots / nonzero(lengths * safe_sqrt(flat.square().sum(dim=1)))
    return torch.where(own.sum(dim=2) > 0, cosine, torch.ones_like(cosine))


@MODELS.register_module()
class IFVDLoss(KDLoss):
    """Intra-class feature variation (Wang et al., Intra-class Feature Variation Distillation for Semantic
    Segmentation, ECCV 2020).

    ``mean over cells of (sim_s - sim_t)^2``, ``sim`` the cosine of a cell's feature with the mean feature of its class
    in the same image.  Labels are brought to the size of the map (nearest), channels need not agree, and the student's
    centres carry gradient.

    As published (the authors and CIRKD agree): cells without a label count in the mean, where they add 0.  Their share
    is then a random factor on the loss; ``count_ignored=True`` does so.  A class of a single cell adds 0 and counts.

    Args:
        centres: 'image' (default [C]) or 'batch' (one centre for the class in all images of the local batch).
        count_ignored: whether cells without a label count in the mean. Default False.
        num_classes: labels from this number on count as ignored. Default None: as many as there are, which waits for
            the device once a step.
        loss_weight: see :class:`KDLoss`. Default 200 [C: authors]; CIRKD uses 20 [C].

    A region weights the cells, in the centres and in the mean.

    Returns:
        Reduction: per level; mean over cells
        0 to 4; summed over levels.

    Raises:
        ValueError: an option has a bad value, the student has one channel only, or the data has no segmentation map.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.randint(0, 5, (2, 32, 32)))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> build(dict(type='IFVDLoss'))(x, x, batch).item() < 1e-6
        True
    """

    takes = (4, )
    same_channels = False
    needs_seg_map = True

    def __init__(self, centres: str = 'image', count_ignored: bool = False, num_classes: Optional[int] = None,
                 loss_weight: Any = 200.0):
        super().__init__(loss_weight)
        self.centres = one_of('IFVDLoss', 'centres', centres, CENTRES)
        self.count_ignored = boolean('IFVDLoss', 'count_ignored', count_ignored)
        self.num_classes = None if num_classes is None else whole('IFVDLoss', 'num_classes', num_classes)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_channels('IFVDLoss', student, 2,
                       'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        members = class_members(batch, student, self.num_classes, mask)
        gap = (class_similarity(student, members, self.centres)
               - class_similarity(teacher, members, self.centres)).square()
        if self.count_ignored:
            weights = torch.ones_like(gap) if mask is None else mask.to(gap.dtype).flatten(1)
        else:
            weights = members.sum(dim=2)
        return (gap * weights).sum() / nonzero(weights.sum())
