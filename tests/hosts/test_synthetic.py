"""Random batches that stock models accept."""

import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from kd_mm.hosts.synthetic import find_num_classes, synthetic_batch
from kd_mm.hosts.zoo import zoo_config

#: Detectors that read boxes, masks, panoptic maps or proposals; segmentors with one head, auxiliary heads and tokens.
MODELS_OF = {
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': 80,
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': 80,
    'mmdet::fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py': 80,
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': 80,
    'mmdet::rpn/rpn_r50_fpn_1x_coco.py': 1,
    'mmdet::solo/solo_r50_fpn_1x_coco.py': 80,
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': 19,
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py': 19,
    'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py': 19,
}
SHAPE = (64, 96)


def build(name):
    cfg = Config.fromfile(str(zoo_config(name)))
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = SHAPE
    elif 'depth' in cfg.model.backbone:
        cfg.model.backbone.depth = 18
        cfg.model.neck.in_channels = [64, 128, 256, 512]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@pytest.fixture(scope='module')
def retinanet():
    return build('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')


@pytest.mark.parametrize('name', MODELS_OF)
def test_stock_models_compute_their_losses(name):
    model = build(name)
    assert find_num_classes(model) == MODELS_OF[name]
    data = model.data_preprocessor(synthetic_batch(model, 2, SHAPE), True)
    total, logged = model.parse_losses(model(**data, mode='loss'))
    assert torch.isfinite(total) and total.requires_grad and len(logged) > 1


def contents(batch):
    for image, sample in zip(batch['inputs'], batch['data_samples']):
        yield from (image, sample.gt_instances.bboxes.tensor, sample.gt_instances.labels)


def test_only_the_seed_decides(retinanet):
    """Not the global generators, which are left as they are."""
    before = torch.random.get_rng_state()
    first = list(contents(synthetic_batch(retinanet, 2, SHAPE, seed=3)))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    again = list(contents(synthetic_batch(retinanet, 2, SHAPE, seed=3)))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other = list(contents(synthetic_batch(retinanet, 2, SHAPE, seed=4)))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[3])  # images of one batch differ


def test_boxes_lie_in_the_image_and_labels_in_the_classes(retinanet):
    for seed in range(20):
        for sample in synthetic_batch(retinanet, 2, (48, 100), seed=seed, num_classes=3)['data_samples']:
            boxes, labels = sample.gt_instances.bboxes.tensor, sample.gt_instances.labels
            assert 1 <= len(boxes) == len(labels) <= 4
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes[:, 2] <= 100).all() and (boxes[:, 3] <= 48).all()
            assert labels.min() >= 0 and labels.max() < 3


def test_label_maps_have_classes_and_ignored_pixels():
    model = build('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')
    for seed in range(10):
        batch = synthetic_batch(model, 1, (40, 72), seed=seed)
        labels = batch['data_samples'][0].gt_sem_seg.data
        assert labels.shape == (1, 40, 72) and batch['inputs'][0].dtype == torch.uint8
        ignored = labels == 255
        assert 0 < ignored.sum() < labels.numel() / 2
        assert labels[~ignored].min() >= 0 and labels[~ignored].max() < 19


def test_unusable_requests_say_why(retinanet):
    with pytest.raises(ValueError, match='neither an mmdet detector nor an mmseg segmentor'):
        synthetic_batch(nn.Linear(2, 2), 1, SHAPE)
    with pytest.raises(ValueError, match='at least'):
        synthetic_batch(retinanet, 0, SHAPE)
    with pytest.raises(ValueError, match='at least'):
        synthetic_batch(retinanet, 1, (8, 8))
    with pytest.raises(ValueError, match='Give num_classes'):
        find_num_classes(nn.Linear(2, 2))


def test_no_host_is_imported():
    code = ('import sys, kd_mm.hosts.synthetic\n'
            'sys.exit(any(name in sys.modules for name in ("mmdet", "mmseg", "mmcv")))')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
