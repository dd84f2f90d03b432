"""``kd-mm split``: what each step's files say, a model that grows over two of them, and what is refused."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from pairs import detection_pair, kd_mm, message, segmentation_pair
from stock import distill_hook, hook, train

from kd_mm.lab.steps import choose, count_overrides, parse_groups


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detection_pair(tmp_path_factory.mktemp('det'), coco_root)


@pytest.fixture(scope='module')
def seg(cityscapes_root, tmp_path_factory):
    return segmentation_pair(tmp_path_factory.mktemp('seg'), cityscapes_root)


def split(pair, out, *words):
    result = kd_mm('split', pair.student, *words, '--out', out)
    assert result.exit_code == 0, message(result)
    return result.output


def refused(pair, out, *words):
    result = kd_mm('split', pair.student, *words, '--out', out)
    assert result.exit_code == 1
    return message(result)


def read(path):
    return json.loads(Path(path).read_text())


def run(path, work_dir, *hooks, val=False):
    """Train the config of a step; the Runner and the checkpoint."""
    cfg = Config.fromfile(str(path))
    cfg.work_dir = str(work_dir)
    runner, recorder = train(cfg, hooks)
    return runner, recorder, next(Path(work_dir).glob('iter_*.pth'))


def test_boxes(det, coco_root, tmp_path):
    out = tmp_path / 'steps'
    text = split(det, out, 'disc', 'square')
    whole = read(coco_root / 'annotations.json')
    names = {entry['id']: entry['name'] for entry in whole['categories']}
    present = {entry['id']: {names[box['category_id']] for box in whole['annotations']
                             if box['image_id'] == entry['id']} for entry in whole['images']}
    for step, new, seen in (('step1', 'disc', ['disc']), ('step2', 'square', ['disc', 'square'])):
        content = read(out / step / 'train.json')
        assert [entry['name'] for entry in content['categories']] == seen  # the host numbers labels in this order
        assert {entry['id'] for entry in content['images']} == {key for key, found in present.items() if new in found}
        assert content['annotations'] == [box for box in whole['annotations'] if names[box['category_id']] == new]
        val = read(out / step / 'val.json')
        assert len(val['images']) == len(whole['images'])
        assert {names[box['category_id']] for box in val['annotations']} == set(seen)
        cfg = Config.fromfile(str(out / f'{step}.py'))
        assert cfg.model.bbox_head.num_classes == len(seen)
        assert cfg.val_evaluator.ann_file == str(out / step / 'val.json')
        assert cfg.test_dataloader.dataset.ann_file == cfg.val_dataloader.dataset.ann_file
        count = len(content['annotations'])
        assert f'{step}.py: {len(content["images"])} of {len(whole["images"])} images; labelled: {new} {count}' in text
    joint = read(out / 'joint' / 'train.json')
    assert len(joint['annotations']) == len(whole['annotations']) and len(joint['images']) == 7  # one has no box
    with DefaultScope.overwrite_default_scope('mmdet'):
        labels = {int(label) for info in DATASETS.build(Config.fromfile(str(out / 'step2.py')).train_dataloader.dataset)
                  for label in info['data_samples'].gt_instances.labels}
    assert labels == {1}  # squares alone, of (disc, square)


def test_disjoint_images(det, coco_root, tmp_path):
    split(det, tmp_path / 'steps', 'square', 'disc', '--protocol', 'disjoint')
    images = [{entry['id'] for entry in read(tmp_path / 'steps' / step / 'train.json')['images']}
              for step in ('step1', 'step2')]
    assert images[0] and images[1] and not images[0] & images[1] and len(images[0] | images[1]) == 7
    present = dict(a={'cat'}, b={'cat', 'dog'}, c={'dog', 'cow'}, d=set())
    groups = [['cat'], ['dog'], ['cow']]
    assert [choose(present, groups, index, 'overlapped') for index in range(3)] == [['a', 'b'], ['b', 'c'], ['c']]
    assert [choose(present, groups, index, 'disjoint') for index in range(3)] == [['a'], ['b'], ['c']]


def test_a_detector_grows(det, tmp_path, capfd):
    out = tmp_path / 'steps'
    split(det, out, 'disc', 'square')
    _, _, weights = run(out / 'step1.py', tmp_path / 'one')
    entry = hook(str(out / 'step1.py'), dict(loss_erd=dict(type='ERDLoss', at='bbox_head', box_weight=0)),
                 teacher_ckpt=str(weights), task_classes='new',
                 inherit=dict(backbone='copy', neck='copy', bbox_head='grow'))
    config = tmp_path / 'step2_erd.py'
    config.write_text(f"_base_ = {str(out / 'step2.py')!r}\ncustom_hooks = [{entry!r}]\n")
    result = kd_mm('check', config, '--shape', '64', '64')
    text = capfd.readouterr().out + message(result)
    assert result.exit_code == 0, text
    assert 'backbone, neck, bbox_head (grow)' in text
    assert "'bbox_head' takes the rows of disc from the teacher; new: square, which start as initialised" in text
    runner, recorder, trained = run(config, tmp_path / 'two', entry)
    assert all(step['loss_erd'] >= 0 and step['loss_cls'] > 0 for step in recorder.losses)
    found = distill_hook(runner).distiller
    assert found.teacher.classes == ['disc'] and found.classes == ['disc', 'square']
    state = torch.load(trained, weights_only=False)['state_dict']
    assert state['bbox_head.retina_cls.weight'].shape[0] == 18 and 'coco/bbox_mAP' in runner.val()
    assert kd_mm('check', out / 'step1.py').exit_code == 1  # it does not distil


def test_maps(seg, cityscapes_root, tmp_path):
    out = tmp_path / 'steps'
    split(seg, out, 'sidewalk', 'road')
    original = cv2.imread(str(next((cityscapes_root / 'gtFine').rglob('*_000003_*'))), cv2.IMREAD_UNCHANGED)
    expected = dict(step1=({1: 1, 0: 0}, {1: 1, 0: 0}, ('background', 'sidewalk')),
                    step2=({1: 0, 0: 2}, {1: 1, 0: 2}, ('background', 'sidewalk', 'road')),
                    joint=({1: 1, 0: 2}, None, ('background', 'sidewalk', 'road')))
    for step, (train_labels, val_labels, classes) in expected.items():
        cfg = Config.fromfile(str(out / f'{step}.py'))
        assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == classes
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == len(classes)
        assert cfg.train_dataloader.dataset.metainfo.palette[1] == [244, 35, 232]
        for phase, table in (('train', train_labels), ('val', val_labels)):
            if table is None:
                continue
            file = next((out / step / phase).rglob('*_000003_*'))
            labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            for old in (0, 1, 255):
                assert set(np.unique(labels[original == old])) == {table.get(old, 255)}, (step, phase, old)
        with DefaultScope.overwrite_default_scope('mmseg'):
            dataset = DATASETS.build(cfg.train_dataloader.dataset)
        assert len(dataset) == 8 and Path(dataset[0]['data_samples'].img_path).is_file()
        assert set(dataset[0]['data_samples'].gt_sem_seg.data.unique().tolist()) == {*train_labels.values(), 255}
    text = split(seg, tmp_path / 'more', 'road,car', 'sidewalk')
    assert 'Without any label in the training data: car. --occurring leaves such classes out' in text


def test_without_a_background_the_rest_is_ignored(seg, tmp_path):
    split(seg, tmp_path / 'steps', '1+1', '--occurring', '--unseen', 'ignore')
    cfg = Config.fromfile(str(tmp_path / 'steps' / 'step2.py'))
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == ('road', 'sidewalk')
    file = next((tmp_path / 'steps' / 'step2' / 'train').rglob('*.png'))
    assert set(np.unique(cv2.imread(str(file), cv2.IMREAD_UNCHANGED))) == {1, 255}


SEGMENTERS = dict(
    MiB=dict(loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg'),
             loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg')),
    PLOP=dict(loss_pod=dict(type='LocalPODLoss', at='decode_head.conv_seg', growth=(2, 1)),
              loss_pseudo=dict(type='PLOPPseudoLabelLoss', at='decode_head.conv_seg')))


def test_a_segmenter_grows(seg, tmp_path):
    out = tmp_path / 'steps'
    split(seg, out, 'sidewalk', 'road')
    _, _, weights = run(out / 'step1.py', tmp_path / 'one')
    for name, losses in SEGMENTERS.items():
        entry = hook(str(out / 'step1.py'), losses, teacher_ckpt=str(weights), task_loss_weight=0.0, inherit=dict(
            backbone='copy', decode_head='grow_from_background', auxiliary_head='grow'))
        _, recorder, trained = run(out / 'step2.py', tmp_path / name, entry)
        assert all(torch.isfinite(torch.tensor(step[loss])) for step in recorder.losses for loss in losses)
        assert len(torch.load(trained, weights_only=False)['state_dict']['decode_head.conv_seg.weight']) == 3
    split(seg, tmp_path / 'plain', 'sidewalk', 'road', '--unseen', 'ignore')
    with pytest.raises(ValueError, match='MiBCELoss needs the background as first class'):
        run(tmp_path / 'plain' / 'step2.py', tmp_path / 'none', hook(
            str(tmp_path / 'plain' / 'step1.py'), SEGMENTERS['MiB'], task_loss_weight=0.0))


def test_bad_input(det, seg, tmp_path):
    out = tmp_path / 'steps'
    assert 'no such class: moon. The data has 2 classes: square, disc' in refused(det, out, 'moon', 'disc')
    assert 'disc: named twice' in refused(det, out, 'disc', 'square,disc')
    assert 'give two steps or more' in refused(det, out, 'disc,square')
    assert '1+2: 3 classes in 2 steps. The data has 2 classes' in refused(det, out, '1+2')
    assert '8+3: 11 classes in 2 steps. The data has 19 classes' in refused(seg, out, '8+3')
    assert 'step 2 (car) has no training image: no training label has one of these classes' in refused(
        seg, out, 'road', 'car')
    assert 'step 1 (road) has no training image: none has a new class without one of a later step' in refused(
        seg, out, 'road', 'sidewalk', '--protocol', 'disjoint')
    out.mkdir(exist_ok=True)
    (out / 'mine.txt').write_text('')
    assert 'is there already and not empty' in refused(det, out, 'disc', 'square')
    assert 'no such config' in message(kd_mm('split', 'nowhere.py', '1+1', '--out', tmp_path / 'new')).lower()

    def changed(pair, text):
        file = tmp_path / 'changed.py'
        file.write_text(f'_base_ = {pair.student!r}\n{text}\n')
        return message(kd_mm('split', file, '1+1', '--occurring', '--out', tmp_path / 'changed'))

    several = "train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(type='A')]))"
    assert 'is made of several data sets' in changed(det, several)
    assert 'annotation file' in changed(det, "train_dataloader = dict(dataset=dict(ann_file='no.json'))")
    named = "train_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat', 'dog'))))"
    assert 'not the categories of its training annotations: cat, dog' in changed(det, named)
    weights = f'model = dict(decode_head=dict(loss_decode=dict(class_weight={[1.0] * 18 + [2.0]})))'
    assert 'a loss weighs the classes one by one' in changed(seg, weights)


def test_wrappers_and_lists(det, tmp_path):
    file = tmp_path / 'repeated.py'
    file.write_text(f"""_base_ = {det.student!r}
inner = {Config.fromfile(det.student).train_dataloader.dataset.to_dict()!r}
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=inner))
""")
    result = kd_mm('split', file, '1+1', '--out', tmp_path / 'steps')
    assert result.exit_code == 0, message(result)
    inner = Config.fromfile(str(tmp_path / 'steps' / 'step1.py')).train_dataloader.dataset
    assert inner.times == 2 and inner.dataset.ann_file == str(tmp_path / 'steps' / 'step1' / 'train.json')
    groups = parse_groups(['traffic sign,car', 'sky'], ['car', 'sky', 'traffic sign'])
    assert groups == [['traffic sign', 'car'], ['sky']]
    heads = [dict(type='A', num_classes=80, k=1), dict(type='B', num_classes=80)]
    assert count_overrides(dict(roi_head=dict(bbox_head=heads, n=2), rpn=dict(num_classes=1)), 80, 4) == dict(
        roi_head=dict(bbox_head=[dict(type='A', num_classes=4, k=1), dict(type='B', num_classes=4)]))
    assert heads[0]['num_classes'] == 80
