"""Pictures while it trains: what they show, and that the training does not know of them."""

import copy
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_coco
from detrs import batch_of, build_detr
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import detector, hook, same, segmentor, teacher_of, traces, train, weights, wide

from kd_mm import DistillVisHook
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.pictures import Lookout
from kd_mm.engine.preflight import random_data
from kd_mm.engine.vis import WIDTH, fixed_images, light_copy
from kd_mm.hosts.models import build_model
from kd_mm.hosts.zoo import zoo_config

VIS = dict(type='kd_mm.DistillVisHook', interval=2, images=[5])
DET = dict(
    loss_fgd=dict(type='FGDLoss', at='neck', levels=[0, 1]),
    loss_fit=dict(type='FitNetLoss', at='neck', levels=[0], region=dict(type='GTBoxRegion'), adapter=dict(
        type='SequentialAdapter', adapters=[dict(type='ConvAdapter', norm=True),
                                            dict(type='RunningStandardiseAdapter')])),
    loss_logit=dict(type='SigmoidKDLoss', at='bbox_head.retina_cls', levels=[0], teacher='mean'),
    loss_bckd=dict(type='BCKDLoss', at='bbox_head', teacher='peer'))
SEG = dict(
    loss_bank=dict(type='CIRKDMemoryLoss', at='decode_head.conv_seg', num_classes=19, pixel_memory=64,
                   region_memory=32, pixels_per_image=4, pixel_keys=16, region_keys=8),
    loss_fit=dict(type='FitNetLoss', at='backbone', levels=[2], region=dict(type='EdgeRegion')))


@pytest.fixture
def det(tmp_path):
    cfg = detector(write_coco(tmp_path / 'coco', size=(96, 128)), tmp_path / 'work', steps=3)
    cfg.train_dataloader.dataset.pipeline[2].scale = (120, 90)  # padded to 96x128
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'work', steps=3)


def both_ways(cfg, distillation):
    """The Runner and what was seen, with pictures and without."""
    found = []
    for name, hooks in (('with', [distillation, VIS]), ('without', [distillation])):
        cfg.work_dir = str(Path(cfg.work_dir).with_name(name))
        runner, record = train(cfg, hooks, look=lambda runner: (torch.get_rng_state(), np.random.get_state()[1].copy()))
        found.append((runner, record))
    return found


def pictures_of(runner):
    return {path.name: cv2.imread(str(path)) for path in Path(runner.work_dir).glob('distill_vis/*.png')}


def unchanged(first, second):
    (runner, record), (plain, plain_record) = first, second
    assert same(weights(runner), weights(plain)) and record.losses == plain_record.losses
    for (state, numpy), (other, other_numpy) in zip(record.seen, plain_record.seen):
        assert torch.equal(state, other) and (numpy == other_numpy).all()
    assert traces(runner.model) == traces(plain.model)


def test_a_detector_with_three_kinds_of_teachers(det):
    """A running mean, a batch norm, a mean teacher and a peer: none of them notices."""
    teachers = dict(big=dict(teacher=wide(det), teacher_ckpt='random'), mean=dict(teacher=dict(type='EMATeacher')),
                    peer=dict(teacher=dict(type='PeerTeacher', config=dict(model=det.model.to_dict(),
                                                                           default_scope='mmdet'))))
    losses = copy.deepcopy(DET)
    for name in ('loss_fgd', 'loss_fit'):
        losses[name]['teacher'] = 'big'
    first, second = both_ways(det, dict(type='kd_mm.DistillHook', teachers=teachers, losses=losses))
    unchanged(first, second)
    states = [torch.load(str(Path(runner.work_dir) / 'iter_3.pth'), weights_only=False)['kd_mm']
              for runner, _ in (first, second)]
    assert same(states[0]['state_dict'], states[1]['state_dict'])  # adapters with their statistics
    found = pictures_of(first[0])
    assert sorted(found) == [f'image_0_step_{step}.png' for step in (0, 2, 3)]
    for picture in found.values():
        assert picture.shape[1] == WIDTH + 12 and picture.std() > 20
    assert (found['image_0_step_0.png'].shape == found['image_0_step_3.png'].shape
            and (found['image_0_step_0.png'] != found['image_0_step_3.png']).any())  # the student has changed
    kept = [path.name for path in Path(first[0].work_dir).rglob('vis_data/vis_image/**/*.png')]
    assert len(kept) == 3  # what every backend of the visualizer got
    assert not pictures_of(second[0])


def test_drawing_is_no_waiting_for_data(det, monkeypatch):
    """Nor is it part of a step: the times in the log are those of a training without pictures."""
    draw = DistillVisHook._draw

    def slowly(self, runner, step):
        draw(self, runner, step)
        time.sleep(3)

    monkeypatch.setattr(DistillVisHook, '_draw', slowly)
    times = []

    def look(runner):
        hub = runner.message_hub
        times.append([hub.get_scalar(f'train/{name}').current() for name in ('time', 'data_time')])

    det.train_cfg.max_iters = 4
    train(det, [hook(wide(det), dict(loss_fit=dict(type='FitNetLoss', at='neck', levels=[0]))), dict(VIS, images=1)],
          look)
    assert len(times) == 4 and max(sum(times, [])) < 3


