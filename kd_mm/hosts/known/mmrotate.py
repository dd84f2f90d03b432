"""MMRotate 1.x: detectors of mmdet with rotated boxes."""

from typing import Any

import torch
from torch import Tensor

from kd_mm.hosts.meaning import BOXES
from kd_mm.hosts.synthetic import det_sample
from kd_mm.hosts.table import Host, register
from kd_mm.ops.boxes import to_centre

#: Heads that learn from quadrilaterals, the four corners; those that derive from them do so, too.
QUADRILATERALS = ('RotatedRepPointsHead', 'GVBBoxHead')


def learns_quadrilaterals(model: Any) -> bool:
    """Whether a head of a detector, or of its second stage, wants four corners and no centre with an angle."""
    heads = [getattr(owner, 'bbox_head', None) for owner in (model, getattr(model, 'roi_head', None))]
    return any(kind.__name__ in QUADRILATERALS for head in heads for kind in type(head).__mro__)


def sample(model: Any, index: int, height: int, width: int, classes: int, generator: torch.Generator) -> Any:
    """A sample of mmdet whose boxes are turned about their centres, in the form that the model learns from."""
    from mmrotate.structures.bbox import RotatedBoxes

    corners = learns_quadrilaterals(model)

    def turned(boxes: Any) -> Any:
        upright: Tensor = boxes.tensor if hasattr(boxes, 'tensor') else boxes
        angles = (torch.rand(len(upright), 1, generator=generator) - 0.5) * torch.pi  # le90
        found = RotatedBoxes(torch.cat([to_centre(upright) * upright.new_tensor([1, 1, 0.6, 0.4]), angles], dim=1))
        return found.convert_to('qbox') if corners else found

    found = det_sample(model, index, height, width, classes, generator)
    for instances in (found.gt_instances, found.ignored_instances):
        boxes = instances.bboxes
        del instances.bboxes
        instances.bboxes = turned(boxes)
    return found


register(Host(
    'mmrotate', parent='mmdet', index='mmrotate-dev', versions=('1.0', '2.0'), needs=('torchvision', ), sample=sample,
    # All others have the layers of the mmdet heads that they derive from.
    logits={'RotatedRTMDetSepBNHead': (('rtm_cls.*', ), None)},
    branches={'conv_angle': BOXES, 'rtm_ang': BOXES},
    no_tta='mmdet merges upright boxes alone, and mmrotate has no model for rotated ones',
))
