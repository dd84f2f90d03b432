import math

import pytest
import torch

from kd_mm.regions import GTBoxRegion
from kd_mm.regions.gt_box import BLOCK, box_cells, foreground_mask, scale_mask
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.targets import batch_boxes


def by_hand(boxes, frame, size):
    """The definition, box by box and cell by cell: the value of the smallest covering box."""
    mask = torch.zeros(size, dtype=torch.float64)
    for x1, y1, x2, y2 in boxes.double().tolist():
        left, top = math.floor(x1 / frame[1] * size[1]), math.floor(y1 / frame[0] * size[0])
        right, bottom = math.ceil(x2 / frame[1] * size[1]), math.ceil(y2 / frame[0] * size[0])
        value = 1 / ((bottom + 1 - top) * (right + 1 - left))
        for row in range(max(top, 0), min(bottom, size[0] - 1) + 1):
            for column in range(max(left, 0), min(right, size[1] - 1) + 1):
                mask[row, column] = max(mask[row, column].item(), value)
    return mask


def random_boxes(count, height, width, seed):
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=draw, dtype=torch.float64) * 1.1 - 0.05
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1) * torch.tensor([width, height, width, height])


@pytest.mark.parametrize('counts', [(3, 0), (5, 2 * BLOCK + 3), (0, 0), (1, 1)])
@pytest.mark.parametrize('size', [(16, 20), (5, 4), (1, 1)])
def test_all_boxes_at_once_equal_box_by_box(counts, size):
    found = [random_boxes(count, 128, 160, seed) for seed, count in enumerate(counts)]
    shapes = [(100, 160), (128, 90)]
    batch = KDBatch(input_shape=(128, 160), img_shapes=shapes, boxes=found)
    features = (torch.zeros(2, 3, *size, dtype=torch.float64), )
    for frame, frames in (('input', [(128, 160)] * 2), ('image', shapes)):
        expected = torch.stack([by_hand(b, f, size) for b, f in zip(found, frames)])[:, None]
        assert torch.allclose(GTBoxRegion('scale', frame)(features, batch)[0], expected, rtol=1e-12)
        assert torch.equal(GTBoxRegion('foreground', frame)(features, batch)[0], (expected > 0).double())
        assert torch.equal(GTBoxRegion('background', frame)(features, batch)[0], (expected == 0).double())


def test_hand_drawn_map():
    batch = KDBatch(input_shape=(32, 48), boxes=[torch.tensor([[9.0, 1.0, 15.0, 7.0], [30.0, 20.0, 41.0, 25.0]])])
    mask = GTBoxRegion()((torch.zeros(1, 1, 4, 6), ), batch)[0]
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_the_smallest_box_counts_where_boxes_overlap():
    boxes = torch.tensor([[[0.0, 0.0, 24.0, 24.0], [8.0, 8.0, 16.0, 16.0]]])
    real = torch.tensor([[True, True]])
    mask = scale_mask(boxes, real, torch.tensor([[64.0, 64.0]]), (8, 8))[0, 0]
    assert mask[1, 1] == 1 / 4 and mask[0, 0] == 1 / 16 and mask[4, 4] == 0
    assert torch.equal(scale_mask(boxes.flip(1), real, torch.tensor([[64.0, 64.0]]), (8, 8))[0, 0], mask)
    assert foreground_mask(boxes, real, torch.tensor([[64.0, 64.0]]), (8, 8)).sum() == 16


def test_levels_and_dtypes():
    batch = KDBatch(input_shape=(64, 64), boxes=[torch.tensor([[0.0, 0.0, 30.0, 30.0]])])
    half, full = torch.zeros(1, 1, 16, 16).half(), torch.zeros(1, 1, 8, 8).half()
    masks = GTBoxRegion()((half, full), batch)
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 16, 16), (1, 1, 8, 8)]
    assert all(mask.dtype == torch.float32 for mask in masks)
    assert GTBoxRegion()((half.double(), ), batch)[0].dtype == torch.float64


def test_classes():
    boxes = [torch.tensor([[0.0, 0.0, 7.0, 7.0], [16.0, 16.0, 23.0, 23.0]]), torch.tensor([[0.0, 0.0, 31.0, 31.0]])]
    batch = KDBatch(input_shape=(32, 32), boxes=boxes, labels=[torch.tensor([0, 2]), torch.tensor([1])])
    features = (torch.zeros(2, 1, 4, 4), )
    mask = GTBoxRegion(classes=[2])(features, batch)[0]
    assert mask[0].sum() == 4 and mask[0, 0, 2, 2] == 1 and mask[1].sum() == 0
    assert GTBoxRegion(classes=[0, 1, 2])(features, batch)[0][1].sum() == 16
    assert GTBoxRegion(classes=[7])(features, batch)[0].sum() == 0
    with pytest.raises(ValueError, match='labels'):
        GTBoxRegion(classes=[2])(features, KDBatch(input_shape=(32, 32), boxes=boxes))


