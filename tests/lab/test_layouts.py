"""``kd-mm check --data``, ``distill`` and ``compare`` on the layouts that users have."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
from layout_runs import BOXES, LOAD, RESIZE, det_config
from layouts import COCO_KIN, DETECTION, coco, lvis, segmentation, voc
from mmengine.config import Config
from pairs import as_files, kd_mm, message
from stock import hook, wide

from kd_mm.hosts.models import class_names
from kd_mm.lab.commands import test as testing
from kd_mm.lab.commands import train as training
from kd_mm.lab.data import look_at_data

PACK = dict(type='PackDetInputs')
#: The data sets of mmseg that are its BaseSegDataset with other names of files and classes.
SEG_KIN = ('BDD100KDataset', 'ChaseDB1Dataset', 'COCOStuffDataset', 'DarkZurichDataset', 'DRIVEDataset', 'HRFDataset',
           'iSAIDDataset', 'ISPRSDataset', 'LIPDataset', 'LoveDADataset', 'MapillaryDataset_v1', 'MapillaryDataset_v2',
           'NightDrivingDataset', 'PascalContextDataset', 'PascalContextDataset59', 'REFUGEDataset', 'STAREDataset',
           'SynapseDataset')


def described(scope, layout, pipeline):
    head = dict(num_classes=len(layout.classes))
    return Config(dict(default_scope=scope, model=dict(type='EncoderDecoder', decode_head=head, bbox_head=head),
                       train_dataloader=dict(batch_size=2, dataset=dict(layout.dataset, pipeline=pipeline))))


@pytest.mark.parametrize('name', SEG_KIN)
def test_sets_of_mmseg_are_read(name, tmp_path):
    layout = segmentation(tmp_path, name, listed='Context' in name)
    cfg = described('mmseg', layout, [LOAD, dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
    report = look_at_data(cfg, 4)
    assert not report.problems and not report.warnings and report.length == 4
    assert class_names(cfg) == list(layout.classes)


@pytest.mark.parametrize('name', COCO_KIN)
def test_kin_of_coco_are_read(name, tmp_path):
    import mmdet.datasets
    names = getattr(mmdet.datasets, name).METAINFO['classes']
    layout = coco(tmp_path, name, names[-2:], full=True)
    layout.classes = tuple(names)
    cfg = described('mmdet', layout, [LOAD, BOXES, PACK])
    report = look_at_data(cfg, 4)
    assert not report.problems and not report.warnings and class_names(cfg) == list(names)


def test_lvis_needs_its_package(tmp_path, monkeypatch):
    layout = lvis(tmp_path)
    cfg = described('mmdet', layout, [LOAD, BOXES, PACK])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'lvis', None)
        assert 'Package lvis is not installed. Please run "pip install' in look_at_data(cfg, 2).problems[0]
    if importlib.util.find_spec('lvis') is not None:
        report = look_at_data(cfg, 4)
        assert not report.problems and class_names(cfg) == list(layout.classes)


@pytest.mark.parametrize('name', ['open_images', 'open_images_challenge'])
def test_files_beside_the_annotations_are_looked_for(name, tmp_path):
    layout = DETECTION[name](tmp_path)
    cfg = described('mmdet', layout, [LOAD, BOXES, PACK])
    training.check_data(cfg, ('train', ))
    assert class_names(cfg) is None  # they stand in a file
    assert not look_at_data(cfg, 3).problems
    (tmp_path / 'annotations' / 'sizes.pkl').unlink()
    with pytest.raises(SystemExit, match='train_dataloader.dataset.meta_file: '):
        training.check_data(cfg, ('train', ))


def test_what_is_no_picture_for_everybody(tmp_path):
    """Whether arrays and volumes can be read is the pipeline's to say; an empty file is one."""
    layout = segmentation(tmp_path / 'data')
    layout.dataset['img_suffix'] = '.npy'
    folder = tmp_path / 'data' / 'img_dir' / 'train'
    for index in range(4):
        np.save(folder / f'{index:06d}.npy', np.zeros((64, 64, 3), np.uint8))
    pipeline = [dict(type='LoadBiomedicalImageFromFile', decode_backend='numpy'), dict(type='LoadAnnotations'),
                dict(type='PackSegInputs')]
    cfg = described('mmseg', layout, pipeline)
    report = look_at_data(cfg, 4)
    assert not any('cannot be read as a picture' in text for text in report.problems)
    (folder / '000002.npy').write_bytes(b'')
    assert any(text.endswith('000002.npy is empty') for text in look_at_data(cfg, 4).problems)


