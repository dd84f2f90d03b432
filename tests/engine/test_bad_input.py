"""What a user gets wrong: an error before the first step that names the place and the mend."""

import re

import pytest
import torch
from stock import detector, hook, make_runner, retinanet_model, segmentor, teacher_of, train

from kd_mm.engine.distiller import Distiller

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'))


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detector(coco_root, tmp_path_factory.mktemp('det'))


@pytest.fixture(scope='module')
def seg(cityscapes_root, tmp_path_factory):
    return segmentor(cityscapes_root, tmp_path_factory.mktemp('seg'))


@pytest.fixture(scope='module')
def students(det, seg):
    return dict(det=make_runner(det).model, seg=make_runner(seg).model)


def problems(students, cfg, losses, teacher=None, **extra):
    """The message that the hook would stop with."""
    kind = 'det' if cfg.default_scope == 'mmdet' else 'seg'
    extra.setdefault('teacher_ckpt', 'random')
    with pytest.raises(ValueError) as caught:
        Distiller(students[kind], teacher_of(cfg) if teacher is None else teacher, losses,
                  scope=cfg.default_scope, **extra)
    return str(caught.value)


def loss(**extra):
    return dict(loss_x=dict(dict(type='CWDLoss', at='neck'), **extra))


@pytest.mark.parametrize('losses, expected', [
    (loss(at='neck.fpn_conv'), r"student has no module 'neck.fpn_conv'. Closest: 'neck.fpn_convs'.*kd-mm taps"),
    (loss(at='bbox_hed.retina_cls'), r"Closest: 'bbox_head.retina_cls'"),
    (loss(at='neck.fpn_convs.9'), r"no module 'neck.fpn_convs.9'.*neck.fpn_convs has: 0, 1, 2, 3, 4"),
    (loss(student_at='neck', teacher_at='nek', at=None), r"teacher has no module 'nek'"),
    (loss(at=None), r'loss_x: where to tap\?'),
    (loss(student_at='neck'), r'either `at` or `student_at`'),
    (dict(kd=dict(type='CWDLoss', at='neck')), r"'kd': a loss name must start with `loss_`"),
    ({'loss_x.y': dict(type='CWDLoss', at='neck')}, r'must start with `loss_` and be an identifier'),
    (dict(loss_x='CWDLoss'), r"loss_x: 'CWDLoss' is not a config"),
    ({}, r'give a dict of losses'),
    (loss(type='CWDLos'), r"unknown loss type 'CWDLos'. Did you mean 'CWDLoss'\? Choices: .*CWDLoss, .*FGDLoss"),
    (loss(type='ConvAdapter'), r"unknown loss type 'ConvAdapter'"),
    (loss(region=dict(type='Box')), r"unknown region type 'Box'.*Choices: .*GTBoxRegion"),
    (loss(adapter=dict(type='Conv')), r"unknown adapter type 'Conv'.*Choices: ConvAdapter"),
    (loss(adapter='none'), r"adapter='none': give 'auto', None or a dict"),
    (loss(loss_weight=dict(type='Cosine')), r"unknown schedule type 'Cosine'.*CosineSchedule"),
    (loss(temperature=2), r"CWDLoss got unknown argument\(s\) 'temperature'. It accepts: tau"),
    (loss(loss_weight=-1), r'loss_weight=-1 must be from 0'),
    (loss(loss_weight=[1.0, 2.0]), r'loss_weight has 2 entries, one a level, but there are 5 levels'),
    (loss(levels=[7]), r'levels=\[7\] but student .* gives 5 levels'),
    (loss(levels=dict(student=[0, 1], teacher=[0])), r'2 student levels \[2x16x.*1 teacher levels.*levels='),
    (loss(levels=dict(student=None, teacher=[0, 1])), r'5 student levels .* and 2 teacher levels'),
    (loss(at='@head'), r"'@head' is no place; there are '@backbone', '@neck', '@memory', '@logits'"),
    (loss(classes='common'), r"classes='common' is for logit losses"),
    (loss(teacher='other'), r"teacher='other' is not among 'teacher', 'self'"),
    (loss(at='bbox_head.get_targets'), r"never fires"),
    (loss(at=1), r"loss_x: at=1 must be a text such as 'neck', or a list of them"),
    (loss(teacher=True), r"loss_x: teacher=True must be a text"),
    (loss(levels=1), r"loss_x: levels=1 must be a list"),
    (loss(levels=['a']), r"loss_x: levels\[0\]='a' must be a whole number, not text"),
    (loss(at='bbox_head.cls_convs'), r"it is a list of modules, .* all of them: at='bbox_head.cls_convs.\*'"),
    (loss(loss_weight=['auto', 1.0]), r"write loss_weight='auto', alone"),
    (loss(loss_weight='Auto'), r"CWDLoss: loss_weight='Auto': write loss_weight='auto'"),
    (loss(type=3), r"loss_x: a loss is a dict with `type`, a name or a class, not 3. Choices: .*CWDLoss"),
    (loss(type=torch.nn.ReLU), r"loss_x: ReLU is no loss. Choices: .*CWDLoss"),
    (loss(region=dict(type='TeacherScoreRegion', logits_at=3)), r"TeacherScoreRegion: logits_at=3 must be a text"),
    (loss(type='GIDLoss', heads_at=3), r"GIDLoss: heads_at=3 must be the path of a head"),
    (loss(type='LDLoss'), r"student 'neck' \(FPN\) is none. In RetinaNet it is 'bbox_head'"),
    (loss(type='CrossKDLoss', at='bbox_head.retina_cls'), r"\(Conv2d\) is none. In RetinaNet it is 'bbox_head'"),
    (loss(type='DETRDistillLogitsLoss', at='bbox_head'), r"queries, and .*RetinaNet has none: use another loss"),
    (loss(type='MaskQueryLoss'), r"MaskQueryLoss compares heads that give classes and masks .*RetinaNet has none"),
    (loss(at='bbox_head.anchor_generator'), r"no module 'bbox_head.anchor_generator'"),
    (loss(type='SigmoidKDLoss', at='bbox_head.retina_cls', region=dict(type='SegClassRegion', classes=[1])),
     r'segmentation map'),
])


