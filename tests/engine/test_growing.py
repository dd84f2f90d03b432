"""A student that knows more classes than its teacher: MiB, PLOP and ERD in a real Runner, and what is refused."""

import copy

import pytest
import torch
from heads import head_config
from mmengine.registry import DefaultScope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS
from stock import detector, hook, make_runner, segmentor, teacher_of, train

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model

NAMES = ('background', *(f'class {number}' for number in range(1, 19)))
LOSSES = dict(
    loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg'),
    loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg'),
    loss_pod=dict(type='LocalPODLoss', at='backbone', loss_weight=1e-3),
    loss_pod_logits=dict(type='LocalPODLoss', at='decode_head.conv_seg', growth=(12, 7)),
    loss_pseudo=dict(type='PLOPPseudoLabelLoss', at='decode_head.conv_seg'))


@DATASETS.register_module(force=True)
class WithBackground(CityscapesDataset):
    METAINFO = dict(classes=NAMES, palette=[[number] * 3 for number in range(19)])


def grown(root, tmp_path, old=12):
    """A segmenter of 19 classes taught by one that knows the first few."""
    cfg = segmentor(root, tmp_path)
    teacher = teacher_of(cfg, decode_head=dict(num_classes=old), auxiliary_head=dict(num_classes=old))
    cfg.train_dataloader.dataset.type = 'WithBackground'
    cfg.custom_hooks = [hook(teacher, LOSSES, task_loss_weight=0.0)]
    return cfg


def test_segmenters(cityscapes_root, tmp_path):
    cfg = grown(cityscapes_root, tmp_path)
    _, recorder = train(cfg, hooks=[hook_of.to_dict() for hook_of in cfg.custom_hooks])
    assert len(recorder.losses) == 2
    for losses in recorder.losses:
        assert all(torch.isfinite(torch.tensor(losses[name])) and losses[name] >= 0 for name in LOSSES)
        assert losses['loss_mib_ce'] > 0 and losses['loss_mib_kd'] > 0 and losses['loss_pod_logits'] > 0
        assert not [name for name in losses if name.startswith('decode.')]  # its own cross-entropy is off


def test_what_is_refused(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(cfg).model
    small = teacher_of(cfg, decode_head=dict(num_classes=12), auxiliary_head=dict(num_classes=12))

    def refused(names, **losses):
        with pytest.raises(ValueError) as caught:
            Distiller(student, small, losses, scope='mmseg', teacher_ckpt='random', classes=names)
        return str(caught.value)

    roads = ('road', *NAMES[1:])
    text = refused(roads, **{name: loss for name, loss in LOSSES.items() if 'pod' not in name})
    for name in ('MiBCELoss', 'MiBKDLoss', 'PLOPPseudoLabelLoss'):
        assert f'{name} needs the background as first class' in text
    Distiller(student, small, {name: loss for name, loss in LOSSES.items() if 'pod' in name}, scope='mmseg',
              teacher_ckpt='random', classes=roads)
    large = teacher_of(cfg, decode_head=dict(num_classes=21), auxiliary_head=dict(num_classes=21))
    with pytest.raises(ValueError, match='MiBKDLoss, level 0: .* the student needs 21 channels or more'):
        Distiller(student, large, dict(loss_kd=LOSSES['loss_mib_kd']), scope='mmseg', teacher_ckpt='random',
                  classes=NAMES)
    assert 'LocalPODLoss, level 0' in refused(NAMES, loss_pod=dict(
        type='LocalPODLoss', at='decode_head.conv_seg', adapter=None))
    assert 'a teacher trained on these classes' in refused(NAMES, loss_kd=dict(
        type='SoftmaxKDLoss', at='decode_head.conv_seg'))


def test_the_order_of_the_classes_is_checked(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(cfg).model
    teacher = teacher_of(cfg, decode_head=dict(num_classes=12), auxiliary_head=dict(num_classes=12))

    def make(*names):
        known = dict(teacher, train_dataloader=dict(dataset=dict(metainfo=dict(classes=names))))
        return Distiller(student, known, dict(loss_kd=LOSSES['loss_mib_kd']), scope='mmseg', teacher_ckpt='random',
                         classes=NAMES)

    with pytest.raises(ValueError, match="MiBKDLoss needs a student whose classes begin with the teacher's"):
        make('background', 'class 2', 'class 1', *NAMES[3:12])
    make(*NAMES[:12])


def detectors(name, old, new):
    """Two detectors in training mode, and the losses' head."""
    made = []
    for classes in (old + new, old):
        cfg = head_config(name)
        cfg.model.bbox_head.num_classes = classes
        with DefaultScope.overwrite_default_scope('mmdet'):
            made.append(build_model(cfg, 'mmdet').train())
    return made


@pytest.mark.parametrize('name, options', [('gfl', {}), ('retinanet', dict(box_weight=0))])
def test_detectors(name, options):
    student, teacher = detectors(name, 2, 3)
    found = Distiller(student, teacher, dict(loss_erd=dict(type='ERDLoss', at='bbox_head', **options)), scope='mmdet')
    assert found.terms['loss_erd'].loss.grows
    with pytest.raises(ValueError, match='the classes must be the same'):
        Distiller(teacher, student, dict(loss_erd=dict(type='ERDLoss', at='bbox_head', **options)), scope='mmdet')


def test_a_detector_learns(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    teacher = teacher_of(cfg, bbox_head=dict(num_classes=1))
    losses = dict(loss_erd=dict(type='ERDLoss', at='bbox_head', box_weight=0))
    runner, recorder = train(cfg, hooks=[hook(copy.deepcopy(teacher), losses)])
    assert all(step['loss_erd'] >= 0 for step in recorder.losses) and recorder.losses[-1]['loss_erd'] > 0
