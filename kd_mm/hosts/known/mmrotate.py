"""MMRotate 1.x: detectors of mmdet with rotated boxes."""

from typing import Any

import torch
from torch import Tensor

from kd_mm.hosts.meaning import BOXES
from kd_mm.hosts.synthetic import det_sample
from kd_mm.hosts.table import Host, register
from kd_mm.ops.boxes import to_centre


def sample(model: Any, index: int, height: int, width: int, classes: int, generator: torch.Generator) -> Any:
    """A sample of mmdet whose boxes are turned about their centres."""
    from mmrotate.structures.bbox import RotatedBoxes

    def turned(boxes: Any) -> Any:
        upright: Tensor = boxes.tensor if hasattr(boxes, 'tensor') else boxes
        angles = (torch.rand(len(upright), 1, generator=generator) - 0.5) * torch.pi  # le90
        return RotatedBoxes(torch.cat([to_centre(upright) * upright.new_tensor([1, 1, 0.6, 0.4]), angles], dim=1))

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
))
