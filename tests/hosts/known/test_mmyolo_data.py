"""Data as users of MMYOLO have them, with distillation: its wrappers, sets, pictures, test-time augmentation."""

import copy
import json

import numpy as np
import pytest
import torch

pytest.importorskip('mmyolo', reason='MMYOLO is not installed: make test STACK=yolo')

from layout_runs import BOXES, LOAD, META, distilled, loader, same_pictures, without_objects  # noqa: E402
from layouts import coco, crowdhuman, voc  # noqa: E402
from pairs import kd_mm, message  # noqa: E402
from stock import make_runner  # noqa: E402
from yolo import CONFIGS, SIZE, as_teacher, trainable, yolo_config  # noqa: E402

from kd_mm.engine.distiller import Distiller  # noqa: E402
from kd_mm.hosts.models import build_model  # noqa: E402
from kd_mm.hosts.samples import samples_of  # noqa: E402
from kd_mm.lab.models import random_batch, scope_of  # noqa: E402

pytestmark = pytest.mark.yolo
FIT = dict(type='LetterResize', scale=SIZE, allow_scale_up=True, pad_val=dict(img=114))
PACK = dict(type='mmdet.PackDetInputs')
PIPELINE = [LOAD, BOXES, FIT, PACK]
LOSSES = dict(loss_fgd=dict(type='FGDLoss', at='@neck', adapter=None),
              loss_logits=dict(type='SigmoidKDLoss', at='@logits'),
              loss_region=dict(type='FitNetLoss', at='@neck', adapter=None, region=dict(type='GTBoxRegion')))
#: Of the teachers: another mean and std than the students'.
NORM = dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0])


def config(dataset, work_dir, family='yolov8', classes=2, **train):
    """Two steps on a data set, by the collate function of the family's loader; ``train``: entries of the loader."""
    cfg = trainable(yolo_config(family), work_dir, work_dir, 1)
    cfg.model.bbox_head.head_module.num_classes = classes
    for part in (cfg.model.train_cfg or {}).values():
        if isinstance(part, dict) and 'num_classes' in part:
            part.num_classes = classes
    cfg.train_dataloader = dict(cfg.train_dataloader, dataset=dataset, **{'batch_size': 2, **train})
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    return cfg


def other(cfg, **norm):
    """A teacher of the same form that normalises in another way."""
    found = as_teacher(cfg)
    found['model']['data_preprocessor'].update(norm or NORM)
    return found


def run(cfg, losses=None, **norm):
    found = distilled(cfg, losses or LOSSES, other(cfg, **norm))
    assert same_pictures(found)
    return found


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    found = [coco(tmp_path_factory.mktemp(name), 'YOLOv5CocoDataset') for name in ('first', 'second')]
    return [dict(layout.dataset, pipeline=PIPELINE) for layout in found]


