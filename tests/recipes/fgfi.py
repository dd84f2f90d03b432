"""Fine-grained feature imitation."""

import torch

from kd_mm.regions.base import RegionMask
from kd_mm.regions.fine_grained import FineGrainedRegion, anchor_shapes, cell_overlap
from recipes.vector import GivenRegion, Vector, recipe


@recipe('fgfi')
def fgfi(v: Vector) -> None:
    stride, factor = v.number('feat_stride'), v.number('iou_factor')
    scales, ratios = v.number('anchor_scales'), v.number('anchor_ratios')
    height, width = v.tensor('teacher_0').shape[2:]
    # The file has all anchors, those of a cell together; they are the first cell's, moved by the stride.
    anchors = v.tensor('anchors_0').double().view(height, width, len(scales) * len(ratios), 4)
    steps = torch.stack([part.flatten() for part in torch.meshgrid(
        torch.arange(width) * stride, torch.arange(height) * stride, indexing='xy')], dim=1).double()
    assert torch.equal(anchors.flatten(0, 1), anchors[0, 0] + steps.repeat(1, 2)[:, None]), 'anchors'
    first, offset = anchors[0, 0], float(anchors[0, 0, 0, [0, 2]].mean())
    shapes = [tuple(shape) for shape in (first[:, 2:] - first[:, :2] + 1).tolist()]
    geometry = [sorted(anchor_shapes(base, scales, ratios, True)) for base in (stride, 16)]
    assert sorted(shapes) in geometry, 'anchors of other scales or ratios'
    overlap = torch.stack([
        cell_overlap(v.tensor('gt_bboxes_0').double()[None], (height, width), stride, [shape], offset, 1.0)[0]
        for shape in shapes])  # (anchors of a cell, boxes, H, W)
    near = overlap > factor * overlap.amax(dim=(0, 2, 3), keepdim=True)
    v.check('mask_0', near.any(dim=1).any(dim=0)[None])
    v.check('mask_count_0', near.sum(dim=(0, 1))[None])
    region: RegionMask = GivenRegion([near.any(dim=1).any(dim=0)[None, None].double()])
    if (sorted(shapes), offset) == (geometry[0], (stride - 1) / 2):
        # The published code keeps anchors for a stride of 16 whatever the stride is; our region has those of its own.
        region = FineGrainedRegion(strides=[stride], scales=scales, ratios=ratios, iou_factor=factor, legacy=True)
        v.check('mask_0', region((v.tensor('teacher_0'), ), v.batch())[0][:, 0])
    v.run(dict(type='FGFILoss', loss_weight=v.number('imitation_loss_weight')), region=region,
          adapter=v.connector('adapter'), rules=[(r'adapter_(\d)_(\w+)', r'adapter.convs.\1.\2')])
