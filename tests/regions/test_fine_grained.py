import pytest
import torch

from kd_mm.regions.fine_grained import FineGrainedRegion, anchor_shapes, cell_overlap
from kd_mm.regions.gt_box import BLOCK
from kd_mm.types.batch import KDBatch


def brute_force(boxes, sizes, strides, scales, ratios, factor):
    """IoU of each box with a list of all anchors, one level after the other."""
    masks, overlaps = [torch.zeros(size) for size in sizes], []
    for size, stride in zip(sizes, strides):
        shapes = torch.tensor(anchor_shapes(stride, scales, ratios))
        y, x = torch.meshgrid(torch.arange(size[0]) * stride, torch.arange(size[1]) * stride, indexing='ij')
        centres = torch.stack([x, y], dim=-1)[:, :, None].float()
        anchors = torch.cat([centres - shapes / 2, centres + shapes / 2], dim=-1)
        low = torch.maximum(anchors[..., None, :2], boxes[:, :2])
        high = torch.minimum(anchors[..., None, 2:], boxes[:, 2:])
        both = (high - low).clamp(min=0).prod(dim=-1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
        overlaps.append(both / (shapes.prod(dim=-1)[:, None] + area - both))  # H, W, A, M
    for box in range(len(boxes)):
        best = max(float(overlap[..., box].max()) for overlap in overlaps)
        for mask, overlap in zip(masks, overlaps):
            mask[(overlap[..., box] > factor * best).any(dim=-1)] = 1
    return masks


@pytest.mark.parametrize('factor', [0.5, 0.8])
def test_agrees_with_a_list_of_all_anchors(factor):
    boxes = torch.tensor([[3.0, 5.0, 40.0, 33.0], [50.0, 20.0, 90.0, 90.0], [0.0, 0.0, 7.0, 9.0]])
    sizes, strides, scales, ratios = [(12, 12), (6, 6)], [8, 16], [1, 2], [0.5, 1, 2]
    region = FineGrainedRegion(strides, scales, ratios, factor)
    batch = KDBatch(input_shape=(96, 96), boxes=[boxes, torch.zeros(0, 4)])
    found = region(tuple(torch.zeros(2, 4, *size) for size in sizes), batch)
    for mask, expected in zip(found, brute_force(boxes, sizes, strides, scales, ratios, factor)):
        assert torch.equal(mask[0, 0], expected) and mask[1].sum() == 0
    assert found[0].sum() > 0 and found[1].sum() > 0


def test_many_boxes_are_handled_in_blocks():
    corners = torch.rand(BLOCK + 20, 2, generator=torch.Generator().manual_seed(0)) * 60
    boxes = torch.cat([corners, corners + 20], dim=1)
    region = FineGrainedRegion([8], [2], [1])
    features = (torch.zeros(1, 4, 12, 12), )
    whole = region(features, KDBatch(input_shape=(96, 96), boxes=[boxes]))[0]
    parts = [region(features, KDBatch(input_shape=(96, 96), boxes=[part]))[0] for part in boxes.split(10)]
    assert torch.equal(whole, torch.stack(parts).amax(dim=0))


def test_an_anchor_on_its_box_and_strictness():
    # The anchor of cell (2, 2) is the box; its neighbours have IoU 8/24 = 1/3.
    boxes = [torch.tensor([[8.0, 8.0, 24.0, 24.0]])]
    features = (torch.zeros(1, 4, 4, 4), )
    counts = [FineGrainedRegion([8], [2], [1], factor)(features, KDBatch(input_shape=(32, 32), boxes=boxes))[0].sum()
              for factor in (0.3, 0.34, 1.0)]
    assert counts == [5.0, 1.0, 0.0]


def test_legacy_anchors():
    # Pixels 0 to 15 are the first cell's anchor: IoU 1 with the same box, both with 16 pixels.
    overlap = cell_overlap(torch.tensor([[[0.0, 0.0, 15.0, 15.0]]]), (1, 2), 16, anchor_shapes(16, [1], [1], True), 7.5,
                           1.0)
    assert overlap.flatten().tolist() == [1.0, 0.0]
    assert anchor_shapes(16, [1], [0.5, 2], True) == ((23.0, 12.0), (11.0, 22.0))


@pytest.mark.parametrize('options, name', [
    (dict(strides=[]), 'strides'), (dict(strides=[0]), 'strides'), (dict(strides=[8], scales=[-1]), 'scales'),
    (dict(strides=[8], ratios=[]), 'ratios'), (dict(strides=[8], iou_factor=2), 'iou_factor')])
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        FineGrainedRegion(**options)


def test_number_of_strides():
    with pytest.raises(ValueError, match='1 strides for 2 levels'):
        FineGrainedRegion([8])((torch.zeros(1, 4, 4, 4), ) * 2, KDBatch(input_shape=(32, 32), boxes=[torch.rand(1, 4)]))
