"""Masked generative distillation."""

from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import number, one_of
from kd_mm.ops.functional import apply_weights, parameter_options
from kd_mm.ops.sampling import keep_mask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

MASKS = ('pixel', 'channel')


def generation_loss(generated: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """``sum((G - F_t)^2) / N``, the squares weighted by a region ``mask`` (N, 1, H, W).

    Example:
        >>> generation_loss(torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))
        tensor(12.)
    """
    return apply_weights((generated - teacher).square(), mask).sum() / max(teacher.shape[0], 1)


@MODELS.register_module()
class MGDLoss(KDLoss):
    """Masked generative distillation (Yang et al., Masked Generative Distillation, ECCV 2022).

    ``sum((G(m * F_s) - F_t)^2) / N``, where ``G`` is conv 3x3 - ReLU - conv 3x3, trained jointly, one for each level,
    and ``m`` is 0 at a random part of the cells (the same for all channels) and 1 elsewhere, without rescaling.

    The masks depend on ``(seed, rank, step, level)`` alone: other random numbers of the run stay as they
    are without this loss, and a resumed run draws the same.

    Args:
        mask_ratio: fraction masked **out**, in 0..1. Default 0.65 [C: one-stage detectors]; 0.45 two-stage, 0.75
            segmentation, 0.15 classification with channel masks [C].
        mask_on: 'pixel' (masks (N, 1, H, W)) or 'channel' (masks (N, C, 1, 1)). Default 'pixel'.
        loss_weight: see :class:`KDLoss`. Default 2e-5 [C: one-stage detectors and segmentation]; 5e-7 two-stage. The
            sum over C*H*W is inside the loss, so the weight depends on resolution and width.

    A region multiplies the squares, after the generator.

    Returns:
        Reduction: per level; sum over elements; divided by images
        Summed over levels.

    Raises:
        ValueError: ``mask_ratio`` outside 0..1, or ``mask_on`` is not among its choices.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='MGDLoss'))
        >>> student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> torch.allclose(loss(student, teacher), loss(student, teacher))  # the same mask
        True
    """

    takes = (4, )

    def __init__(self, mask_ratio: float = 0.65, mask_on: str = 'pixel', loss_weight: Any = 2e-5):
        super().__init__(loss_weight)
        self.mask_ratio = number('MGDLoss', 'mask_ratio', mask_ratio, 0, 1)
        self.mask_on = one_of('MGDLoss', 'mask_on', mask_on, MASKS)
        self.generators = nn.ModuleList()
        #: masks to use instead of random ones, one a level (a golden vector's, for example).
        self.fixed_masks: Optional[Sequence[Tensor]] = None

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.generators) == 0:
            for tensor in teacher:
                width, options = tensor.shape[1], parameter_options(tensor)
                self.generators.append(nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, **options),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, **options)))

    def draw_mask(self, level: int, student: Tensor, batch: KDBatch) -> Tensor:
        """1 to keep, 0 to mask out: (N, 1, H, W) or (N, C, 1, 1)."""
        if self.fixed_masks is not None:
            return self.fixed_masks[level].to(student)
        count, channels, height, width = student.shape
        shape: Tuple[int, ...] = (count, 1, height, width) if self.mask_on == 'pixel' else (count, channels, 1, 1)
        generator = batch.info.generator(level)
        return keep_mask(torch.rand(shape, generator=generator), self.mask_ratio).to(student)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        generated = self.generators[level](student * self.draw_mask(level, student, batch))
        return generation_loss(generated, teacher, mask)