def test_a_segmentor_with_a_memory_bank(seg):
    first, second = both_ways(seg, hook(teacher_of(seg, backbone=dict(base_channels=12, stem_channels=12),
                                                   decode_head=dict(in_channels=96),
                                                   auxiliary_head=dict(in_channels=48)), SEG))
    unchanged(first, second)
    states = [torch.load(str(Path(runner.work_dir) / 'iter_3.pth'), weights_only=False)['kd_mm']
              for runner, _ in (first, second)]
    assert same(states[0]['state_dict'], states[1]['state_dict'])  # the bank has seen the batches alone
    assert len(pictures_of(first[0])) == 3


def look_at(student, teacher, losses, scope, data):
    kd = Distiller(student, teacher, losses, scope=scope, **({} if isinstance(teacher, torch.nn.Module) else dict(
        teacher_ckpt='random')))
    before = traces(student)
    found = Lookout(kd.current).look(data['inputs'][:1], data['data_samples'][:1])
    assert traces(student) == before and all(tap._swap is None for tap in kd.current.taps.values())
    return found


def test_tokens_are_drawn_as_the_maps_that_they_are():
    cfg = Config.fromfile(str(zoo_config('mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')))
    cfg.model.backbone.update(init_cfg=None, embed_dims=8, num_heads=[1, 2, 5, 8], num_layers=[1, 1, 1, 1])
    cfg.model.decode_head.update(in_channels=[8, 16, 40, 64], channels=16, norm_cfg=dict(type='BN'))
    student = build_model(cfg, 'mmseg')
    losses = dict(loss_a=dict(type='FitNetLoss', at='backbone.layers.1.1.0'))
    levels, missing = look_at(student, dict(model=cfg.model.to_dict(), default_scope='mmseg'), losses, 'mmseg',
                              random_data(student, (64, 128)))
    assert not missing and [values.shape for values in levels[0].maps.values()] == [(8, 16), (8, 16)]
    assert levels[0].others['pull'].shape == (8, 16) and levels[0].others['pull'].max() > 0


def test_queries_are_said_to_have_no_maps():
    student, teacher, data = build_detr('deformable'), build_detr('deformable', seed=1), batch_of(
        build_detr('deformable'))
    losses = dict(loss_q=dict(type='DETRDistillLogitsLoss', at='bbox_head'),
                  loss_m=dict(type='FitNetLoss', at='@memory', region=dict(type='GTBoxRegion')))
    student.eval()
    levels, missing = look_at(student, teacher, losses, 'mmdet', data)
    assert list(missing) == ['loss_q'] and 'loss_m' in levels[0].title
    region = levels[0].others['region']
    assert region.shape == next(iter(levels[0].maps.values())).shape and region.max() == 1


def test_the_pull_is_the_gradient_at_each_cell(det):
    student = build_model(Config(dict(model=det.model, default_scope='mmdet')), 'mmdet')
    student.init_weights()
    data = random_data(student, (64, 64))
    kd = Distiller(student, teacher_of(det), dict(loss_f=dict(type='FitNetLoss', at='neck', levels=[0],
                                                            loss_weight=3.0)), teacher_ckpt='random', scope='mmdet')
    levels, _ = Lookout(kd.current).look(data['inputs'][:1], data['data_samples'][:1])
    student.eval()
    own = student.extract_feat(data['inputs'][:1])[0].detach().requires_grad_()
    with torch.no_grad():
        theirs = kd.teacher.model.extract_feat(data['inputs'][:1])[0]
    (3.0 * kd.terms['loss_f'].loss.per_level(own, theirs)[0]).backward()
    want = own.grad[0].norm(dim=0).numpy()
    assert np.allclose(levels[0].others['pull'], want[:levels[0].others['pull'].shape[0]], rtol=1e-4)


def test_transforms_that_remember_images_do_not_remember_these(det):
    """With num_workers=0 the loader uses the very same transforms; the annotations are shared, not copied."""
    import mmdet.datasets  # noqa: F401  (registers)
    from mmdet.registry import DATASETS
    section = copy.deepcopy(det.train_dataloader.dataset)
    section.pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    mosaic = dict(type='CachedMosaic', img_scale=(64, 64), max_cached_images=8, random_pop=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(dict(type='RepeatDataset', times=2, dataset=dict(
            type='MultiImageMixDataset', dataset=section, pipeline=[mosaic, dict(type='PackDetInputs')])))
    student = build_model(Config(dict(model=det.model, default_scope='mmdet')), 'mmdet')
    inner = dataset.dataset.dataset
    assert light_copy(dataset).dataset.dataset.data_bytes is inner.data_bytes
    found = fixed_images(dataset, 2, student)
    assert len(found) == 2 and found[0][0].dtype == np.uint8 and found[0][1]['inputs'].shape[0] == 1
    assert dataset.dataset.pipeline[0].results_cache == []


def test_wrong_arguments_are_refused_before_the_first_step(det):
    for arguments, said in ((dict(interval=0), 'interval=0'), (dict(images=-1), 'images=-1'),
                            (dict(images=[1, -2]), r'images\[1\]=-2'), (dict(score_thr=2), 'score_thr=2')):
        with pytest.raises(ValueError, match=said):
            DistillVisHook(**arguments)
    with pytest.raises(ValueError, match='custom_hooks has none'):
        train(det, [VIS])
    with pytest.raises(ValueError, match='there are 8 images, so no index 99'):
        train(det, [hook(wide(det), dict(loss_f=dict(type='FitNetLoss', at='neck'))), dict(VIS, images=[99])])
    with pytest.raises(ValueError, match='generator. has no indices'):
        fixed_images((index for index in range(3)), 2, None)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match='images=.. must be a list that is not empty'):
        DistillVisHook(images=[])