def test_one_problem(students, det, losses, expected):
    losses = {name: ({key: value for key, value in cfg.items() if value is not None} if isinstance(cfg, dict) else cfg)
              for name, cfg in losses.items()}
    message = problems(students, det, losses)
    assert re.match(r'kd_mm: [12] problem', message)
    assert re.search(expected, message, re.DOTALL), message


def test_channels_that_differ_without_adapter(students, det):
    wide = teacher_of(det, **retinanet_model(neck=24))
    message = problems(students, det, loss(adapter=None), wide)
    assert re.search(r'loss_x: CWDLoss, level 0: student \(2, 16, 16, 16\) and teacher \(2, 24, 16, 16\) differ in '
                     r'channels: add adapter=.*ConvAdapter.*adapter=None', message), message


def test_loss_that_reaches_no_student_parameter(det, coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    cfg.model.backbone.frozen_stages = 2
    with pytest.raises(ValueError, match=r"loss_x reaches no trainable parameter of the student through "
                                         r"\['backbone.layer1'\]: .*Tap a later module"):
        train(cfg, [hook(teacher_of(det), dict(loss_x=dict(type='PKDLoss', at='backbone.layer1')))])


def test_logit_loss_with_other_classes(students, det):
    teacher = teacher_of(det, **retinanet_model(classes=3))
    teacher['train_dataloader'] = dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=('a', 'b', 'c'))))
    losses = dict(loss_x=dict(type='SigmoidKDLoss', at='bbox_head.retina_cls'))
    message = problems(students, det, losses, teacher, classes=('square', 'disc'))
    assert 'Student (2): square, disc. Teacher (3): a, b, c' in message
    # the same number of other classes is no less wrong; unknown names are told by their number
    same_count = teacher_of(det)
    same_count['train_dataloader'] = dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=('disc', 'square'))))
    assert 'same classes in the same order' in problems(students, det, losses, same_count, classes=('square', 'disc'))
    del teacher['train_dataloader']
    assert 'classes: 2 and 3. Student: 18 channels, 9 anchors x 2 class logits, sigmoid, of RetinaHead' in problems(
        students, det, losses, teacher, classes=('square', 'disc'))


