"""Augmentation-free dense contrastive distillation."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.mgd import generation_loss
from kd_mm.ops.checks import boolean, from_zero, number, pair, positive, whole
from kd_mm.ops.functional import parameter_options
from kd_mm.ops.sampling import keep_mask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def split_patches(features: Tensor, patch: Tuple[int, int], groups: int) -> Tensor:
    """(N, C, H, W) to (N * patches, cells of a patch * groups, C / groups), cells before groups.

    H and W are multiples of the patch, C of the groups.
    """
    count, channels, height, width = features.shape
    rows, columns = height // patch[0], width // patch[1]
    parts = features.view(count, groups, channels // groups, rows, patch[0], columns, patch[1])
    parts = parts.permute(0, 3, 5, 4, 6, 1, 2)
    return parts.reshape(count * rows * columns, patch[0] * patch[1] * groups, channels // groups)


def omni_contrast(student: Tensor, teacher: Tensor, tau: float = 0.07, groups: int = 16, pool: int = 4,
                  patch: Tuple[int, int] = (4, 4), mask: Optional[Tensor] = None) -> Tensor:
    """Contrast of the parts of a feature, inside small patches.

    Both maps are max-pooled and cut into patches, the channels into ``groups``.  A vector is one group at one cell.
    With the similarity ``-|s - t|_1 / tau``, each student vector shall be nearest to the teacher's at its own cell and
    group, against all teacher vectors of its patch in *other* groups (those of its own group at other cells are
    neither positive nor negative): cross-entropy, summed, over the images and the pooled cells.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        tau: temperature, above 0.
        groups: divides C.
        pool: kernel and stride of the max-pooling.
        patch: height and width of a patch, in pooled cells. The map is filled up at the right and the bottom with
            cells that count nowhere.
        mask: weights of the cells (N, 1, H, W), max-pooled too; a cell of weight 0 counts nowhere.

    Returns:
        A scalar.

    Example:
        >>> x = torch.randn(1, 4, 8, 8)
        >>> omni_contrast(x, x, groups=2, pool=2, patch=(2, 2)) < omni_contrast(x, -x, groups=2, pool=2, patch=(2, 2))
        tensor(True)
    """
    student, teacher = (F.max_pool2d(part, pool, pool, ceil_mode=True) for part in (student, teacher))
    weights = torch.ones_like(student[:, :1]) if mask is None else F.max_pool2d(mask.to(student.dtype), pool, pool,
                                                                              ceil_mode=True)
    count, _, height, width = student.shape
    missing = (0, -width % patch[1], 0, -height % patch[0])
    student, teacher, weights = (F.pad(part, missing) for part in (student, teacher, weights))
    rows_s, rows_t = split_patches(student, patch, groups), split_patches(teacher, patch, groups)
    weight = split_patches(weights, patch, 1).expand(-1, -1, groups).reshape(len(rows_s), -1)
    similarity = -torch.cdist(rows_s, rows_t, p=1) / tau
    size = rows_s.shape[1]
    place = torch.arange(size, device=student.device)
    own = place[:, None] == place
    other_group = place[:, None] % groups != place % groups
    allowed = own | (other_group & (weight > 0)[:, None, :])
    terms = -similarity.masked_fill(~allowed, -1e30).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    if mask is None:
        return (terms * weight).sum() / max(count * height * width, 1)
    return (terms * weight).sum() / (weight[:, ::groups].sum().clamp(min=1e-12))


class TwoBranch(nn.Module):
    """Mean of a convolution of ``B1`` and one of ``B2(B1)``; B1 and B2 are conv 3x3 - ReLU."""

    def __init__(self, width: int, **options: Any):
        super().__init__()
        self.block_1, self.block_2 = (
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, **options), nn.ReLU()) for _ in range(2))
        self.end_1, self.end_2 = (nn.Conv2d(width, width, 3, padding=1, **options) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        near = self.block_1(features)
        return (self.end_1(near) + self.end_2(self.block_2(near))) / 2


@MODELS.register_module()
class AfDCDLoss(KDLoss):
    """Augmentation-free dense contrastive distillation (Fan et al., Augmentation-free Dense Contrastive Knowledge
    Distillation for Efficient Semantic Segmentation, NeurIPS 2023).

    ``fd_weight * sum((P(m * F_s) - F_t)^2) / N + contrast_weight * contrast(P(m * F_s), F_t)``: random cells of the
    student's map are masked out, a projector ``P`` (trained jointly) must produce the teacher's map from the rest, and
    :func:`omni_contrast` pulls each part of it to the teacher's part at its place, away from others nearby.

    The masks depend on ``(seed, rank, step, level)`` alone.

    As published: the defaults with ``adapter=dict(type='ConvAdapter')``, whose convolution the code makes only where
    the channels differ.  It needs maps that are multiples of ``pool * patch``; here the last patches may be partial.
    For CamVid the code crops instead of pooling.

    Args:
        mask_ratio: fraction masked **out**, in 0..1. Default 0.75 [C].
        enhanced: projector of two branches instead of conv 3x3 - ReLU - conv 3x3. Default False [C].
        tau: temperature of the contrast, above 0. Default 0.07 [C].
        groups: of channels; divides the teacher's. Default 16 [C].
        pool: max-pooling before the contrast. Default 4 [C].
        patch: height and width of a patch in pooled cells. Default (4, 4) [C].
        fd_weight: factor of the first term. Default 2e-6 [C: training script]; 4e-5 in the code's defaults. A sum over
            C*H*W is inside.
        contrast_weight: factor of the second. Default 5e-3 [C: training script]; 1e-3 in the code's defaults.
        loss_weight: factor of both, see :class:`KDLoss`. Default 1.

    A region weights the squares, and chooses the (pooled) cells that are contrasted.

    The authors clip the gradient of this module at norm 15.

    Returns:
        Reduction: per level; sum over elements; divided by images
        Reduction: per level; mean over cells
        Parts: fd, contrast
        The squares, then the contrast; summed over levels.

    Raises:
        ValueError: an option has a bad value, or ``groups`` does not divide the channels.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='AfDCDLoss', groups=2))
        >>> loss(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)) > 0
        tensor(True)
    """

    takes = (4, )

    def __init__(self, mask_ratio: float = 0.75, enhanced: bool = False, tau: float = 0.07, groups: int = 16,
                 pool: int = 4, patch: Tuple[int, int] = (4, 4), fd_weight: float = 2e-6,
                 contrast_weight: float = 5e-3, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.mask_ratio = number('AfDCDLoss', 'mask_ratio', mask_ratio, 0, 1)
        self.enhanced = boolean('AfDCDLoss', 'enhanced', enhanced)
        self.tau = positive('AfDCDLoss', 'tau', tau)
        self.groups = whole('AfDCDLoss', 'groups', groups, 2)  # the other groups are the negatives
        self.pool = whole('AfDCDLoss', 'pool', pool)
        self.patch = pair('AfDCDLoss', 'patch', patch)
        self.factors = {'fd': from_zero('AfDCDLoss', 'fd_weight', fd_weight),
                        'contrast': from_zero('AfDCDLoss', 'contrast_weight', contrast_weight)}
        self.projectors = nn.ModuleList()
        #: masks to use instead of random ones, one a level.
        self.fixed_masks: Optional[Sequence[Tensor]] = None

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.projectors) > 0:
            return
        for level, tensor in enumerate(teacher):
            width, options = tensor.shape[1], parameter_options(tensor)
            if width % self.groups:
                raise ValueError(f'AfDCDLoss, level {level}: groups={self.groups} does not divide {width} channels')
            self.projectors.append(TwoBranch(width, **options) if self.enhanced else nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, **options), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, **options)))

    def draw_mask(self, level: int, student: Tensor, batch: KDBatch) -> Tensor:
        """(N, 1, H, W): 1 to keep, 0 to mask out."""
        if self.fixed_masks is not None:
            return self.fixed_masks[level].to(student)
        generator = batch.info.generator(level)
        uniform = torch.rand(student.shape[0], 1, *student.shape[2:], generator=generator)
        return keep_mask(uniform, self.mask_ratio).to(student)

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The two terms of one level without their weights: fd and contrast."""
        projected = self.projectors[level](student * self.draw_mask(level, student, batch))
        return {
            'fd': generation_loss(projected, teacher, mask),
            'contrast': omni_contrast(projected, teacher, self.tau, self.groups, self.pool, self.patch, mask),
        }

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, batch, mask)
