"""Segmentation sets as users have them: every layout and wrapper of mmseg trains with distillation."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from layout_runs import LOAD, distilled, loader, pictures, same_pictures, seg_config, teacher
from layouts import Layout, scenes, segmentation, write_picture
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from pairs import kd_mm, message

from kd_mm.lab.data import look_at_data
from kd_mm.types.targets import seg_map, valid_pixels

RESIZE = dict(type='Resize', scale=(64, 64), keep_ratio=True)
PACK = dict(type='PackSegInputs')


def ade(root):
    return segmentation(root, 'ADE20KDataset', split='training', folders=('images', 'annotations'))


def voc_aug(root):
    """The official part and the additional one, with label maps in another folder."""
    first, second = (segmentation(root / name, 'PascalVOCDataset', folders=('JPEGImages', folder), seed=seed)
                     for seed, (name, folder) in enumerate((('voc', 'SegmentationClass'),
                                                            ('aug', 'SegmentationClassAug'))))
    found = copy.deepcopy(first)
    found.dataset = dict(type='ConcatDataset', datasets=[first.dataset, second.dataset])
    return found


LAYOUTS = dict(
    ade=ade, voc_aug=voc_aug, potsdam=lambda root: segmentation(root, 'PotsdamDataset'),
    vaihingen=lambda root: segmentation(root, 'ISPRSDataset'),
    own=lambda root: segmentation(root, classes=('ground', 'square', 'disc')))


def piped(cfg, phase):
    """Give the data sets inside a wrapper the pipeline that the wrapper got."""
    dataset = cfg[f'{phase}_dataloader'].dataset
    if 'datasets' in dataset:
        pipeline = dataset.pop('pipeline')
        test = dataset.pop('test_mode', False)
        for part in dataset.datasets:
            part.update(pipeline=copy.deepcopy(pipeline), test_mode=test)


@pytest.mark.parametrize('name', LAYOUTS)
def test_segmentation_layouts(name, tmp_path):
    """The teacher's score, distilled steps, the host's own validation, and a plain checkpoint."""
    layout = LAYOUTS[name](tmp_path / 'data')
    cfg = seg_config(layout, tmp_path / 'work')
    for phase in ('train', 'val', 'test'):
        piped(cfg, phase)
    run = distilled(cfg, score_teacher=True)
    assert tuple(run.distiller.classes) == layout.classes and same_pictures(run)
    assert 'mIoU' in run.hook.scores.found['teacher'] and 'val/mIoU' in run.runner.message_hub.log_scalars
    labels = torch.cat([sample.gt_sem_seg.data.flatten() for batch in run.watch.batches
                        for sample in batch['data_samples']]).unique().tolist()
    # whether or not 0 is nothing in the files
    assert labels[0] == 0 and labels[-1] == 255 and max(labels[:-1]) < len(layout.classes)
    saved = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)
    assert saved['state_dict'].keys() == run.runner.model.state_dict().keys()


def plain(layout):
    layout = copy.deepcopy(layout)
    layout.evaluator = None
    return layout


@pytest.mark.parametrize('name', ['repeat', 'mosaic'])
def test_wrappers(name, tmp_path):
    layout = plain(segmentation(tmp_path / 'data', classes=('ground', 'square', 'disc')))
    loading = [LOAD, dict(type='LoadAnnotations')]
    dataset = dict(type='RepeatDataset', times=2, dataset=dict(layout.dataset, pipeline=[*loading, RESIZE, PACK]))
    if name == 'mosaic':
        dataset = dict(type='MultiImageMixDataset', dataset=dict(
            type='ConcatDataset', datasets=[dict(layout.dataset, pipeline=loading)]), pipeline=[
                dict(type='RandomMosaic', prob=1.0, img_scale=(48, 48), pad_val=0), RESIZE, PACK])
    run = distilled(seg_config(layout, tmp_path / 'work', dataset=dataset))
    assert tuple(run.distiller.classes) == layout.classes and same_pictures(run)


def test_two_classes_in_one_channel(tmp_path):
    layout = segmentation(tmp_path / 'data', binary=True)
    cfg = seg_config(layout, tmp_path / 'work')
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(out_channels=1, threshold=0.3, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    run = distilled(cfg, score_teacher=2)
    assert run.distiller.student.decode_head.conv_seg.out_channels == 1
    assert 0 <= run.hook.scores.found['teacher']['mIoU'] <= 100
    assert 'val/student_mIoU' in run.runner.message_hub.log_scalars


def test_some_of_the_classes(tmp_path):
    """A student of two of Cityscapes' classes in another order learns from a teacher of all 19."""
    layout = plain(segmentation(tmp_path / 'data', 'CityscapesDataset'))
    layout.dataset['metainfo'] = dict(classes=('sidewalk', 'road'))
    layout.classes = ('sidewalk', 'road')
    cfg = seg_config(layout, tmp_path / 'work')
    model = teacher(cfg)
    for head in ('decode_head', 'auxiliary_head'):
        model['model'][head]['num_classes'] = 19
    model['train_dataloader'] = dict(dataset=dict(type='CityscapesDataset'))
    run = distilled(cfg, dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits', classes='common')), model)
    assert run.distiller.classes == ['sidewalk', 'road'] and len(run.distiller.teacher.classes) == 19
    labels = torch.cat([sample.gt_sem_seg.data.flatten() for batch in run.watch.batches
                        for sample in batch['data_samples']]).unique().tolist()
    assert labels == [0, 1, 255]
    with pytest.raises(ValueError, match=r"classes='common'"):
        distilled(seg_config(layout, tmp_path / 'other'), dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits')), model)


def test_the_heads_own_ignored_label(tmp_path):
    """Pixels that the host's loss leaves out are left out by ours, whatever their label is."""
    layout = plain(segmentation(tmp_path / 'data', classes=('ground', 'square', 'void'), binary=True))
    cfg = seg_config(layout, tmp_path / 'work', steps=1)
    cfg.model.data_preprocessor.seg_pad_val = 2
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.ignore_index = 2
    run = distilled(cfg)
    sample = run.watch.batches[0]['data_samples'][0]
    sample.gt_sem_seg.data[:] = torch.tensor([0, 1, 2, 2])[torch.arange(sample.gt_sem_seg.data.numel()) % 4].view_as(
        sample.gt_sem_seg.data)
    batch = run.distiller.current.batch_of(torch.zeros(1, 3, *sample.gt_sem_seg.shape[-2:]), [sample])
    assert torch.equal(valid_pixels(batch, sample.gt_sem_seg.shape[-2:]), seg_map(batch) != 2)


def test_one_band_of_16_bits(tmp_path):
    layout = plain(segmentation(tmp_path / 'data', channels=1, depth=np.uint16, img_suffix='.png'))
    norm = dict(mean=[15000.0], std=[9000.0], bgr_to_rgb=False)
    cfg = seg_config(layout, tmp_path / 'work', pipeline=[
        dict(LOAD, color_type='unchanged'), dict(type='LoadAnnotations'), RESIZE, PACK])
    cfg.merge_from_dict(dict(model=dict(backbone=dict(in_channels=1), data_preprocessor=norm)))
    run = distilled(cfg, model=teacher(cfg, dict(norm, mean=[12000.0])))
    assert same_pictures(run) and max(float(pictures(run.distiller.student, inputs).max())
                                      for inputs in run.watch.seen['student']) > 29000


@TRANSFORMS.register_module()
class LoadPair(BaseTransform):
    """Both pictures of a place, as ``LoadMultipleRSImageFromFile`` loads them, which needs GDAL."""

    def transform(self, results):
        results['img'], results['img2'] = (cv2.imread(results[key]) for key in ('img_path', 'img_path2'))
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


def test_pairs_of_pictures(tmp_path):
    """Change detection: two pictures are six bands."""
    layout = segmentation(tmp_path / 'data', 'LEVIRCDDataset', folders=('A', 'label'))
    for scene in scenes(seed=5):
        write_picture(tmp_path / 'data' / 'B' / 'train' / f'{scene.name}.png', scene.picture)
    layout.dataset['data_prefix'] = dict(img_path='A/train', img_path2='B/train', seg_map_path='label/train')
    layout.dataset['pipeline'] = [dict(type='LoadPair'), dict(type='LoadAnnotations'), dict(type='ConcatCDInput'), PACK]
    assert isinstance(layout, Layout)
    norm = dict(mean=[120.0] * 6, std=[60.0] * 6, bgr_to_rgb=False)
    cfg = seg_config(layout, tmp_path / 'work')
    cfg.merge_from_dict(dict(model=dict(backbone=dict(in_channels=6), data_preprocessor=norm)))
    cfg.val_dataloader = loader(dict(layout.dataset, test_mode=True), [], 1, False)
    run = distilled(cfg, model=teacher(cfg, dict(norm, mean=[110.0] * 6)), score_teacher=True)
    assert same_pictures(run) and run.watch.seen['teacher'][0].shape[1] == 6


def with_test(cfg, layout):
    """Its test loop, one picture at a time."""
    pipeline = [LOAD, RESIZE, dict(type='LoadAnnotations'), PACK]
    cfg.test_dataloader = loader(dict(layout.dataset, test_mode=True), pipeline, 1, False)
    cfg.test_evaluator, cfg.test_cfg = copy.deepcopy(layout.evaluator), dict(type='TestLoop')
    return cfg


def test_test_time_augmentation_of_a_distilled_student(tmp_path):
    """mmseg's own: two scales, each also mirrored; the checkpoint is the plain student."""
    layout = segmentation(tmp_path / 'data', classes=('ground', 'square', 'disc'))
    cfg = with_test(seg_config(layout, tmp_path / 'work'), layout)
    distilled(cfg)
    assert cfg.tta_model.type == 'SegTTAModel'  # of the stock config
    cfg.tta_pipeline[-1].transforms[0] = [dict(type='Resize', scale=(size, size), keep_ratio=True) for size in (64, 96)]
    cfg.custom_hooks, cfg.work_dir = [], None
    cfg.dump(str(tmp_path / 'config.py'))
    result = kd_mm('test', tmp_path / 'config.py', tmp_path / 'work' / 'iter_2.pth', '--tta', '--work-dir',
                   tmp_path / 'tta')
    assert result.exit_code == 0, message(result)
    found, = (json.loads(file.read_text().splitlines()[-1]) for file in (tmp_path / 'tta').glob('*/*.json'))
    assert 0 <= found['mIoU'] <= 100


def test_one_picture_a_step_with_frozen_statistics(tmp_path):
    layout = plain(segmentation(tmp_path / 'data', classes=('ground', 'square', 'disc')))
    cfg = seg_config(layout, tmp_path / 'work', batch_size=1)
    cfg.model.backbone.norm_eval = True
    losses = dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg'), loss_kd=dict(
        type='SoftmaxKDLoss', at='@logits'), loss_hint=dict(type='FitNetLoss', at='backbone'))
    run = distilled(cfg, losses)
    assert same_pictures(run) and {len(inputs) for inputs in run.watch.seen['teacher']} == {1}
    assert not any(module.training for module in run.distiller.student.backbone.modules() if isinstance(
        module, torch.nn.BatchNorm2d))


