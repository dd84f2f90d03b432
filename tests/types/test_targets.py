"""Targets from plain tensors and from data samples; no host is needed for the latter."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from kd_mm.hosts.samples import Samples
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch, Targets

BOXES = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def sample(boxes=None, labels=None, seg=None, **meta):
    element = BaseDataElement(metainfo=meta)
    if boxes is not None:
        instances = InstanceData(bboxes=boxes)
        if labels is not None:
            instances.labels = labels
        element.gt_instances = instances
    if seg is not None:
        element.gt_sem_seg = PixelData(data=seg)
    return element



def sampled(samples, input_shape=None):
    return KDBatch(Targets(input_shape=input_shape, source=Samples(samples)))


def test_input_shape():
    assert targets.input_shape(KDBatch(input_shape=torch.Size([8, 9]))) == (8, 9)
    with pytest.raises(ValueError, match='size of the padded input'):
        targets.input_shape(KDBatch())


def test_img_shapes():
    assert targets.img_shapes(KDBatch(img_shapes=[(4, 5)])) == [(4, 5)]
    batch = sampled([sample(img_shape=(4, 5, 3)), sample()], input_shape=(8, 9))
    assert targets.img_shapes(batch) == [(4, 5), (8, 9)]


def test_boxes_of_data_samples():
    wrapped = SimpleNamespace(tensor=BOXES, shape=BOXES.shape)
    batch = sampled([sample(BOXES), sample(torch.zeros(0, 4)), sample(torch.ones(2, 5))])
    assert [tuple(found.shape) for found in targets.gt_boxes(batch)] == [(1, 4), (0, 4), (2, 4)]
    element = SimpleNamespace(gt_instances=Instances(wrapped))
    assert torch.equal(targets.gt_boxes(sampled([element]))[0], BOXES)
    assert targets.gt_boxes(KDBatch(boxes=[BOXES]))[0].data_ptr() == BOXES.data_ptr()


class Instances(dict):
    """Instances whose boxes are wrapped, as mmdet's box classes are."""

    def __init__(self, boxes):
        super().__init__(bboxes=boxes)
        self.bboxes = boxes


@pytest.mark.parametrize('samples', [[], [sample()], [sample(BOXES), sample()]])
def test_missing_boxes(samples):
    with pytest.raises(ValueError, match='needs ground-truth boxes'):
        targets.gt_boxes(sampled(samples))


def test_labels():
    batch = sampled([sample(BOXES, torch.tensor([3]))])
    assert targets.gt_labels(batch)[0].tolist() == [3]
    assert targets.gt_labels(KDBatch(labels=[torch.tensor([1])]))[0].tolist() == [1]
    for samples in ([], [sample(BOXES)], [sample(BOXES, torch.tensor([3])), sample(BOXES)]):
        with pytest.raises(ValueError, match='class labels'):
            targets.gt_labels(sampled(samples))


def test_seg_map():
    labels = torch.arange(16).reshape(1, 4, 4)
    batch = sampled([sample(seg=labels), sample(seg=labels + 16)])
    assert targets.has_seg_map(batch) and targets.seg_map(batch).shape == (2, 4, 4)
    # Cell i of 3 reads floor(i * 4 / 3): 0, 1, 2.
    resized = targets.seg_map(batch, (3, 2))
    assert resized.dtype == torch.int64 and resized[0].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert targets.seg_map(KDBatch(seg_map=labels), (4, 4)) is labels
    assert targets.seg_map(KDBatch(seg_map=labels.to(torch.uint8)), (2, 2)).dtype == torch.uint8


def test_missing_seg_map():
    assert not targets.has_seg_map(sampled([sample(BOXES)]))
    with pytest.raises(ValueError, match='needs a segmentation map'):
        targets.seg_map(KDBatch())
    assert targets.valid_pixels(KDBatch(), (2, 2)) is None


def test_a_detectors_map_of_stuff_is_no_seg_map():
    """HTC and panoptic heads: its labels say nothing about where class logits of boxes count."""
    element = sample(BOXES)
    element.gt_sem_seg = PixelData(sem_seg=torch.full((1, 4, 4), 255))
    batch = sampled([element])
    assert not targets.has_seg_map(batch) and targets.valid_pixels(batch, (2, 2)) is None
    with pytest.raises(ValueError, match='needs a segmentation map'):
        targets.seg_map(batch)


def test_valid_pixels():
    batch = KDBatch(seg_map=torch.tensor([[[0, 255], [7, 1]]]))
    assert targets.valid_pixels(batch, (2, 2)).tolist() == [[[True, False], [True, True]]]
    assert targets.valid_pixels(batch, (2, 2), ignore_index=7).tolist() == [[[True, True], [False, True]]]
    batch.targets.ignore_index = 0
    assert targets.valid_pixels(batch, (2, 2)).tolist() == [[[False, True], [True, True]]]


def test_row_labels():
    labels = torch.tensor([1, 0, 4])
    assert targets.row_labels(KDBatch(row_labels=labels), 3) is labels
    with pytest.raises(ValueError, match=r'shape \(3,\) for 4 rows'):
        targets.row_labels(KDBatch(row_labels=labels), 4)
    with pytest.raises(ValueError, match='teacher_argmax'):
        targets.row_labels(KDBatch(labels=[labels]), 3)


def test_class_members():
    batch = KDBatch(seg_map=torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8))
    like = torch.zeros(1, 5, 2, 2, dtype=torch.float64)
    members = targets.class_members(batch, like)
    assert members.dtype == torch.float64
    assert members[0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert targets.class_members(batch, like, 2)[0].tolist() == [[1, 0], [0, 0], [0, 0], [0, 1]]
    mask = torch.tensor([0.5, 2.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert targets.class_members(batch, like, mask=mask)[0].tolist() == [[0.5, 0, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]]
    assert targets.class_members(KDBatch(seg_map=torch.full((1, 2, 2), 255)), like).shape == (1, 4, 1)
    assert targets.class_members(KDBatch(seg_map=torch.zeros(1, 8, 8)), like).shape == (1, 4, 1)
    with pytest.raises(ValueError, match='segmentation map'):
        targets.class_members(KDBatch(), like)


def test_images():
    x = torch.zeros(1, 3, 4, 4)
    assert targets.images(KDBatch(images=x)) is x
    with pytest.raises(ValueError, match='the batch has none'):
        targets.images(KDBatch())