def test_teacher_files(students, det, tmp_path):
    for source, expected in (
            ('no/such/teacher.py', r"teacher config 'no/such/teacher.py' does not exist \(looked at /"),
            ('mmdet::retinanet/retinanet_r51_fpn_1x_coco.py', r'Closest: retinanet_r50_fpn_1x_coco.py'),
            ('mmfoo::retinanet/a.py', r'mmfoo is not installed'),
            (dict(backbone=1), r'has no `model`'), (7, r'neither a path')):
        assert re.search(expected, problems(students, det, CWD, source)), source
    missing = str(tmp_path / 'missing.pth')
    assert f'no such checkpoint: {missing}' in problems(students, det, CWD, teacher_ckpt=missing)
    text = tmp_path / 'text.pth'
    text.write_text('hello')
    assert 'cannot be loaded as a checkpoint' in problems(students, det, CWD, teacher_ckpt=str(text))
    own = tmp_path / 'config.py'
    own.write_text(f'model = {teacher_of(det)["model"]!r}\ndefault_scope = "mmdet"\n')
    assert re.search(r"no weights for teacher .*teacher_ckpt='random'", problems(
        students, det, CWD, str(own), teacher_ckpt=None))


def test_what_a_teacher_cannot_be_given(students, det):
    assert 'std=[0.0, 1.0, 1.0] of its data_preprocessor has a 0' in problems(
        students, det, CWD, teacher_of(det, data_preprocessor=dict(std=[0.0, 1.0, 1.0])))
    assert 'torchvision:// names weights of backbones; give a path or an http(s) URL' in problems(
        students, det, CWD, teacher_ckpt='torchvision://resnet50')


def test_checkpoint_of_another_architecture(students, det, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict=students['seg'].state_dict()), path)
    message = problems(students, det, CWD, teacher_ckpt=str(path))
    assert re.search(r'leaves \d+ of \d+ keys unset \(backbone\..*has \d+ keys the model does not have.*'
                     r'wrong file for this config\?.*teacher_strict=False', message), message
    shapes = dict(students['det'].state_dict())
    key = 'neck.fpn_convs.0.conv.weight'
    shapes[key] = torch.zeros(1)
    torch.save(dict(state_dict=shapes), path)
    assert f'1 key of another shape ({key}: file (1,), model (16, 16, 3, 3))' in problems(
        students, det, CWD, teacher_ckpt=str(path))
    distiller = Distiller(students['det'], teacher_of(det), CWD, teacher_ckpt=str(path), teacher_strict=False,
                          scope='mmdet')
    assert len(distiller.teacher.notes) == 1


def test_teacher_of_the_other_task(students, det, seg):
    message = problems(students, det, CWD, teacher_of(seg))
    assert 'is a segmentation model (EncoderDecoder) and the student does detection (RetinaNet)' in message


def test_region_loss_on_data_without_boxes(students, seg):
    message = problems(students, seg, dict(loss_fgd=dict(type='FGDLoss', at='backbone')))
    assert 'loss_fgd: FGDLoss needs ground-truth boxes, which segmentation data do not have' in message
    message = problems(students, seg, dict(loss_x=dict(
        type='PKDLoss', at='backbone', region=dict(type='GTBoxRegion'))))
    assert 'loss_x: GTBoxRegion needs ground-truth boxes' in message


def test_all_problems_are_reported_together(students, det):
    losses = dict(
        loss_a=dict(type='CWDLoss', at='nek'), kd=dict(type='CWDLoss', at='neck'),
        loss_b=dict(type='Nothing', at='neck'), loss_c=dict(type='CWDLoss', at='neck', levels=[9]),
        loss_d=dict(type='CWDLoss', at='bbox_head.get_targets'))
    message = problems(students, det, losses, inherit=('tail', ), task_loss_weight=-1)
    assert message.startswith('kd_mm: 8 problem(s)')
    for part in ("no module 'nek'", "'kd': a loss name", "unknown loss type 'Nothing'", 'levels=[9]', 'never fires',
                 "no module 'tail'", 'task_loss_weight=-1'):
        assert part in message


def test_hook_listed_twice(det):
    twice = [hook(teacher_of(det), CWD), hook(teacher_of(det), CWD)]
    with pytest.raises(ValueError, match='lists kd_mm.DistillHook 2 times .*; put all losses'):
        train(det, twice)


def test_unknown_hook_argument(det):
    with pytest.raises(TypeError, match="unexpected keyword argument 'teachr_ckpt'"):
        make_runner(det, [dict(hook(teacher_of(det), CWD), teachr_ckpt='x')])
