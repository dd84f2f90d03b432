"""Focal and global distillation."""

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import from_zero, one_of, positive
from kd_mm.ops.functional import apply_weights, parameter_options
from kd_mm.regions.gt_box import background_mask, scale_mask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import FRAMES, batch_boxes


def attention(features: Tensor, tau: float) -> Tuple[Tensor, Tensor]:
    """Spatial and channel attention of a feature map; each sums to its number of entries.

    ``S = H*W * softmax_hw(mean_c |F| / tau)`` and ``Ch = C * softmax_c(mean_hw |F| / tau)``.

    Args:
        features: (N, C, H, W).
        tau: temperature, above 0.

    Returns:
        S (N, 1, H, W) and Ch (N, C, 1, 1).

    Example:
        >>> spatial, channel = attention(torch.ones(1, 4, 2, 4), 0.5)
        >>> spatial.sum().item(), channel.sum().item()
        (8.0, 4.0)
    """
    count, channels, height, width = features.shape
    size = features.abs()
    spatial = height * width * (size.mean(dim=1).flatten(1) / tau).softmax(dim=1)
    channel = channels * (size.mean(dim=(2, 3)) / tau).softmax(dim=1)
    return spatial.view(count, 1, height, width), channel.view(count, channels, 1, 1)


def image_sum(values: Tensor) -> Tensor:
    """Sum over everything, divided by the number of images.

    Example:
        >>> image_sum(torch.ones(2, 3, 2, 2))
        tensor(12.)
    """
    return values.sum() / max(values.shape[0], 1)


class ContextBlock(nn.Module):
    """Global context of a feature map, added to it: ``F + W2 ReLU(LN(W1 sum_i a_i F_i))``, ``a`` a softmax over cells.

    The last convolution starts at 0, so that the block starts as the identity.
    """

    def __init__(self, channels: int, **options: Any):
        super().__init__()
        middle = max(channels // 2, 1)
        self.conv_mask = nn.Conv2d(channels, 1, 1, **options)
        self.channel_add = nn.Sequential(
            nn.Conv2d(channels, middle, 1, **options),
            nn.LayerNorm([middle, 1, 1], **options),
            nn.ReLU(),
            nn.Conv2d(middle, channels, 1, **options))
        nn.init.kaiming_normal_(self.conv_mask.weight, mode='fan_in')
        last = self.channel_add[3]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        weights = self.conv_mask(features).flatten(2).softmax(dim=2)
        context = torch.einsum('nci,noi->nc', features.flatten(2), weights)
        return features + self.channel_add(context[:, :, None, None])


@MODELS.register_module()
class FGDLoss(KDLoss):
    """Focal and global distillation (Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022).

    With the teacher's attentions S and Ch (see :func:`attention`) and sums over everything divided by N::

        alpha  * sum(M_fg S Ch (F_s - F_t)^2)          M_fg: 1 / (cells of the smallest box over the cell)
      + beta   * sum(M_bg S Ch (F_s - F_t)^2)          M_bg: 1 / (background cells of the image) outside all boxes
      + gamma  * (sum |Ch_s - Ch_t| + sum |S_s - S_t|)
      + lambda * sum((G_s(F_s) - G_t(F_t))^2)          G: a :class:`ContextBlock` for each side and level, both trained

    The teacher's block is trained too, as published, so its target can drift; the teacher itself gets no gradient.

    Args:
        tau: temperature of the attentions, above 0. Default 0.5 [C]; 0.8 for FCOS [C].
        alpha: foreground weight, not negative. Default 1e-3 [C: RetinaNet, GFL]; 1.6e-3 FCOS and RepPoints, 5e-5
            two-stage.
        beta: background weight. Default 5e-4 [C]; 8e-4, 2.5e-5.
        gamma: attention weight. Default 5e-4 [C]; 8e-4, 5e-5. (The 1e-3 of the published docstring is used by no
            one-stage config.)
        lambda_: relation weight. Default 5e-6 [C]; 8e-6, 5e-7.
        frame: what box coordinates are divided by to find cells: 'input' (default: the padded input, which is what the
            features cover) or 'image' (the image before padding, as published: it stretches the boxes wherever a batch
            is padded).
        loss_weight: factor of the four terms, see :class:`KDLoss`. Default 1.

    A region multiplies every sum over cells; the channel attention, which has no cells, is multiplied by the mean of
    the region over the image.  The published recipes clip gradients at norm 35.

    Returns:
        Reduction: per level; sum over elements; divided by images
        Parts: fg, bg, mask, rela
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, or the data has no boxes.

    Example:
        >>> from kd_mm.registry import build
        >>> from kd_mm.types.batch import KDBatch
        >>> batch = KDBatch(input_shape=(64, 64), boxes=[torch.tensor([[8., 8., 40., 30.]])])
        >>> loss = build(dict(type='FGDLoss'))
        >>> x = torch.randn(1, 8, 16, 16)
        >>> loss(x, x, batch).item() < 1e-5
        True
    """

    takes = (4, )
    needs_boxes = True

    def __init__(self, tau: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4, gamma: float = 5e-4,
                 lambda_: float = 5e-6, frame: str = 'input', loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.tau = positive('FGDLoss', 'tau', tau)
        self.factors = {'fg': from_zero('FGDLoss', 'alpha', alpha), 'bg': from_zero('FGDLoss', 'beta', beta),
                        'mask': from_zero('FGDLoss', 'gamma', gamma), 'rela': from_zero('FGDLoss', 'lambda_', lambda_)}
        self.frame = one_of('FGDLoss', 'frame', frame, FRAMES)
        self.context_s = nn.ModuleList()
        self.context_t = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.context_s) == 0:
            for tensor in teacher:
                self.context_s.append(ContextBlock(tensor.shape[1], **parameter_options(tensor)))
                self.context_t.append(ContextBlock(tensor.shape[1], **parameter_options(tensor)))

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The four terms of one level without their weights: fg, bg, mask (attention) and rela (relation)."""
        size = (teacher.shape[2], teacher.shape[3])
        foreground = scale_mask(*batch_boxes(batch, self.frame, teacher, rotated=True), size)
        background = background_mask(foreground)
        background = background / background.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        spatial_s, channel_s = attention(student, self.tau)
        spatial_t, channel_t = attention(teacher, self.tau)
        gap = apply_weights((student - teacher).square() * channel_t * spatial_t, mask)
        channel_gap = (channel_s - channel_t).abs()
        if mask is not None:
            channel_gap = channel_gap * mask.to(teacher.dtype).mean(dim=(2, 3), keepdim=True)
        relation = (self.context_s[level](student) - self.context_t[level](teacher)).square()
        return {
            'fg': image_sum(foreground * gap),
            'bg': image_sum(background * gap),
            'mask': image_sum(channel_gap) + image_sum(apply_weights((spatial_s - spatial_t).abs(), mask)),
            'rela': image_sum(apply_weights(relation, mask)),
        }

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, batch, mask)
