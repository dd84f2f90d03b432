"""Data as users of MMRotate have them, with distillation: every family, wrappers, what pictures hold, one at a time."""

import copy
import importlib
import importlib.util
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from foundation import require

if importlib.util.find_spec('mmrotate') is None:
    pytest.skip('MMRotate is not installed: make test STACK=rotate', allow_module_level=True)
require('mmrotate')  # it imports torchvision, for which this declares what the CPU's torch lacks

from layout_runs import META, distilled, loader, same_pictures, without_objects  # noqa: E402
from pairs import kd_mm, message  # noqa: E402
from rotate import CONFIGS, as_teacher, rotate_config, trainable, write_dota  # noqa: E402

from kd_mm.engine.distiller import Distiller  # noqa: E402
from kd_mm.hosts.heads.assigned import assignment_taps, read_assignment  # noqa: E402
from kd_mm.hosts.heads.dense import dense_view  # noqa: E402
from kd_mm.hosts.models import build_model, start_counters  # noqa: E402
from kd_mm.hosts.samples import Samples  # noqa: E402
from kd_mm.hosts.taps import Tap  # noqa: E402
from kd_mm.lab.models import random_batch, scope_of  # noqa: E402
from kd_mm.ops.problems import ConfigProblems  # noqa: E402

pytestmark = pytest.mark.rotate
LOSSES = dict(loss_fgd=dict(type='FGDLoss', at='@neck'), loss_region=dict(type='FitNetLoss', at='@neck', region=dict(
    type='GTBoxRegion')))
NORM = dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0])


@pytest.fixture(scope='module')
def dota(tmp_path_factory):
    return write_dota(tmp_path_factory.mktemp('dota'), extra=True)


def config(root, work_dir, family='retinanet', **train):
    """Two steps of two pictures; ``train``: entries of the loader."""
    cfg = trainable(rotate_config(family), root, work_dir)
    if family == 'fcos':
        # Random weights predict sides of 0, of which its KLD makes NaN; as exponentials they are positive.
        cfg.model.bbox_head.norm_on_bbox = False
    dataset = cfg.train_dataloader.dataset
    dataset['diff_thr'] = 100
    if 'wrap' in train:
        train['dataset'] = train.pop('wrap')(dataset)
    cfg.train_dataloader = dict(cfg.train_dataloader, **train)
    return cfg


def run(cfg, losses=None, **options):
    teacher = as_teacher(cfg)
    teacher['model']['data_preprocessor'].update(NORM)
    found = distilled(cfg, losses or LOSSES, teacher, **options)
    assert same_pictures(found) and tuple(found.distiller.classes) == ('plane', 'ship')
    return found


@pytest.mark.parametrize('family', [name for name in CONFIGS if name != 'retinanet'])
def test_a_real_run_of_every_family(family, dota, tmp_path):
    losses = dict(LOSSES, loss_logits=dict(type='SigmoidKDLoss', at='@logits'))
    if family.endswith('csl'):
        losses['loss_ld'] = dict(type='LDLoss', at='bbox_head', valuable_weight=0)
    found = run(config(dota, tmp_path / 'work', family), losses)
    assert all(step['loss_fgd'] > 0 for step in found.watch.losses)


@pytest.mark.parametrize('family', CONFIGS)
def test_the_assignment_is_the_hosts(family):
    """Which priors are positive and of which class; where boxes of the truth are told, too, of which one."""
    torch.manual_seed(0)
    cfg = rotate_config(family)
    with scope_of(cfg):
        model = build_model(cfg, None)
        model.init_weights()
        head = model.bbox_head if hasattr(model, 'bbox_head') else model.rpn_head
        data = random_batch(model.train(), 2, (128, 128))
        start_counters()
        taps = {name: Tap(head, name, structured=True) for name in assignment_taps(head)}
        taps[''] = Tap(model, 'bbox_head' if hasattr(model, 'bbox_head') else 'rpn_head', structured=True)
        for tap in taps.values():
            tap.optional = True
            tap.arm()
        model(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    records = {name: tap.read() for name, tap in taps.items()}
    sizes = [level.shape[1] for level in dense_view(head, records[''].calls[0].output).logits]
    found = read_assignment(head, [call for name in taps if name for call in records[name].calls], sizes)
    truth, labels = Samples(data['data_samples']).labels(), torch.cat(found.labels, dim=1)
    positive = (labels >= 0) & (labels < head.num_classes)
    assert labels.shape == (2, sum(sizes)) and 0 < positive.sum() < labels.numel()
    for image in range(2):
        allowed = set(truth[image].tolist()) if head.num_classes > 1 else {0}  # of a first stage: an object
        assert set(labels[image][positive[image]].tolist()) <= allowed
    assert (found.objects is None) == family.startswith('fcos')
    if found.objects is not None:
        objects = torch.cat(found.objects, dim=1)
        assert bool(((objects >= 0) == positive).all())
        for image in range(2 if head.num_classes > 1 else 0):
            assert torch.equal(truth[image][objects[image][positive[image]]], labels[image][positive[image]])


@pytest.mark.parametrize('family', ['retinanet', 'fcos', 'rtmdet'])
def test_losses_on_decoded_boxes_are_refused_with_a_word(family):
    cfg = rotate_config(family)
    with scope_of(cfg), pytest.raises(ConfigProblems, match=r'predicts no boxes that could be decoded.*\[CrossKDLoss'):
        Distiller(build_model(cfg, None), as_teacher(cfg), dict(loss_c=dict(type='CrossKDLoss', at='bbox_head')),
                  teacher_ckpt='random', scope='mmrotate', max_steps=10)


WRAPPERS = dict(
    repeat=lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
    balanced=lambda dataset: dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=dataset),
    concat=lambda dataset: dict(type='ConcatDataset', datasets=[dataset, copy.deepcopy(dataset)]))


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers(name, dota, tmp_path):
    run(config(dota, tmp_path / 'work', wrap=WRAPPERS[name]))


