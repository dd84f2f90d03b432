"""Modules that give rows instead of maps: what a second stage says about the proposals of its own model.

Row 7 is another box in another model, and the next step has another number of rows.  Two models can be compared at such
a place only where both are asked about the same proposals: :data:`kd_mm.hosts.places.SHARED`.
"""

from typing import Any, Dict, Optional, Tuple

from torch import nn

from kd_mm.hosts.heads.proposals import roi_head

#: Name of a second stage in a detector.
STAGE = 'roi_head'
#: Modules below it that look at whole images.
WHOLE = ('FusedSemanticHead', 'GlobalContextHead')
#: Path below a second stage (its beginning, without the numbers of a cascade) -> the shared places that stand for it.
INSTEAD: Dict[str, Tuple[str, ...]] = {
    'bbox_head.fc_cls': ('@roi_logits', ),
    'bbox_head.fc_reg': ('@roi_boxes', ),
    'bbox_head': ('@roi_logits', '@roi_features'),
    'bbox_roi_extractor': ('@roi_features', ),
    'mask_head': ('@roi_masks', ),
    'mask_roi_extractor': ('@roi_masks', ),
    'point_head': ('@roi_masks', )}
#: What each of them gives: number of dimensions.
DIMENSIONS = {'@roi_logits': 2, '@roi_boxes': 2, '@roi_features': 4, '@roi_masks': 4}
#: Parts of a model that look at whole images, whatever stands first in their outputs (the windows of a Swin).
TRUNK = ('backbone', 'neck', 'encoder', 'data_preprocessor')


def shared_places(model: nn.Module, path: str) -> Optional[Tuple[str, ...]]:
    """The places to use instead of a path below a second stage; None for every other path.

    Empty where the second stage cannot be asked about given proposals.

    Example:
        >>> shared_places(nn.Linear(1, 1), 'neck')
    """
    parts = path.split('.')
    if STAGE not in parts:
        return None
    position = parts.index(STAGE)
    owner: Any = model
    for part in parts[:position]:
        owner = getattr(owner, part, None)
    module: Any = getattr(owner, STAGE, None)
    if not isinstance(module, nn.Module):
        return None
    head = module
    for part in parts[position + 1:]:
        module = getattr(module, part, None)
        if type(module).__name__ in WHOLE:
            return None
    try:
        roi_head(owner, 'model')
    except ValueError:
        return ()
    below = '.'.join(part for part in parts[position + 1:] if not part.isdigit())
    found = next((places for start, places in INSTEAD.items() if below.startswith(start)), ('@roi_features', ))
    if '@roi_masks' in found and not getattr(head, 'with_mask', False):
        return ('@roi_features', )
    return found


def in_trunk(path: str) -> bool:
    """Whether a path lies before the heads of a model of the hosts."""
    return path.split('.')[0] in TRUNK
