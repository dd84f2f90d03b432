"""Neuron selectivity transfer."""

from typing import Any, Optional

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import from_zero, whole
from kd_mm.ops.functional import safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


def selectivity(features: Tensor, mask: Optional[Tensor] = None, eps: float = 1e-12) -> Tensor:
    """Each channel's map as a unit vector over the cells: (N, C, H*W).

    With a mask the vectors are multiplied by its square root, so that it weights the products of two of them.

    Example:
        >>> selectivity(torch.tensor([3., 4.]).view(1, 1, 1, 2)).flatten()
        tensor([0.6000, 0.8000])
    """
    maps = features.flatten(2)
    if mask is not None:
        maps = maps * mask.to(features.dtype).sqrt().flatten(2)
    return maps / safe_sqrt(maps.square().sum(dim=2, keepdim=True)).clamp(min=eps)


def kernel_mean(first: Tensor, second: Tensor, degree: int, offset: float) -> Tensor:
    """Mean over all pairs of channels of ``(a . b + offset)^degree``, one number an image.

    Args:
        first: (N, C, D).
        second: (N, C', D).
        degree: a whole number from 1.
        offset: added to the product.

    Example:
        >>> x = torch.eye(2)[None]
        >>> kernel_mean(x, x, 2, 0.0)
        tensor([0.5000])
    """
    return (torch.bmm(first, second.transpose(1, 2)) + offset).pow(degree).mean(dim=(1, 2))


@MODELS.register_module()
class NSTLoss(KDLoss):
    """Neuron selectivity transfer (Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity
    Transfer, 2017).

    The maximum mean discrepancy between the channels of teacher and student, each channel the unit vector of where it
    is active::

        mean k(t, t') + mean k(s, s') - 2 mean k(s, t)      k(a, b) = (a . b + offset)^degree

    means over images and pairs of channels.  Neither the number of channels nor their order matters.

    As published: mdistiller, with the defaults.  The paper's kernels are these with degree 1 and 2 and a Gaussian,
    which is not here.

    Memory: the products are between channels, so it grows with N * C^2; nothing of the size of cells times cells is
    held (degree 2 could also be written so), nor C^2 * H * W, which mdistiller's broadcast holds.

    Args:
        degree: of the polynomial kernel, from 1. Default 2 [C, P].
        offset: not negative. Default 0 [C, P].
        loss_weight: see :class:`KDLoss`. Default 50 [C: mdistiller, classification].

    Where the sizes differ, the larger map is averaged down to the smaller one, of either side [C: mdistiller, which
    looks at the height alone; here height and width are matched each].

    A region weights the cells in every product; images where it is empty are left out of the mean.

    Returns:
        Reduction: per level; mean over pairs
        Summed over levels.

    Raises:
        ValueError: ``degree`` is no whole number from 1, or ``offset`` is negative.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 6, 8, 8)
        >>> bool(build(dict(type='NSTLoss'))(x[:, torch.randperm(6)], x).abs() < 1e-4)
        True
    """

    takes = (4, )
    same_channels = False
    same_size = False
    pools_to = 'smaller'

    def __init__(self, degree: int = 2, offset: float = 0.0, loss_weight: Any = 50.0):
        super().__init__(loss_weight)
        self.degree = whole('NSTLoss', 'degree', degree)
        self.offset = from_zero('NSTLoss', 'offset', offset)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        s, t = selectivity(student, mask), selectivity(teacher, mask)
        images = [kernel_mean(*pair, self.degree, self.offset) for pair in ((t, t), (s, s), (s, t))]
        gaps = images[0] + images[1] - 2 * images[2]  # 0 for an image of an empty region, whose vectors are all 0
        if mask is None:
            return gaps.sum() / max(student.shape[0], 1)
        return gaps.sum() / (mask > 0).flatten(1).any(dim=1).sum().clamp(min=1)
