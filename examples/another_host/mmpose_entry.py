"""What kd_mm must be told of MMPose, which builds on no host that it knows; ``config.py`` beside it names this file."""

import numpy as np
import torch

from kd_mm.hosts.table import Host, register


def sample(model, index, height, width, classes, generator):
    """A random sample for one picture, as the last transform of MMPose's pipelines packs it."""
    from mmengine.structures import InstanceData, PixelData
    from mmpose.structures import PoseDataSample

    points = model.head.out_channels
    found = PoseDataSample(metainfo=dict(img_shape=(height, width), input_size=(width, height)))
    found.gt_fields = PixelData(heatmaps=torch.rand(points, height // 4, width // 4, generator=generator))
    found.gt_instance_labels = InstanceData(keypoint_weights=torch.ones(1, points))
    found.gt_instances = InstanceData(bboxes=np.array([[0, 0, width, height]], np.float32))
    return found


register(Host('mmpose', 'detection', sample=sample))
