"""What predictions of the hosts hold, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn

from kd_mm.hosts.predictions import detected, predicted_labels, true_labels, true_objects


def prediction(labels, values):
    sample = BaseDataElement()
    sample.pred_sem_seg = PixelData(data=torch.tensor(labels)[None])
    if values is not None:
        sample.seg_logits = PixelData(data=torch.tensor(values))
    return sample


def segmentor(head):
    model = nn.Module()
    model.decode_head = head
    return model


def test_the_score_of_a_label_is_its_softmax():
    labels, scores = predicted_labels(prediction([[0, 1]], [[[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 0.0]]]),
                                      segmentor(nn.Identity()))
    assert labels.tolist() == [[0, 1]]
    assert scores[0].tolist() == pytest.approx([np.exp(2) / (np.exp(2) + 2), np.exp(3) / (np.exp(3) + 2)])


def test_one_channel_is_a_sigmoid():
    _, scores = predicted_labels(prediction([[1, 0]], [[[2.0, -1.0]]]), segmentor(nn.Identity()))
    assert scores[0].tolist() == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))])


def test_scores_of_a_mask_transformer_are_shares():
    """They are no logits: softmax would make all of them alike."""
    from mmseg.models.decode_heads import Mask2FormerHead
    head = Mask2FormerHead.__new__(Mask2FormerHead)
    nn.Module.__init__(head)
    _, scores = predicted_labels(prediction([[0]], [[[0.6]], [[0.2]]]), segmentor(head))
    assert scores[0, 0] == pytest.approx(0.75)


def test_without_logits_there_is_no_score():
    assert predicted_labels(prediction([[1]], None), segmentor(nn.Identity()))[1] is None


def test_boxes_and_annotations():
    found = BaseDataElement()
    found.pred_instances = InstanceData(bboxes=torch.tensor([[0., 1., 2., 3.]]), scores=torch.tensor([0.5]),
                                        labels=torch.tensor([4]))
    boxes, scores, labels = detected(found)
    assert boxes.tolist() == [[0, 1, 2, 3]] and scores.tolist() == [0.5] and labels.tolist() == [4]
    found.pred_instances = InstanceData(bboxes=torch.tensor([[4., 4., 4., 2., torch.pi / 2]] * 4),
                                        scores=torch.rand(4), labels=torch.zeros(4))
    assert np.allclose(detected(found)[0], [[3, 2, 5, 6]] * 4)  # 4 boxes of 5 numbers, and no 5 boxes of 4
    corners = [dict(bbox=[1, 5, 9, 1, 7, 8, 2, 9], bbox_label=0)]
    boxes, labels, _ = true_objects(SimpleNamespace(get_data_info=lambda index: dict(instances=corners)), 0)
    assert boxes.tolist() == [[1, 1, 9, 9]] and len(labels) == 1
    instances = [dict(bbox=[0, 0, 4, 4], bbox_label=1, ignore_flag=1), dict(bbox=[1, 1, 2, 2], bbox_label=0)]
    boxes, labels, ignored = true_objects(SimpleNamespace(get_data_info=lambda index: dict(instances=instances)), 0)
    assert boxes.shape == (2, 4) and labels.tolist() == [1, 0] and ignored.tolist() == [True, False]
    boxes, labels, ignored = true_objects(SimpleNamespace(get_data_info=lambda index: dict(instances=[])), 0)
    assert boxes.shape == (0, 4) and not len(labels)
    with pytest.raises(ValueError, match='has no annotated objects'):
        true_objects(SimpleNamespace(get_data_info=lambda index: {}), 3)
    with pytest.raises(ValueError, match='lacks LoadAnnotations'):
        true_labels(BaseDataElement())
