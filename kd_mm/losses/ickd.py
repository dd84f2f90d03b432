"""Inter-channel correlation distillation."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops.checks import whole
from kd_mm.ops.functional import channel_affinity, resize
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def into_patches(features: Tensor, patches: int) -> Tensor:
    """A map cut into ``patches`` x ``patches`` pieces, which become images; what is missing at the border is zeros.

    Args:
        features: (N, C, H, W).
        patches: pieces along each edge.

    Returns:
        (N * patches^2, C, h, w), the pieces of an image one after the other.

    Example:
        >>> import torch
        >>> into_patches(torch.arange(4.).view(1, 1, 2, 2), 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    if patches == 1:
        return features
    count, channels, height, width = features.shape
    # Zeros add nothing to a product of channels.
    features = F.pad(features, (0, -width % patches, 0, -height % patches))
    height, width = features.shape[2] // patches, features.shape[3] // patches
    features = features.view(count, channels, patches, height, patches, width)
    return features.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height, width)


@MODELS.register_module()
class ICKDLoss(KDLoss):
    """Inter-channel correlation (Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation, ICCV 2021).

    ``(1 / (N C)) * sum over images and channels of |G_s[c] - G_t[c]|^2``: ``G[c]`` holds the products of channel c with
    all channels, summed over the cells, brought to length 1.  It says which channels go together, not where.

    As published (classification code): the student always passes a 1x1 convolution without bias and a batch norm,
    ``adapter=dict(type='ConvAdapter', bias=False, norm=True, always=True)``.  The paper's variant for segmentation cuts
    the map into patches; no code of it is public, ``patches`` is a re-implementation from the description.

    Args:
        patches: pieces along each edge that the map is cut into; the mean is over the pieces. Default 1 [C].
        loss_weight: see :class:`KDLoss`. Default 1.

    Sizes may differ where ``patches`` is 1.  A region weights the cells, and the mean is over the pieces that have any.

    Returns:
        Reduction: per level; mean over channels
        Of every piece, 0 to 4; summed over levels.

    Raises:
        ValueError: ``patches`` is no whole number from 1, or there is one channel only.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='ICKDLoss'))(3 * x, x) < 1e-9)
        True
    """

    takes = (4, )
    same_size = False

    def __init__(self, patches: int = 1, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.patches = whole('ICKDLoss', 'patches', patches)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_channels('ICKDLoss', student, 2,
                       'one channel has no other to be correlated with. Use CWDLoss or FitNetLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        sides, filled = [], None
        for tensor in (student, teacher):
            own = None
            if mask is not None:
                own = into_patches(resize(mask.to(tensor.dtype), (tensor.shape[2], tensor.shape[3])), self.patches)
                some = (own > 0).flatten(1).any(dim=1)
                filled = some if filled is None else filled & some
            sides.append(channel_affinity(into_patches(tensor, self.patches), own))
        gap = (sides[0] - sides[1]).square().sum(dim=(1, 2))
        pieces = gap.new_tensor(float(max(len(gap), 1))) if filled is None else filled.sum().clamp(min=1)
        return gap.sum() / (pieces * student.shape[1])