LOADING = [LOAD, BOXES]
WRAPPERS = dict(
    repeat=lambda one, two: dict(type='RepeatDataset', times=2, dataset=one),
    balanced=lambda one, two: dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=one),
    concat=lambda one, two: dict(type='ConcatDataset', datasets=[one, two]),
    nested=lambda one, two: dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[one, two])),
    mixed=lambda one, two: dict(type='mmdet.MultiImageMixDataset', dataset=dict(one, pipeline=LOADING), pipeline=[
        dict(type='mmdet.Mosaic', img_scale=SIZE, pad_val=114.0), dict(type='mmdet.Resize', scale=SIZE), PACK]),
    # Its own transforms take the other pictures from the data set, which hands itself to the pipeline.
    own=lambda one, two: dict(type='RepeatDataset', times=2, dataset=dict(one, pipeline=[
        *LOADING, dict(type='Mosaic', img_scale=SIZE, pad_val=114.0, pre_transform=LOADING),
        dict(type='YOLOv5RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-SIZE[0] // 2, -SIZE[1] // 2),
             border_val=(114, 114, 114)),
        dict(type='YOLOv5MixUp', prob=1.0, pre_transform=[*LOADING, dict(
            type='Mosaic', img_scale=SIZE, pad_val=114.0, pre_transform=LOADING), dict(
            type='YOLOv5RandomAffine', border=(-SIZE[0] // 2, -SIZE[1] // 2), border_val=(114, 114, 114))]),
        dict(type='YOLOv5HSVRandomAug'), dict(type='mmdet.RandomFlip', prob=0.5), PACK])),
    own_cached=lambda one, two: dict(one, pipeline=[
        *LOADING, dict(type='Mosaic', img_scale=SIZE, pad_val=114.0, use_cached=True, max_cached_images=4),
        dict(type='mmdet.RandomCrop', crop_size=SIZE, allow_negative_crop=True), FIT, PACK]))


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers(name, two, tmp_path):
    found = run(config(WRAPPERS[name](*copy.deepcopy(two)), tmp_path / 'work'))
    assert tuple(found.distiller.classes) == ('square', 'disc')


def test_its_sets(tmp_path):
    """VOC and CrowdHuman in their own layout, with what is difficult, a crowd or ignored; no region contains these."""
    for name, layout in (('voc', voc(tmp_path / 'voc', kind='YOLOv5VOCDataset')),
                         ('crowd', crowdhuman(tmp_path / 'crowd'))):
        layout.dataset['type'] = layout.dataset['type'].replace('CrowdHumanDataset', 'YOLOv5CrowdHumanDataset')
        dataset = dict(layout.dataset, pipeline=PIPELINE)
        found = run(config(dataset, tmp_path / name / 'work', classes=len(layout.classes)))
        assert tuple(found.distiller.classes) == layout.classes


def test_no_crowd_and_nothing_ignored(two, tmp_path):
    """In the first picture there are, besides two objects, a crowd and an ignored one; in the last one is nothing."""
    cfg = config(two[0], tmp_path / 'work', batch_size=4)
    found = run(cfg)
    boxes = samples_of(dict(found.watch.batches[0]['data_samples'], img_metas=[{}] * 4)).boxes()
    assert sorted(map(len, boxes)) == [0, 2, 2, 2]


@pytest.mark.parametrize('family', CONFIGS)
def test_batches_without_any_object(family):
    """Nothing is assigned: what needs no object is learned from, and regions of boxes weigh nothing."""
    cfg = yolo_config(family)
    torch.manual_seed(0)
    losses = copy.deepcopy(LOSSES)
    if family in ('yolov6', 'yolov6_m', 'yolov8', 'yolox', 'rtmdet'):
        losses['loss_crosskd'] = dict(type='CrossKDLoss', at='bbox_head')
    with scope_of(cfg):
        model = build_model(cfg, None)
        model.init_weights()
        distiller = Distiller(model.train(), other(cfg), losses, teacher_ckpt='random', scope='mmyolo', max_steps=10)
        found = without_objects(model, distiller, random_batch(model, 2, SIZE))
    assert set(losses) <= set(found)


@pytest.mark.parametrize('family', ['yolov8', 'yolox'])
def test_one_picture_a_step_with_frozen_statistics(family, two, tmp_path):
    cfg = config(two[0], tmp_path / 'work', family, batch_size=1)
    cfg.model.backbone.norm_eval = True
    found = run(cfg)
    assert {inputs.shape[0] for inputs in found.watch.seen['teacher']} == {1}


@pytest.mark.parametrize('channels, depth', [(1, np.uint8), (4, np.uint16)])
def test_grey_and_four_bands_of_16_bits(channels, depth, tmp_path):
    """Grey ones are normalised by the preprocessor, which takes a mean of one or three; of four bands by the
    pipeline."""
    layout = coco(tmp_path / 'data', 'YOLOv5CocoDataset', channels=channels, depth=depth)
    load = dict(LOAD, color_type='unchanged' if channels == 4 else 'grayscale')
    pipeline, norm = [load, BOXES, FIT, PACK], dict(mean=[0.0], std=[255.0], bgr_to_rgb=False)
    theirs = dict(mean=[100.0], std=[50.0])
    if channels == 4:
        pipeline.insert(3, dict(type='mmdet.Normalize', mean=[9000.0] * 4, std=[8000.0, 9000.0, 10000.0, 11000.0],
                                to_rgb=False))
        norm = theirs = dict(mean=None, std=None, bgr_to_rgb=False)
    cfg = config(dict(layout.dataset, pipeline=pipeline), tmp_path / 'work')
    cfg.merge_from_dict(dict(model=dict(backbone=dict(input_channels=channels), data_preprocessor=norm)))
    found = run(cfg, **theirs)
    assert {inputs.shape[1] for inputs in found.watch.seen['teacher']} == {channels}


def with_test(cfg, train_set, evaluator):
    test = [LOAD, dict(type='YOLOv5KeepRatioResize', scale=SIZE), dict(FIT, allow_scale_up=False), BOXES,
            dict(PACK, meta_keys=(*META, 'pad_param'))]
    dataset = dict(train_set, test_mode=True, pipeline=test, batch_shapes_cfg=dict(
        type='BatchShapePolicy', batch_size=2, img_size=SIZE[0]))
    for kind, loop in (('val', 'ValLoop'), ('test', 'TestLoop')):
        cfg[f'{kind}_dataloader'] = loader(dataset, (), 2, False)
        cfg[f'{kind}_evaluator'] = copy.deepcopy(evaluator)
        cfg[f'{kind}_cfg'] = dict(type=loop)
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=20, nms_pre=100)
    return cfg


def test_validation_the_switch_to_deploy_and_its_test_time_augmentation(tmp_path):
    """Its validation with batch shapes scores both; a test after `SwitchToDeployHook` is that of the plain student."""
    layout = coco(tmp_path / 'data', 'YOLOv5CocoDataset')
    dataset = dict(layout.dataset, pipeline=PIPELINE)
    evaluator = dict(layout.evaluator, type='mmdet.CocoMetric')
    cfg = with_test(config(dataset, tmp_path / 'work', 'yolov6'), dataset, evaluator)
    found = distilled(cfg, LOSSES, other(cfg), score_teacher=True)
    assert layout.metric in found.hook.scores.found['teacher']
    assert f'val/{layout.metric}' in found.runner.message_hub.log_scalars
    weights = tmp_path / 'work' / 'iter_2.pth'
    plain = copy.deepcopy(cfg)
    plain.load_from = str(weights)
    scores = []
    for hooks in ([], [dict(type='SwitchToDeployHook')]):
        runner = make_runner(plain, hooks)
        scores.append(runner.test())
        assert bool(hooks) == any(hasattr(module, 'rbr_reparam') for module in runner.model.modules())
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and layout.metric in scores[0]
    # As its base config det_p5_tta.py, with two small scales.
    cfg.tta_model = dict(type='mmdet.DetTTAModel', tta_cfg=dict(
        nms=dict(type='nms', iou_threshold=0.65), max_per_img=20))
    cfg.tta_pipeline = [LOAD, dict(type='TestTimeAug', transforms=[
        [dict(type='Compose', transforms=[dict(type='YOLOv5KeepRatioResize', scale=size), dict(
            FIT, scale=size, allow_scale_up=False)]) for size in ((96, 96), (128, 128))],
        [dict(type='mmdet.RandomFlip', prob=1.), dict(type='mmdet.RandomFlip', prob=0.)],
        [dict(type='mmdet.LoadAnnotations', with_bbox=True)],
        [dict(PACK, meta_keys=(*META, 'pad_param', 'flip', 'flip_direction'))]])]
    cfg.custom_hooks = []
    cfg.test_dataloader.dataset.pop('batch_shapes_cfg')
    cfg.dump(str(tmp_path / 'config.py'))
    result = kd_mm('test', tmp_path / 'config.py', weights, '--tta', '--work-dir', tmp_path / 'tta')
    assert result.exit_code == 0, message(result)
    score, = (json.loads(file.read_text().splitlines()[-1]) for file in (tmp_path / 'tta').glob('*/*.json'))
    assert 0 <= score[layout.metric] <= 1
