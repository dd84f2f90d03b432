"""The view of a mask transformer: class and mask logits of its queries, decoder layer by decoder layer.

MaskFormer and Mask2Former, in mmdet and in mmseg.
"""

from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.functional import lift


class MaskQueryView:
    """What a mask transformer predicted for its queries; float32 or wider.

    Args:
        logits: (L, N, Q, K+1), the last class is "no object".
        masks: L tensors (N, Q, H, W) of logits.
        name: of the head, for messages.

    Example:
        >>> len(MaskQueryView(torch.zeros(3, 2, 5, 4), [torch.zeros(2, 5, 8, 8)] * 3))
        3
    """

    def __init__(self, logits: Tensor, masks: Sequence[Tensor], name: str = 'head'):
        self.logits, self.masks, self.name = logits, tuple(masks), name

    def __len__(self) -> int:
        return len(self.logits)

    def detach(self) -> 'MaskQueryView':
        """The same view without gradient."""
        return MaskQueryView(self.logits.detach(), [layer.detach() for layer in self.masks], self.name)


def mask_query_view(head: Any, output: Any) -> MaskQueryView:
    """The view of one forward pass of a mask transformer's head.

    Args:
        head: an mmdet or mmseg head such as ``Mask2FormerHead``.
        output: what its ``forward`` returned: class logits and mask logits of every decoder layer.

    Raises:
        ValueError: it returned something else.
    """
    good = isinstance(output, (tuple, list)) and len(output) == 2 and len(output[0]) == len(output[1]) and all(
        isinstance(layer, Tensor) and layer.dim() == 3 + kind for kind in (0, 1) for layer in output[kind])
    if not good:
        raise ValueError(f'{type(head).__name__} does not return class logits (N, Q, K+1) and mask logits (N, Q, H, W) '
                         'of each decoder layer')
    return MaskQueryView(torch.stack([lift(layer) for layer in output[0]]), [lift(layer) for layer in output[1]],
                         type(head).__name__)


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of all masks of an image at the same points.

    Args:
        masks: (N, Q, H, W).
        points: (N, P, 2), (x, y) in 0..1 of the padded input.

    Returns:
        (N, Q, P).

    Example:
        >>> ramp = torch.arange(4.).view(1, 1, 1, 4)
        >>> sample_masks(ramp, torch.tensor([[[0.5, 0.5]]])).item()
        1.5
    """
    grid = (2 * points - 1)[:, :, None].to(masks)
    return F.grid_sample(masks, grid, align_corners=False, padding_mode='border')[..., 0]
