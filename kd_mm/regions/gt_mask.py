"""Regions made of ground-truth instance masks."""

import torch
from torch import Tensor

from kd_mm.ops.checks import one_of
from kd_mm.ops.functional import parameter_options
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import gt_masks, input_shape


def cover(mask: Tensor, frame: tuple, size: tuple) -> Tensor:
    """Part of each cell that a pixel mask covers: (H, W) in 0..1.

    Args:
        mask: (h, w) of 0 and 1, at most as large as the frame; what is missing is padding.
        frame: (Hin, Win) in pixels.
        size: (H, W) of the map.

    Example:
        >>> cover(torch.tensor([[1., 1.], [0., 0.]]), (4, 4), (2, 2)).tolist()
        [[0.5, 0.0], [0.0, 0.0]]
    """
    whole = mask.new_zeros(1, 1, *frame)
    whole[0, 0, :mask.shape[0], :mask.shape[1]] = mask[:frame[0], :frame[1]]
    return torch.nn.functional.adaptive_avg_pool2d(whole, size)[0, 0]


@MODELS.register_module()
class GTMaskRegion(RegionMask):
    """Cells of the ground-truth instance masks: tighter than their boxes.

    Args:
        mode: 'soft' (default: the part of the cell that any object covers), 'foreground' (1 where more than half of the
            cell is covered) or 'background' (1 where the foreground is 0).

    Returns:
        L tensors (N, 1, H, W) in 0..1; all zero (background: all one) for an image without objects.

    Raises:
        ValueError: ``mode`` is not among its choices, or the data has no instance masks.

    Example:
        >>> masks = [torch.ones(1, 16, 16)]
        >>> batch = KDBatch(input_shape=(32, 32), masks=masks)
        >>> GTMaskRegion()((torch.zeros(1, 8, 4, 4), ), batch)[0].sum().item()
        4.0
    """

    #: A box data set without masks cannot serve, and only detection has either.
    needs_boxes = True
    needs_masks = True

    def __init__(self, mode: str = 'soft'):
        super().__init__()
        self.mode = one_of('GTMaskRegion', 'mode', mode, ('soft', 'foreground', 'background'))

    def forward(self, features: Features, batch: KDBatch) -> Features:
        frame, options = input_shape(batch), parameter_options(features[0])
        # Objects of an image are joined before anything is resized: one map an image, however many objects.
        joined = [masks.to(options['device']).any(dim=0).to(options['dtype']) if len(masks)
                  else torch.zeros(1, 1, **options) for masks in gt_masks(batch)]
        if len(joined) != features[0].shape[0]:
            raise ValueError(f'masks of {len(joined)} images for features of {features[0].shape[0]} images')
        result = []
        for tensor in features:
            size = (tensor.shape[2], tensor.shape[3])
            soft = torch.stack([cover(mask, frame, size) for mask in joined])[:, None]
            inside = (soft > 0.5).to(soft.dtype)
            result.append(soft if self.mode == 'soft' else inside if self.mode == 'foreground' else 1 - inside)
        return tuple(result)