def test_boxes_are_padded_with_fillers():
    batch = KDBatch(input_shape=(8, 8), boxes=[torch.ones(2, 4), torch.ones(0, 4), torch.ones(1, 4)])
    boxes, real, frames = batch_boxes(batch, 'input', torch.zeros(3, 1, 2, 2))
    assert boxes.shape == (3, 2, 4) and real.tolist() == [[True, True], [False, False], [True, False]]
    assert frames.tolist() == [[8.0, 8.0]] * 3


def test_cells_are_floor_and_ceil_and_not_clipped():
    cells = box_cells(torch.tensor([[[-9.0, 7.9, 8.1, 40.0]]]), torch.tensor([[32.0, 16.0]]), (4, 2))
    assert cells.tolist() == [[[-2.0, 0.0, 2.0, 5.0]]]


@pytest.mark.parametrize('options', [dict(mode='fg'), dict(frame='padded')])
def test_bad_options(options):
    with pytest.raises(ValueError, match='is not one of'):
        build(dict(type='GTBoxRegion', **options))


def test_unknown_image_sizes_are_the_padded_one():
    batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8.0, 8.0, 16.0, 16.0]])] * 2)
    features = (torch.zeros(2, 1, 4, 4), )
    assert torch.equal(GTBoxRegion(frame='image')(features, batch)[0], GTBoxRegion()(features, batch)[0])
    batch.targets.img_shapes = [(32, 32)]
    with pytest.raises(ValueError, match='boxes of 2 images and sizes of 1'):
        GTBoxRegion(frame='image')(features, batch)


def test_missing_size_is_an_error():
    with pytest.raises(ValueError, match='size of the padded input'):
        GTBoxRegion()((torch.zeros(1, 1, 4, 4), ), KDBatch(boxes=[torch.zeros(1, 4)]))


def rotated_by_hand(box, frame, size):
    """Cells whose centre is in the box, grown by half a cell at each edge."""
    centre_x, centre_y, width, height, angle = box.tolist()
    down, across = frame[0] / size[0], frame[1] / size[1]
    mask = torch.zeros(size, dtype=torch.bool)
    for row in range(size[0]):
        for column in range(size[1]):
            dx, dy = (column + 0.5) * across - centre_x, (row + 0.5) * down - centre_y
            along = dx * math.cos(angle) + dy * math.sin(angle)
            beside = dy * math.cos(angle) - dx * math.sin(angle)
            grown = min(down, across) / 2
            mask[row, column] = abs(along) <= width / 2 + grown and abs(beside) <= height / 2 + grown
    return mask


def test_rotated_boxes_cover_their_own_cells():
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(count, 5, generator=generator) * torch.tensor([64., 48, 40, 12, 3]) for count in (5, 0, 2)]
    batch = KDBatch(input_shape=(48, 64), boxes=boxes)
    features = (torch.zeros(3, 1, 12, 16), torch.zeros(3, 1, 5, 9))
    masks, scales = GTBoxRegion()(features, batch), GTBoxRegion(mode='scale')(features, batch)
    for mask, scale in zip(masks, scales):
        size = tuple(mask.shape[2:])
        for image, found in enumerate(boxes):
            covered = [rotated_by_hand(box, (48, 64), size) for box in found]
            expected = torch.stack(covered).any(dim=0) if covered else torch.zeros(size, dtype=torch.bool)
            assert torch.equal(mask[image, 0] > 0, expected) and torch.equal(scale[image, 0] > 0, expected)
    thin = torch.tensor([[32., 24, 60, 2, math.pi / 4]])
    upright = foreground_mask(*batch_boxes(KDBatch(input_shape=(48, 64), boxes=[thin]), 'input', features[0][:1]),
                              (12, 16))
    turned = foreground_mask(*batch_boxes(KDBatch(input_shape=(48, 64), boxes=[thin]), 'input', features[0][:1],
                                          rotated=True), (12, 16))
    assert turned.sum() < 0.3 * upright.sum()  # a ship on the diagonal is a small part of the box around it


def test_a_rotated_box_counts_the_same_whatever_its_size():
    boxes = torch.tensor([[[32., 32, 32, 16, 0], [32, 32, 32, 16, 0.6]]])
    frames, real = torch.tensor([[64., 64.]]), torch.tensor([[True]])
    for index in range(2):
        mask = scale_mask(boxes[:, index:index + 1], real, frames, (32, 32))
        assert 0.8 < mask.sum() < 1.2
