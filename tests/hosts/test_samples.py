"""Batches whose labels are one tensor, and boxes that are rotated; with real models of the hosts that have them:
``known/``."""

import math

import torch
from mmengine.structures import InstanceData

from kd_mm.hosts.samples import Samples, samples_of, samples_seen
from kd_mm.types.records import Seen


def test_labels_in_one_tensor():
    table = torch.tensor([[0., 1, 8, 16, 24, 32], [2, 0, 1, 2, 3, 4], [0, 2, 5, 6, 7, 8]])
    samples = samples_of(dict(bboxes_labels=table, img_metas=[dict(batch_input_shape=(64, 96))] * 3))
    table[:] = -1  # some heads write into it
    assert [boxes.tolist() for boxes in samples.boxes()] == [[[8, 16, 24, 32], [5, 6, 7, 8]], [], [[1, 2, 3, 4]]]
    assert [labels.tolist() for labels in samples.labels()] == [[1, 2], [], [0]]
    assert samples.labels()[0].dtype == torch.long and samples.rotated() is None
    assert samples.img_shapes(None) == [(64, 96)] * 3 and samples.img_shapes((32, 32)) == [(32, 32)] * 3
    assert samples.masks() is None and not samples.has_seg_map()


def test_labels_in_one_tensor_at_another_size():
    samples = dict(bboxes_labels=torch.tensor([[0., 1, 8, 16, 24, 32]]), img_metas=[dict(batch_input_shape=(64, 64))])
    seen = samples_seen(samples, Seen((128, 96), (128, 96), (64, 64)))
    assert seen['bboxes_labels'].tolist() == [[0, 1, 12, 32, 36, 64]]
    assert seen['img_metas'][0]['batch_input_shape'] == (128, 96)
    assert samples['bboxes_labels'][0, 2] == 8


def test_rotated_boxes_give_the_upright_ones_around_them():
    class Sample:
        gt_instances = InstanceData(bboxes=torch.tensor([[10., 10, 8, 4, 0], [10, 10, 8, 4, math.pi / 2],
                                                         [10, 10, 8, 8, math.pi / 4]]))

    samples = Samples([Sample()])
    half = 4 * math.sqrt(2)
    expected = torch.tensor([[6., 8, 14, 12], [8, 6, 12, 14], [10 - half, 10 - half, 10 + half, 10 + half]])
    assert torch.allclose(samples.boxes()[0], expected) and samples.rotated()[0].shape == (3, 5)
    Sample.ignored_instances = Sample.gt_instances
    assert torch.allclose(samples.ignored()[0], expected)
    table = torch.cat([torch.zeros(3, 2), samples.rotated()[0]], dim=1)
    others = samples_of(dict(bboxes_labels=table, img_metas=[dict(batch_input_shape=(64, 64))]))
    assert torch.allclose(others.boxes()[0], expected) and torch.equal(others.rotated()[0], samples.rotated()[0])
    quadrilateral = InstanceData(bboxes=torch.tensor([[1., 5, 9, 1, 7, 8, 2, 9]]))
    Sample.gt_instances = quadrilateral
    assert Samples([Sample()]).boxes()[0].tolist() == [[1, 1, 9, 9]] and Samples([Sample()]).rotated() is None
