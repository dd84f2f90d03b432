"""The view of a mask transformer: class and mask logits of its queries, decoder layer by decoder layer.

MaskFormer and Mask2Former, in mmdet and in mmseg.
"""

from typing import Any

import torch
from torch import Tensor

from kd_mm.ops.functional import lift
from kd_mm.types.query import MaskQueryView


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
