"""Instance and panoptic segmentors in real trainings on objects and segments made of label maps."""

import math

import numpy as np
import pytest
import torch
from instance_heads import CAR, make_instances, model_config, runner_config
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from stock import hook, make_runner, train

from kd_mm.hosts.samples import Samples
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.regions.gt_mask import GTMaskRegion
from kd_mm.types.batch import KDBatch, Targets

REGION = dict(type='FitNetLoss', at='@neck', region=dict(type='GTMaskRegion'))
# Masks of random kernels are almost flat: the small tau lifts their shapes out of the rounding.
KERNELS = dict(
    loss_masks=dict(type='SigmoidKDLoss', at='@instance_masks'),
    loss_shape=dict(type='CWDLoss', at='@instance_masks', tau=0.01), loss_region=REGION)
QUERIES = dict(loss_masks=dict(type='MaskQueryLoss', at='panoptic_head', points=64), loss_region=REGION)
RCNN = dict(loss_masks=dict(type='SigmoidKDLoss', at='@roi_masks'), loss_region=REGION)
#: Kind of segmentor -> what it learns.
LOSSES = {
    'mask_rcnn': dict(RCNN, loss_defeat=dict(
        type='DeFeatLoss', at='@neck', foreground=dict(type='GTMaskRegion', mode='foreground'))),
    'rtmdet_ins': dict(KERNELS, loss_head=dict(type='BCKDLoss', at='bbox_head')),
    'condinst': dict(KERNELS, loss_head=dict(type='BCKDLoss', at='bbox_head')),
    'solov2': dict(KERNELS, loss_scores=dict(type='SigmoidKDLoss', at='@logits')),
    'mask2former': QUERIES,
    'mask2former_panoptic': QUERIES,
    'panoptic_fpn': dict(RCNN, loss_stuff=dict(type='SoftmaxKDLoss', at='semantic_head.conv_logits')),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_instances(tmp_path_factory.mktemp('data'))


def require_panoptic(kind):
    if 'panoptic' in kind:
        pytest.importorskip('panopticapi', reason='mmdet reads panoptic segments with it: pip install --no-deps '
                                                  'panopticapi-lite')


@pytest.mark.parametrize('kind', LOSSES)
def test_training(data, tmp_path, kind):
    """Two steps of a Runner: every term is there, finite and has a gradient; the student's keys stay."""
    require_panoptic(kind)
    cfg = runner_config(kind, data, tmp_path)
    teacher = dict(model=model_config(kind, 12).model.to_dict(), default_scope='mmdet')
    runner, recorder = train(cfg, [hook(teacher, LOSSES[kind])])
    for losses in recorder.losses:
        assert all(math.isfinite(value) for value in losses.values()), losses
        assert all(losses[name] > 0 for name in LOSSES[kind]), losses
    distiller = next(found for found in runner.hooks if type(found).__name__ == 'DistillHook').distiller
    assert {name for _, name in distiller.watch.proven} == set(LOSSES[kind])
    with DefaultScope.overwrite_default_scope('mmdet'):
        plain = make_runner(runner_config(kind, data, tmp_path / 'plain')).model
    assert list(runner.model.state_dict()) == list(plain.state_dict())


def loaded(cfg):
    """The samples of a config's training data."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return [dataset[index] for index in range(len(dataset))]


def test_the_region_of_real_masks(data, tmp_path):
    """Run-length masks, loaded by the host's own pipeline: the region is the label map, not the boxes."""
    cfg = runner_config('mask_rcnn', data, tmp_path)
    cfg.train_dataloader.dataset.pipeline = [step for step in cfg.train_dataloader.dataset.pipeline
                                             if step['type'] != 'RandomFlip']
    samples = [found['data_samples'] for found in loaded(cfg)]
    assert len(samples) == 3  # the picture without objects is filtered
    masks = [sample.gt_instances.masks.masks for sample in samples]
    batch = KDBatch(Targets((64, 96), source=Samples(samples)))
    fine, = GTMaskRegion()((torch.zeros(3, 1, 64, 96), ), batch)
    assert np.array_equal(fine[:, 0].bool().numpy(), np.stack([found.any(axis=0) for found in masks]))
    for sample, image in zip(samples, fine):
        boxes = sample.gt_instances.bboxes.tensor
        assert 0 < image.sum() < ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
    coarse, = GTMaskRegion()((torch.zeros(3, 1, 8, 12), ), batch)
    assert torch.allclose(coarse.sum(dim=(1, 2, 3)) * 64, fine.sum(dim=(1, 2, 3)))


def test_objects_are_the_connected_regions(data):
    """What the command has made of a scene: a car, a person and a rider, each with its own pixels."""
    import cv2
    import instance_data
    labels = np.zeros((20, 40), np.uint8)
    labels[2:8, 2:10] = labels[2:8, 20:30] = CAR
    labels[12, 2] = CAR  # too small
    found = list(instance_data.regions(labels, least=10))
    assert [(name, thing) for name, thing, _ in found] == [('car', True), ('car', True), ('road', False)]
    assert instance_data.box_of(found[0][2]) == [2, 2, 8, 6] and found[1][2].sum() == 60
    assert not any(mask[12, 2] for _, _, mask in found)
    read = instance_data.json.loads((data / 'annotations' / 'panoptic_train.json').read_text())
    first = read['annotations'][0]
    assert {read['categories'][part['category_id'] - 1]['name'] for part in first['segments_info']} == {
        'car', 'person', 'rider', 'road', 'sky'}
    ids = cv2.imread(str(data / 'panoptic_train' / first['file_name']))[..., 2]
    assert {part['id']: part['area'] for part in first['segments_info']} == {
        int(segment): int(count) for segment, count in zip(*np.unique(ids[ids > 0], return_counts=True))}


def test_weight_0_equals_no_hook(data, tmp_path):
    off = {name: dict(cfg, loss_weight=0.0) for name, cfg in KERNELS.items()}
    teacher = dict(model=model_config('solov2', 12).model.to_dict(), default_scope='mmdet')
    _, first = train(runner_config('solov2', data, tmp_path / 'plain'))
    _, second = train(runner_config('solov2', data, tmp_path / 'zero'), [hook(teacher, off)])
    assert [{name: value for name, value in step.items() if name in first.losses[0]} for step in second.losses] \
        == first.losses


def test_synthetic_batches_of_the_kinds():
    """The check of a config makes the same step on random masks."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        from kd_mm.hosts.models import build_model
        model = build_model(Config(dict(model=model_config('solov2').model, default_scope='mmdet')), 'mmdet')
    samples = synthetic_batch(model, 1, (64, 96))['data_samples']
    assert samples[0].gt_instances.masks.masks.shape[1:] == (64, 96)
