"""``kd-mm check --plot`` of a config whose teacher labels: pictures of what it adds."""

import re

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from pairs import kd_mm, message
from stock import detector, segmentor, teacher_of, wide

from kd_mm.lab.labels import NEW, TRUE, _annotated


def written(cfg, teacher, folder, losses=None, **labels):
    labels = dict(type='PseudoLabels', classes='positional', **labels)
    cfg.custom_hooks = [dict(
        type='kd_mm.DistillHook', teacher=teacher, teacher_ckpt='random', losses=losses, labels=labels)]
    cfg.work_dir = None
    cfg.dump(str(folder / 'config.py'))
    return ['check', folder / 'config.py', '--shape', 64, 64, '--plot', folder / 'weights.png']


def test_objects(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    cfg.model.test_cfg.score_thr = 0.0
    result = kd_mm(*written(cfg, wide(cfg), tmp_path, score=0.005), '--data', 3)
    assert result.exit_code == 0, message(result)
    assert re.search(r'labels      image 2: \d+ objects added, mean score 0\.\d\d', result.output)
    assert 'weights_labels.png' in result.output
    assert "teacher 'teacher' labels" in result.output
    assert not (tmp_path / 'weights.png').exists()  # no losses, no weights
    picture = cv2.imread(str(tmp_path / 'weights_labels.png'))[..., ::-1]
    orange = (picture == np.array(NEW)).all(axis=-1)
    half = picture.shape[1] // 2
    assert orange[:, half:].sum() > 100 and not orange[:, :half].any()


def test_masks_are_areas():
    """Of what was there in one colour, of what is new in another; padding is not drawn."""
    def sample(count):
        masks = np.zeros((count, 32, 48), dtype=np.uint8)
        masks[0, 4:8, 4:8] = 1
        masks[1:, 20:, 20:] = 1
        boxes = torch.tensor([[4., 4., 8., 8.], [20., 20., 40., 32.]])[:count]
        return [DetDataSample(metainfo=dict(img_shape=(32, 40)), gt_instances=InstanceData(
            bboxes=boxes, labels=torch.zeros(count, dtype=torch.long), masks=BitmapMasks(masks, 32, 48)))]

    drawn = _annotated(np.zeros((64, 80, 3), np.uint8), sample(2), sample(1), (32, 40), None)
    assert np.abs(drawn[60, 60].astype(int) - np.array(NEW) // 2).max() <= 1
    assert np.abs(drawn[12, 12].astype(int) - np.array(TRUE) // 2).max() <= 1
    assert not drawn[30, 10].any()
    assert not _annotated(np.zeros((64, 80, 3), np.uint8), sample(1), sample(1), (32, 40), None)[60, 60].any()


def test_pixels(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    losses = dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg'))
    result = kd_mm(*written(cfg, teacher_of(cfg), tmp_path, losses, score=0.0))
    assert result.exit_code == 0, message(result)
    assert re.search(r'image 3: \d+ pixels added, \d+ % of those without a label, mean score 0\.\d\d', result.output)
    assert (tmp_path / 'weights.png').exists()
    picture = cv2.imread(str(tmp_path / 'weights_labels.png')).astype(int)
    half = picture.shape[1] // 2
    assert picture[:, half:].mean() != pytest.approx(picture[:, :half].mean(), rel=0.01)


def test_data_that_are_not_there(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
    result = kd_mm(*written(cfg, wide(cfg), tmp_path, score=0.5))
    assert result.exit_code == 1 and 'the labels of the training data cannot be drawn' in message(result)
