"""Data as users have it: every layout and wrapper of the hosts trains with distillation, or says why not."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layout_runs import BOXES, LOAD, RESIZE, det_config, distilled, same_pictures, teacher
from layouts import DETECTION, coco, lvis
from mmdet.models.data_preprocessors import ReIDDataPreprocessor
from mmengine.runner import IterBasedTrainLoop
from stock import hook, make_runner

from kd_mm.engine.conditions import unfit
from kd_mm.hosts.models import class_names
from kd_mm.hosts.samples import Samples
from kd_mm.lab.check import check
from kd_mm.lab.data import look_at_data


@pytest.mark.parametrize('name', DETECTION)
def test_detection_layouts(name, tmp_path):
    """The teacher's score, distilled steps, the host's own validation, and a plain checkpoint."""
    layout = DETECTION[name](tmp_path / 'data')
    run = distilled(det_config(layout, tmp_path / 'work'), score_teacher=layout.evaluator is not None)
    assert tuple(run.distiller.classes) == layout.classes and same_pictures(run)
    if layout.evaluator is not None:
        assert layout.metric in run.hook.scores.found['teacher']
        assert f'val/{layout.metric}' in run.runner.message_hub.log_scalars
    saved = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)
    assert saved['state_dict'].keys() == run.runner.model.state_dict().keys()


def test_lvis(tmp_path, monkeypatch):
    pytest.importorskip('lvis')
    monkeypatch.setattr(np, 'float', float, raising=False)  # lvis 0.5.3 is older than numpy 1.24
    layout = lvis(tmp_path / 'data')
    run = distilled(det_config(layout, tmp_path / 'work'), score_teacher=2)
    assert tuple(run.distiller.classes) == layout.classes and same_pictures(run)
    assert layout.metric in run.hook.scores.found['teacher']


# ---------------------------------------------------------------------- wrappers and samplers

PACK = dict(type='PackDetInputs')


def repeated(first, second):
    return dict(dataset=dict(type='RepeatDataset', times=2, dataset=first))


def balanced(first, second):
    return dict(dataset=dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=first))


def joined(first, second):
    return dict(dataset=dict(type='ConcatDataset', datasets=[first, second]))


def both(first, second):
    """As for VOC 2007 and 2012."""
    return dict(dataset=dict(type='RepeatDataset', times=2, dataset=joined(first, second)['dataset']),
                batch_sampler=dict(type='AspectRatioBatchSampler'))


def sampled(**sampler):
    return lambda first, second: dict(joined(first, second), sampler=sampler)


def by_source(first, second):
    return dict(joined(first, second), sampler=dict(type='MultiDataSampler', dataset_ratio=[1, 2]), batch_sampler=dict(
        type='MultiDataAspectRatioBatchSampler', num_datasets=2, batch_size=[1, 2]))


def mixed(loading, *transforms):
    def wrap(first, second):
        return dict(dataset=dict(type='MultiImageMixDataset', dataset=dict(first, pipeline=loading),
                                 pipeline=[*transforms, PACK]))
    return wrap


WRAPPERS = dict(
    repeat=repeated, balanced=balanced, concat=joined, nested=both,
    aspect=lambda first, second: dict(dataset=first, batch_sampler=dict(type='AspectRatioBatchSampler')),
    infinite=lambda first, second: dict(dataset=first, sampler=dict(type='InfiniteSampler')),
    class_aware=lambda first, second: dict(dataset=first, sampler=dict(type='ClassAwareSampler')),
    multi_source=sampled(type='MultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
    group_source=sampled(type='GroupMultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
    sample_size=sampled(type='CustomSampleSizeSampler', dataset_size=[2, -1]), multi_data=by_source,
    mosaic=mixed([LOAD, BOXES], dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0), dict(
        type='RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-32, -32)), dict(
        type='MixUp', img_scale=(64, 64), ratio_range=(0.8, 1.6), pad_val=114.0)),
    copy_paste=mixed([LOAD, dict(BOXES, with_mask=True), RESIZE, dict(type='Pad', size=(64, 64))], dict(
        type='CopyPaste', max_num_pasted=3)),
    cached_mosaic=lambda first, second: dict(dataset=dict(first, pipeline=[
        LOAD, BOXES, dict(type='CachedMosaic', img_scale=(64, 64), pad_val=114.0),
        dict(type='CachedMixUp', img_scale=(64, 64), ratio_range=(1.0, 1.0), max_cached_images=4), RESIZE, PACK])))


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    return [coco(tmp_path_factory.mktemp('first')), coco(tmp_path_factory.mktemp('second'))]


def plain(layout):
    """Without validation."""
    layout = copy.deepcopy(layout)
    layout.evaluator = None
    return layout


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers_and_samplers(name, two, tmp_path):
    sets = [dict(layout.dataset, pipeline=[LOAD, BOXES, RESIZE, PACK]) for layout in two]
    run = distilled(det_config(plain(two[0]), tmp_path / 'work', steps=1, **WRAPPERS[name](*sets)))
    assert tuple(run.distiller.classes) == two[0].classes and same_pictures(run)


def test_joined_sets_of_different_classes(two, tmp_path):
    """mmdet's ConcatDataset then has a list for metainfo; a teacher's names cannot be compared with it."""
    sets = [dict(layout.dataset, pipeline=[LOAD, BOXES, RESIZE, PACK]) for layout in two]
    sets[1]['metainfo'] = dict(classes=('disc', 'square'))
    cfg = det_config(plain(two[0]), tmp_path / 'work', steps=1, **joined(*sets))
    run = distilled(cfg)
    assert run.distiller.classes is None and same_pictures(run)
    assert 'the data sets that are joined have different classes' in next(
        (tmp_path / 'work').glob('*/*.log')).read_text()
    saved = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)
    assert class_names(cfg) is None and class_names(None, saved) is None
    saved['meta']['dataset_meta'][1]['classes'] = two[0].classes
    assert class_names(None, saved) == list(two[0].classes)
    assert not look_at_data(cfg, 3).problems


# ---------------------------------------------------------------------- what images may hold


def test_no_object_crowds_and_ignored_ones(two, tmp_path):
    """Regions read what the host learns from: no crowd (a mask of run lengths), nothing ignored."""
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck'), loss_mask=dict(
        type='FitNetLoss', at='neck', region=dict(type='GTMaskRegion')))
    pipeline = [LOAD, dict(BOXES, with_mask=True), RESIZE, PACK]
    run = distilled(det_config(plain(two[0]), tmp_path / 'work', pipeline=pipeline, batch_size=4), losses)
    samples = {sample.img_id: sample for sample in run.watch.batches[0]['data_samples']}
    assert len(samples) == 4 and same_pictures(run)
    crowd = samples[100].ignored_instances
    assert crowd.bboxes.tensor.tolist() == [[0, 0, 20, 48]] and bool(crowd.masks.masks.any())
    assert all(len(Samples([sample]).boxes()[0]) == len(Samples([sample]).masks()[0]) == (0 if number == 103 else 2)
               for number, sample in samples.items())
    assert Samples([samples[103], samples[100]]).masks()[0].shape[0] == 0


def test_batches_without_any_object(two, tmp_path):
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck'), loss_box=dict(
        type='FitNetLoss', at='neck', region=dict(type='GTBoxRegion')), loss_cross=dict(
        type='CrossKDLoss', at='bbox_head'))
    layout = plain(two[0])
    layout.dataset.update(indices=[3])
    cfg = det_config(layout, tmp_path / 'work')
    cfg.model.bbox_head.stacked_convs = 2
    run = distilled(cfg, losses, copy.deepcopy(cfg))
    assert all(len(sample.gt_instances) == 0 for sample in run.watch.batches[0]['data_samples'])
    assert all(step['loss_fgd'] > 0 for step in run.watch.losses)


def test_one_image_a_step_of_random_size(two, tmp_path):
    """Frozen statistics, a size of its own for each image, and another one for each batch."""
    pipeline = [LOAD, BOXES, dict(type='RandomChoiceResize', scales=[(64, 64), (96, 80)], keep_ratio=True), PACK]
    cfg = det_config(plain(two[0]), tmp_path / 'work', steps=4, pipeline=pipeline, batch_size=1)
    cfg.model.backbone.norm_eval = True
    cfg.model.data_preprocessor.batch_augments = [dict(
        type='BatchSyncRandomResize', random_size_range=(64, 160), size_divisor=32, interval=1)]
    run = distilled(cfg)
    assert same_pictures(run) and len({inputs.shape for inputs in run.watch.seen['student']}) > 1


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_four_bands_of_16_bits(suffix, tmp_path):
    """The preprocessor of mmdet takes a mean of 1 or 3 channels: the pipeline normalises."""
    layout = plain(coco(tmp_path / 'data', channels=4, depth=np.uint16, suffix=suffix))
    pipeline = [dict(LOAD, color_type='unchanged'), BOXES, RESIZE, dict(type='RandomFlip', prob=0.5), dict(
        type='Normalize', mean=[10000.0] * 4, std=[8000.0, 9000.0, 10000.0, 11000.0], to_rgb=False), PACK]
    cfg = det_config(layout, tmp_path / 'work', pipeline=pipeline)
    norm = dict(mean=None, std=None, bgr_to_rgb=False)
    cfg.merge_from_dict(dict(model=dict(backbone=dict(in_channels=4), data_preprocessor=norm)))
    run = distilled(cfg, model=teacher(cfg, norm))
    assert same_pictures(run) and all(
        inputs.shape[1] == 4 and float(inputs.max()) > 2 for inputs in run.watch.seen['teacher'])
    assert not look_at_data(cfg, 2).problems


# ---------------------------------------------------------------------- what is refused


def test_data_that_are_no_batches_of_pictures(two, tmp_path):
    kind = 'TrackDataPreprocessor'
    cfg = det_config(plain(two[0]), tmp_path / 'work')
    cfg.model.data_preprocessor = dict(type=kind, mean=[1.0] * 3, std=[1.0] * 3)
    cfg.custom_hooks = [hook(teacher(cfg), dict(loss_f=dict(type='FitNetLoss', at='neck')))]
    with pytest.raises(ValueError, match=f'{kind}.* not supported'):
        make_runner(cfg).train()
    assert any(kind in problem for problem in check(cfg).problems)
    other = ReIDDataPreprocessor.__new__(ReIDDataPreprocessor)  # to make one takes mmpretrain
    assert 'are no detectors and not supported' in unfit(SimpleNamespace(data_preprocessor=other))
    clouds = type('Det3DDataPreprocessor', (torch.nn.Module, ), {})()  # by its name: MMDet3D is not installed
    assert 'models of point clouds' in unfit(SimpleNamespace(data_preprocessor=clouds))
    assert unfit(make_runner(det_config(plain(two[0]), tmp_path / 'work')).model) is None


def test_regions_of_masks_that_nobody_loads(two, tmp_path, monkeypatch):
    monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', lambda *_: pytest.fail('a step was run'))
    loss = dict(type='FitNetLoss', at='neck', region=dict(type='GTMaskRegion'))
    with pytest.raises(ValueError, match='loss_mask: this region needs instance masks .* with_mask=True'):
        distilled(det_config(plain(two[0]), tmp_path / 'work'), dict(loss_mask=loss))