def test_mixed_pictures(dota, tmp_path):
    def mix(dataset):
        loading, pack = dataset['pipeline'][:-1], dataset['pipeline'][-1]
        return dict(type='mmdet.MultiImageMixDataset', dataset=dict(dataset, pipeline=loading), pipeline=[
            dict(type='mmdet.Mosaic', img_scale=(128, 128), pad_val=114.0),
            dict(type='mmdet.Resize', scale=(128, 128), keep_ratio=True), pack])

    run(config(dota, tmp_path / 'work', wrap=mix))


def test_no_object_and_difficult_ones(dota, tmp_path):
    """In the first of four pictures a third object is difficult; in the last one is nothing."""
    found = run(config(dota, tmp_path / 'work', batch_size=4))
    samples = {sample.img_id: sample for sample in found.watch.batches[0]['data_samples']}
    read = {name: Samples([sample]) for name, sample in samples.items()}
    assert {name: len(each.boxes()[0]) for name, each in read.items()} == dict(P0000=2, P0001=2, P0002=2, P0003=0)
    torch.testing.assert_close(read['P0000'].ignored()[0], torch.tensor([[4., 4., 24., 14.]]), atol=0.1, rtol=0)


@pytest.mark.parametrize('family', CONFIGS)
def test_batches_without_any_object(family):
    cfg = rotate_config(family)
    torch.manual_seed(0)
    with scope_of(cfg):
        model = build_model(cfg, None)
        model.init_weights()
        distiller = Distiller(model.train(), as_teacher(cfg), LOSSES, teacher_ckpt='random', scope='mmrotate')
        without_objects(model, distiller, random_batch(model, 2, (128, 128)))


def test_one_picture_a_step_with_frozen_statistics(dota, tmp_path):
    cfg = config(dota, tmp_path / 'work', batch_size=1)
    cfg.model.backbone.norm_eval = True
    assert {len(inputs) for inputs in run(cfg).watch.seen['teacher']} == {1}


def test_validation_scores_both_and_flips_are_refused(dota, tmp_path, monkeypatch):
    """By its own metric; mmdet's test-time augmentation would flip five numbers as if they were corners."""
    # It starts four processes for each score, which import everything again; threads count the same.
    metric = importlib.import_module('mmrotate.evaluation.functional.mean_ap')
    monkeypatch.setattr(metric, 'get_context', lambda kind: SimpleNamespace(Pool=ThreadPool))
    cfg = config(dota, tmp_path / 'work')
    image, *rest, pack = cfg.train_dataloader.dataset.pipeline
    test = [image, dict(type='mmdet.Resize', scale=(128, 128), keep_ratio=True), *rest, dict(pack, meta_keys=META)]
    dataset = dict(cfg.train_dataloader.dataset, test_mode=True, pipeline=test)
    for kind, loop in (('val', 'ValLoop'), ('test', 'TestLoop')):
        cfg[f'{kind}_dataloader'], cfg[f'{kind}_cfg'] = loader(dataset, (), 1, False), dict(type=loop)
        cfg[f'{kind}_evaluator'] = dict(type='DOTAMetric', metric='mAP')
    cfg.train_cfg.val_interval = 2
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=20, nms_pre=100)
    found = run(cfg, score_teacher=True)
    assert 'dota/mAP' in found.hook.scores.found['teacher']
    assert 'val/dota/mAP' in found.runner.message_hub.log_scalars
    cfg.custom_hooks = []
    cfg.dump(str(tmp_path / 'config.py'))
    said = message(kd_mm('test', tmp_path / 'config.py', tmp_path / 'work' / 'iter_2.pth', '--tta'))
    assert '--tta: mmdet merges upright boxes alone' in said and 'give tta_model' in said


@pytest.mark.parametrize('channels', [1, 4])
def test_grey_and_four_bands_of_16_bits(channels, tmp_path):
    """Grey ones are normalised by the preprocessor, which takes a mean of one or three; of four bands by the
    pipeline."""
    root = write_dota(tmp_path / 'dota')
    cfg = config(root, tmp_path / 'work')
    load, *rest = cfg.train_dataloader.dataset.pipeline
    norm = dict(mean=[100.0], std=[50.0], bgr_to_rgb=False)
    theirs = dict(mean=[120.0], std=[60.0])
    if channels == 4:
        for path in (root / 'images').iterdir():
            picture = cv2.imread(str(path)).astype(np.uint16) * 150
            cv2.imwrite(str(path), np.concatenate([picture, picture[..., :1]], axis=2))
        rest.insert(-1, dict(type='mmdet.Normalize', mean=[9000.0] * 4, std=[8000.0, 9000.0, 10000.0, 11000.0],
                             to_rgb=False))
        norm = theirs = dict(mean=None, std=None, bgr_to_rgb=False)
    cfg.train_dataloader.dataset.pipeline = [
        dict(load, color_type='unchanged' if channels == 4 else 'grayscale'), *rest]
    cfg.merge_from_dict(dict(model=dict(backbone=dict(in_channels=channels), data_preprocessor=norm)))
    teacher = as_teacher(cfg)
    teacher['model']['data_preprocessor'].update(theirs)
    found = distilled(cfg, LOSSES, teacher)
    assert same_pictures(found)
    assert all(inputs.shape[1] == channels and float(inputs.max()) > 1 for inputs in found.watch.seen['teacher'])