def test_pictures_of_nothing_but_ignored_pixels(tmp_path):
    """The host's loss is 0 there, and so is ours where it looks at labels; without labels it goes on."""
    layout = plain(segmentation(tmp_path / 'data', classes=('ground', 'square', 'disc')))
    for path in (tmp_path / 'data' / 'ann_dir' / 'train').iterdir():
        write_picture(path, np.full((*cv2.imread(str(path)).shape[:2], 1), 255, np.uint8))
    run = distilled(seg_config(layout, tmp_path / 'work'), dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='@logits'), loss_hint=dict(type='FitNetLoss', at='backbone')))
    for step in run.watch.losses:
        assert step['loss_kd'] == step['decode.loss_ce'] == 0 and step['loss_hint'] > 0


def test_classes_in_balance_are_not_told_by_the_hosts_sets(tmp_path):
    """ClassBalancedDataset asks a set for the classes of each picture; mmseg's do not say, with and without us."""
    layout = plain(segmentation(tmp_path / 'data', classes=('ground', 'square', 'disc')))
    dataset = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=dict(layout.dataset, pipeline=[
        LOAD, dict(type='LoadAnnotations'), RESIZE, PACK]))
    cfg = seg_config(layout, tmp_path / 'work', dataset=dataset)
    assert any('get_cat_ids' in problem for problem in look_at_data(cfg, 2).problems)
    with pytest.raises(Exception, match='get_cat_ids'):
        distilled(cfg)
