"""Grey pictures and pictures of other numbers of bands: student, teacher, and what lies between them."""

import copy

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from stock import detector, distill_hook, hook, make_runner, segmentor, teacher_of, train
from torch import nn

from kd_mm.hosts.models import build_model
from kd_mm.hosts.samples import Samples
from kd_mm.hosts.synthetic import input_channels, synthetic_batch
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.check import check
from kd_mm.teachers.base import Teacher
from kd_mm.types.batch import KDBatch, Targets

GREY = dict(mean=[114.0], std=[57.0], bgr_to_rgb=False)
PKD = dict(loss_pkd=dict(type='PKDLoss', at='neck'))


@TRANSFORMS.register_module()
class AppendBand(BaseTransform):
    """A fourth band: the mean of the others."""

    def transform(self, results):
        results['img'] = np.concatenate([results['img'], results['img'].mean(2, keepdims=True)], 2).astype(np.uint8)
        return results


def grey(cfg):
    cfg = copy.deepcopy(cfg)
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    cfg.merge_from_dict(dict(model=dict(data_preprocessor=GREY, backbone=dict(in_channels=1))))
    return cfg


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detector(coco_root, tmp_path_factory.mktemp('det'))


def test_grey_detectors_train_and_are_checked(det):
    cfg = grey(det)
    entry = hook(teacher_of(cfg), PKD)
    runner, recorder = train(cfg, [entry])
    assert all(losses['loss_pkd'] > 0 for losses in recorder.losses) and len(recorder.losses) == 2
    assert input_channels(runner.model) == 1 and distill_hook(runner).distiller.teacher.notes == []
    cfg.custom_hooks = [entry]
    assert check(cfg, shape=(64, 64), batch=2).problems == []


def test_four_bands_train(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='AppendBand'))
    cfg.merge_from_dict(dict(model=dict(backbone=dict(in_channels=4), data_preprocessor=dict(
        mean=[1.0, 2.0, 3.0, 4.0], std=[50.0, 51.0, 52.0, 53.0], bgr_to_rgb=False))))
    losses = dict(loss_kd=dict(type='CWDLoss', at='decode_head.conv_seg'))
    other = teacher_of(cfg, data_preprocessor=dict(mean=[5.0, 6.0, 7.0, 8.0]))
    runner, recorder = train(cfg, [hook(other, losses)])
    assert input_channels(runner.model) == 4 and all(step['loss_kd'] > 0 for step in recorder.losses)
    cfg.custom_hooks = [hook(other, losses)]
    assert check(cfg, shape=(64, 64), batch=2).problems == []
    colour = teacher_of(segmentor(cityscapes_root, tmp_path))
    with pytest.raises(ValueError, match=r'takes pictures of 3 channels and the student \(4 channels\).*in_channels of '
                                         r'its backbone'):
        train(cfg, [hook(colour, losses)])


def through(model, pictures):
    from mmdet.structures import DetDataSample
    samples = [DetDataSample(metainfo=dict(img_shape=tuple(picture.shape[1:]))) for picture in pictures]
    return model.data_preprocessor(dict(inputs=[picture.clone() for picture in pictures], data_samples=samples), False)


@pytest.mark.parametrize('rgb', [True, False])
def test_grey_and_colour_are_what_the_teachers_own_pictures_would_be(det, rgb):
    """Against the teacher's preprocessor and cv2's reading of the same picture, padding included."""
    colour = copy.deepcopy(det)
    colour.model.data_preprocessor.bgr_to_rgb = rgb
    draw = np.random.default_rng(0)
    bgr = [draw.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 64), (64, 50))]
    pictures = {3: [torch.from_numpy(picture).permute(2, 0, 1) for picture in bgr],
                1: [torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))[None] for picture in bgr]}
    models = {3: make_runner(colour).model, 1: make_runner(grey(det)).model}
    configs = {3: colour, 1: grey(det)}
    for own, wanted in ((1, 3), (3, 1)):
        teacher = Teacher.build(teacher_of(configs[wanted]), models[own], 'random', scope='mmdet')
        batch = through(models[own], pictures[own])
        shown = [picture.expand(3, -1, -1) for picture in pictures[1]] if wanted == 3 else pictures[1]
        expected = through(teacher.model, shown)['inputs']
        found = teacher.renormalise(batch['inputs'], KDBatch(Targets(
            tuple(batch['inputs'].shape[-2:]), source=Samples(batch['data_samples']))))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.6 / 57)  # cv2 rounds to whole levels
        assert 'three times' in teacher.notes[0] if wanted == 3 else f'{"RGB" if rgb else "BGR"}, becomes grey' \
            in teacher.notes[0]


def test_grey_student_learns_from_a_colour_teacher(det):
    _, recorder = train(grey(det), [hook(teacher_of(det), PKD)])
    assert all(np.isfinite(losses['loss_pkd']) and losses['loss_pkd'] > 0 for losses in recorder.losses)


@pytest.mark.parametrize('name, channels', [
    ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', (3, )), ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', (1, 3, 5)),
    ('mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', (1, 6)),
    ('mmseg::unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128.py', (1, 4))])
def test_channels_are_found(name, channels):
    """Convolutions, patch embeddings, and YOLOX, whose first convolution sees four pixels of each channel."""
    cfg = Config.fromfile(str(zoo_config(name)))
    for count in channels:
        if 'yolox' not in name:
            cfg.model.backbone.in_channels = count
            cfg.model.data_preprocessor.update(mean=[9.0], std=[9.0], bgr_to_rgb=False)
        model = build_model(cfg, cfg.default_scope).train()
        state = torch.get_rng_state()
        assert input_channels(model) == count
        assert synthetic_batch(model, 1, (64, 64))['inputs'][0].shape == (count, 64, 64)
        assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in [model, model.backbone])
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert input_channels(nn.Sequential(nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1))) == 7
    assert input_channels(nn.Identity()) == 3


def test_a_teacher_config_that_names_a_missing_file(det):
    """The file is the teacher's, and the message says so."""
    with pytest.raises(ValueError, match='teacher mmdet::ld/.* cannot be built: its own config names a file that is '
                                         'not there: .*gfl_r101'):
        Teacher.build('mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py', make_runner(det).model, 'random', scope='mmdet')