@pytest.fixture(scope='module')
def pascal(tmp_path_factory):
    """VOC 2007 and 2012 together, repeated, as the host has them; validation on 2007."""
    root = tmp_path_factory.mktemp('pascal')
    layout = voc(root / 'data')
    later = voc(root / 'data', 'VOC2012', seed=1)
    cfg = det_config(layout, root / 'work', steps=2)
    sets = [dict(part.dataset, pipeline=[LOAD, BOXES, RESIZE, PACK]) for part in (layout, later)]
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='AspectRatioBatchSampler'), dataset=dict(
            type='RepeatDataset', times=3, dataset=dict(
                type='ConcatDataset', ignore_keys=['dataset_type'], datasets=sets)))
    return as_files(root / 'pair', cfg, dict(neck=dict(out_channels=24), bbox_head=dict(
        in_channels=24, feat_channels=24)))


def test_distil_and_compare_on_pascal_voc(pascal, tmp_path):
    assert class_names(pascal.cfg) == list(voc_names())
    work = tmp_path / 'run'
    result = kd_mm('distill', pascal.student, '--teacher', pascal.teacher, '--teacher-ckpt', pascal.weights,
                   '--work-dir', work, '--no-cost', '--score-images', 2)
    assert result.exit_code == 0 and 'teacher: pascal_voc/mAP (0 to 1) 0' in result.output, message(result)
    assert '| model | pascal_voc/mAP (0 to 1) |' in (work / 'report.md').read_text()
    # the host's own log, and the plain student, each picture also mirrored
    shutil.copytree(work / 'distilled', work / 'copied')
    result = kd_mm('compare', f'first={work / "distilled"}', f'second={work / "copied"}')
    assert result.exit_code == 0 and 'pascal_voc/mAP' in result.output, message(result)
    result = kd_mm('test', pascal.student, work / 'student.pth', '--tta', '--work-dir', tmp_path / 'tta')
    assert result.exit_code == 0, message(result)
    found, = (json.loads(file.read_text().splitlines()[-1]) for file in (tmp_path / 'tta').glob('*/*.json'))
    assert 0 <= found['pascal_voc/mAP'] <= 1


def voc_names():
    from mmdet.datasets import VOCDataset
    return VOCDataset.METAINFO['classes']


def test_check_of_nested_wrappers(pascal, tmp_path):
    cfg = pascal.cfg.copy()
    cfg.custom_hooks = [hook(wide(cfg), dict(loss_f=dict(type='FitNetLoss', at='neck')))]
    cfg.dump(str(tmp_path / 'config.py'))
    words = ['check', tmp_path / 'config.py', '--shape', 64, 64, '--data', 6]
    result = kd_mm(*words)
    assert result.exit_code == 0 and '6 of 24 samples of train_dataloader.dataset' in result.output, message(result)
    cfg.model.bbox_head.num_classes = 1  # the labels are 0 and 1
    cfg.dump(str(tmp_path / 'config.py'))
    assert 'the labels 1 are beyond the 1 classes of the student' in message(kd_mm(*words))


def test_every_set_of_a_test_gets_the_augmentation(pascal):
    cfg = pascal.cfg.copy()
    part = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[part, part])
    testing.use_tta(cfg)
    assert all(found.pipeline[-1].type == 'TestTimeAug' for found in cfg.test_dataloader.dataset.datasets)
    assert cfg.model.type == 'DetTTAModel'
