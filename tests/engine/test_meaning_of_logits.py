"""Logits of another head: what differs is said in words, once; what only looks equal is refused."""

import copy
import re

import pytest
from heads import CONFIGS, build_head, head_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from one_stage import as_teacher, ssd_config, yolov3_config
from stock import segmentor
from torch import nn
from two_stage import two_stage_config

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import guesses
from kd_mm.hosts.meaning import BOXES, CLASSES, DISTRIBUTIONS, OBJECTNESS, QUALITY, Meaning, differences
from kd_mm.hosts.models import build_model, class_counts, class_names
from kd_mm.hosts.places import find, head_meaning, meaning_at
from kd_mm.hosts.zoo import zoo_config

CELLS = ('RBC', 'WBC', 'Platelets')
ONE_ANCHOR = dict(ratios=[1.0])  # of RetinaNet: 3 scales, so 3 anchors a cell
FAULT = 'give logits that do not mean the same'


def built(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return build_model(cfg, cfg.default_scope).train()


def retinanet(classes=3, **head):
    cfg = head_config('retinanet')
    cfg.merge_from_dict(dict(model=dict(bbox_head=dict(num_classes=classes, **head))))
    return cfg


def distil(student, teacher, loss='SigmoidKDLoss', names=(None, None), **cfg):
    if not isinstance(student, nn.Module):
        student = built(student)
    cfg = dict(dict(at='@logits'), **cfg)
    return Distiller(student, as_teacher(teacher, names[1]), dict(loss_x=dict(type=loss, **cfg)),
                     teacher_ckpt='random', classes=names[0], scope='mmdet')


def refusal(*args, **kwargs):
    """The one problem that there is."""
    with pytest.raises(ValueError) as caught:
        distil(*args, **kwargs)
    found = caught.value.found
    assert len(found) == 1, found
    return found[0]


def test_a_two_stage_detector_teaches_yolo_v3():
    """Three anchors of three classes and three anchors of objectness; the names of the classes are the same."""
    text = refusal(yolov3_config(), two_stage_config('faster'), names=(CELLS, CELLS))
    assert text.startswith("loss_x, level 0: student '@logits' (bbox_head.convs_pred.0, ") and FAULT in text
    assert "teacher '@logits' (rpn_head.rpn_cls)" in text
    assert 'the student gives class logits, the teacher objectness (any object or none; no classes)' in text
    assert 'Student: 9 channels, 3 anchors x 3 class logits, sigmoid, of YOLOV3Head (RBC, WBC, Platelets)' in text
    assert 'Teacher: 3 channels, 3 anchors x 1 objectness' in text and text.count('RBC') == 1
    assert "no classes, and the student has no proposals: use a feature loss (at='@neck')" in text
    # The names of the classes differ: still not what is wrong.
    text = refusal(yolov3_config(), two_stage_config('faster'), names=(CELLS, ('a', 'b', 'c')))
    assert FAULT in text and 'same classes in the same order' not in text


EQUAL_CHANNELS = [
    ('three anchors of one class, one anchor of three',
     lambda: retinanet(1, anchor_generator=ONE_ANCHOR), lambda: head_config('fcos'), {},
     ['anchors a cell: 3 and 1; classes: 1 and 3', '3 channels, 3 anchors x 1', '3 channels, 1 anchor x 3']),
    ('a head of one class, the objectness of proposals',
     lambda: retinanet(1, anchor_generator=ONE_ANCHOR), lambda: two_stage_config('faster'), {},
     ['the student gives class logits, the teacher objectness']),
    ('two classes and the background, three classes',
     lambda: retinanet(2, loss_cls=dict(_delete_=True, type='CrossEntropyLoss')), lambda: retinanet(3), {},
     ['classes: 2 and 3; channel of the background: last and none; scores by a softmax and by a sigmoid each',
      'Student: 27 channels, 9 anchors x 3 class logits, the last of them the background, softmax', '27 channels']),
    ('classes and boxes', lambda: retinanet(4), lambda: retinanet(4),
     dict(at=None, student_at='bbox_head.retina_cls', teacher_at='bbox_head.retina_reg'),
     ['the student gives class logits, the teacher box numbers', "Tap the same branch in both, such as '@logits'"]),
    ('the objectness of two kinds', lambda: two_stage_config('faster'), lambda: yolov3_config(1), {},
     ['the student gives objectness (any object or none; no classes), the teacher class logits',
      'the teacher has no proposals']),
]


@pytest.mark.parametrize('student, teacher, cfg, expected', [case[1:] for case in EQUAL_CHANNELS],
                         ids=[case[0] for case in EQUAL_CHANNELS])
def test_what_only_looks_equal(student, teacher, cfg, expected):
    """The numbers of channels are equal by coincidence."""
    cfg = {key: value for key, value in dict(dict(at='@logits'), **cfg).items() if value is not None}
    given = student(), teacher()
    with pytest.raises(ValueError) as caught:
        Distiller(built(given[0]), as_teacher(given[1]), dict(loss_x=dict(type='SigmoidKDLoss', **cfg)),
                  teacher_ckpt='random', scope='mmdet')
    text, = caught.value.found
    assert FAULT in text and all(part in text for part in expected), text


def test_the_channels_are_equal_indeed():
    """So that the cases above are about coincidence."""
    counts = []
    for _, student, teacher, cfg, _ in EQUAL_CHANNELS:
        pair = []
        for side, make in (('student', student), ('teacher', teacher)):
            model = built(make())
            path = cfg.get(f'{side}_at') or find(model, '@logits').paths[0]
            module = model.get_submodule(path.replace('*', '0'))
            pair.append(module.out_channels * (1 if path != 'bbox_head.convs_pred.*' else 1 / 6))
        counts.append(pair)
    # YOLOv3: 3 anchors x (4 box, 1 objectness, 1 class), of which the last are taken
    assert counts == [[3, 3], [3, 3], [27, 27], [36, 36], [3, 3]]


def test_bins_of_box_distributions():
    teacher = head_config('gfl')
    teacher.merge_from_dict(dict(model=dict(bbox_head=dict(reg_max=8))))
    text = refusal(head_config('gfl'), teacher, at='bbox_head.gfl_reg')
    assert 'bins of a side: 17 and 9' in text and '68 channels, 1 anchor x 68 bins of box distributions' in text


@pytest.mark.parametrize('loss, at, message', [
    ('SoftmaxKDLoss', 'bbox_head.gfl_reg', r"1 anchor x 68 bins of box distributions.* LDLoss \(at='bbox_head'\)"),
    ('DISTLoss', 'bbox_head.retina_reg', r"9 anchors x 4 box numbers.* are no logits\. Use FitNetLoss"),
    ('SoftmaxKDLoss', '@logits', r'27 channels are 9 anchors x 3 .*over the anchors, too\. Use SigmoidKDLoss'),
    ('DISTLoss', '@logits', r'and anchors=1, and the 27 channels.* Use SigmoidKDLoss, or anchors=9')])
def test_what_is_no_choice_between_classes(loss, at, message):
    """Both sides mean the same, and the loss something else."""
    head = 'gfl' if 'gfl' in at else 'retinanet'
    text = refusal(head_config(head), head_config(head), loss, at=at)
    assert re.search(message, text) and f'{loss} ' in text and at in text, text


def test_a_softmax_over_classes_that_do_not_compete_is_said():
    found = distil(head_config('fcos'), head_config('fcos'), 'SoftmaxKDLoss')
    assert any('FCOSHead scores by a sigmoid each' in note for note in guesses(found))
    assert not any('sigmoid each' in note for note in guesses(distil(
        retinanet(3), retinanet(3), 'DISTLoss', anchors=9, activation='sigmoid')))


def test_names_say_nothing_about_objectness():
    """Two first stages, whatever the classes of their detectors: they train together."""
    student, teacher = (two_stage_config('faster', classes=count) for count in (3, 2))
    assert distil(student, teacher, names=(CELLS, ('a', 'b'))).terms
    head = distil(student, teacher, 'BCKDLoss', (CELLS, ('a', 'b')), at='rpn_head')
    assert not head.terms['loss_x'].reader.has_classes()
    text = refusal(student, teacher, names=(CELLS, ('RBC', 'b')), classes='common')
    assert "classes='common', but there are no classes at student '@logits' (rpn_head.rpn_cls)" in text
    assert text.endswith('Remove classes')
    other = two_stage_config('faster')
    other.merge_from_dict(dict(model=dict(rpn_head=dict(anchor_generator=dict(ratios=[1.0])))))
    assert 'anchors a cell: 3 and 1' in refusal(student, other)


def test_a_fault_of_classes_is_told_once():
    voc, coco = [f'v{index}' for index in range(3)], [f'c{index}' for index in range(5)]
    text = refusal(retinanet(3), retinanet(5), names=(voc, coco))
    assert text.startswith('loss_x: a logit loss needs the same classes in the same order. Student (3): v0, v1, v2.')
    # what else is wrong with the term or others is told all the same
    with pytest.raises(ValueError) as caught:
        Distiller(built(retinanet(3)), as_teacher(retinanet(5), coco), dict(
            loss_x=dict(type='SigmoidKDLoss', at='@logits'), loss_y=dict(type='CWDLoss', at='neck', levels=[9])),
            teacher_ckpt='random', classes=voc, scope='mmdet')
    assert len(caught.value.found) == 2


def test_the_order_of_the_classes():
    text = refusal(retinanet(3), retinanet(3), names=(CELLS, CELLS[::-1]))
    assert 'same order (the same ones in another order). Student (3): RBC, WBC, Platelets. Teacher (3): Plat' in text
    background = refusal(retinanet(3), retinanet(3), names=(('background', 'a', 'b'), ('a', 'b', 'background')))
    assert 'in another order' in background
    assert distil(retinanet(3), retinanet(3), names=(CELLS, CELLS[::-1]), classes='common').terms


def test_numbers_of_classes_without_names():
    text = refusal(retinanet(3), retinanet(5))
    assert 'classes: 3 and 5. Student: 27 channels' in text and '(classes unknown)' in text
    assert "classes='common'" in text


def test_classes_are_not_picked_beside_a_background():
    """Six anchors of two classes and the background are 18 channels, as many as nine anchors of two classes."""
    text = refusal(ssd_config(2), ssd_config(2), names=(('a', 'b'), ('b', 'a')), classes='common')
    assert "classes='common' picks channels of maps without a background" in text
    assert '3 class logits, the last of them the background, softmax, of SSDHead' in text


def test_names_of_a_data_set_that_are_not_the_models():
    """Who changes the head of an installed config alone has no teacher of COCO's classes."""
    cfg = Config.fromfile(str(zoo_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')))
    assert len(class_names(cfg)) == 80
    cfg.model.bbox_head.num_classes = 3
    assert class_names(cfg) is None and len(class_names(cfg, counted=False)) == 80
    cfg.train_dataloader.dataset.metainfo = dict(classes=CELLS[:2])
    assert class_names(cfg) == list(CELLS[:2])  # said by the user: his to answer for
    panoptic = Config.fromfile(str(zoo_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py')))
    assert class_counts(panoptic.model) == {133} and len(class_names(panoptic)) == 133


def test_segmentors(tmp_path):
    """Two channels are predicted by a softmax whatever their loss (Dice and focal losses take sigmoids); one is not."""
    def binary(out_channels, sigmoid):
        cfg = copy.deepcopy(segmentor(tmp_path, tmp_path, classes=2))
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.update(out_channels=out_channels, threshold=0.3 if out_channels == 1 else None,
                        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=sigmoid))
        return cfg

    student = built(binary(2, False))
    losses = dict(loss_x=dict(type='SoftmaxKDLoss', at='@logits'))
    assert Distiller(student, as_teacher(binary(2, True)), losses, teacher_ckpt='random', scope='mmseg').terms
    with pytest.raises(ValueError) as caught:
        Distiller(student, as_teacher(binary(1, True)), dict(loss_x=dict(type='SigmoidKDLoss', at='@logits')),
                  teacher_ckpt='random', scope='mmseg')
    text, = caught.value.found
    assert 'classes: 2 and 1; scores by a softmax' in text and "student '@logits' (decode_head.conv_seg)" in text
    losses = dict(loss_x=dict(type='SigmoidKDLoss', student_at='auxiliary_head.conv_seg', teacher_at='@logits'))
    assert Distiller(student, as_teacher(binary(2, False)), losses, teacher_ckpt='random', scope='mmseg').terms


def test_a_channel_of_the_background():
    first, last = (Meaning(CLASSES, 'A', 3, side, False, anchors=1) for side in ('first', 'last'))
    assert differences(first, last) == ['channel of the background: first and last'] and not differences(last, last)


@pytest.mark.parametrize('name', CONFIGS)
def test_meanings_of_dense_heads(name):
    """Every anchor has as many channels as the table says, and the other branches are no classes."""
    model = build_head(name)
    place = find(model, '@logits')
    path = place.paths[0].replace('*', '0')
    found = meaning_at(model, path).of(model.get_submodule(path).out_channels)
    assert found == place.meaning.of(model.get_submodule(path).out_channels)
    assert (found.kind, found.classes, found.sigmoid, found.background) == (CLASSES, 3, True, None)
    assert found.anchors == (1 if name == 'yolox' else model.bbox_head.num_base_priors)
    assert head_meaning(model, 'bbox_head') == place.meaning and meaning_at(model, 'bbox_head') is None
    others = {path: meaning_at(model, f'bbox_head.{path}') for path, _ in model.bbox_head.named_modules() if path}
    kinds = {meaning.kind for meaning in others.values() if meaning is not None}
    assert (DISTRIBUTIONS if name == 'gfl' else BOXES) in kinds
    assert kinds <= {CLASSES, BOXES, DISTRIBUTIONS, OBJECTNESS, QUALITY}
    assert meaning_at(model, 'neck') is None and meaning_at(model, 'bbox_head.cls_convs.0') is None
    for branch, meaning in others.items():
        if meaning is not None and hasattr(model.bbox_head.get_submodule(branch), 'out_channels'):
            assert meaning.of(model.bbox_head.get_submodule(branch).out_channels).anchors == found.anchors, branch


def test_meanings_of_softmax_heads_and_picks():
    ssd = built(ssd_config())
    place = find(ssd, '@logits')
    assert place.meaning == Meaning(CLASSES, 'SSDHead', 3, 'last', False)
    assert meaning_at(ssd, 'bbox_head.reg_convs.0').kind == BOXES
    yolo = built(yolov3_config())
    assert find(yolo, '@logits').meaning == Meaning(CLASSES, 'YOLOV3Head', 3, None, True, given_object=True)
    assert meaning_at(yolo, 'bbox_head.convs_pred.0') is None  # boxes, objectness and classes in one
    faster = built(two_stage_config('faster'))
    assert find(faster, '@logits').meaning == meaning_at(faster, 'rpn_head.rpn_cls')
    assert find(faster, '@logits').meaning.kind == OBJECTNESS


def test_a_mask_transformer_means_the_same_as_a_segmentor(tmp_path):
    """Its queries have a class for nothing; the logits that are made of them have none."""
    cfg = Config.fromfile(str(zoo_config('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py')))
    queries = find(build_model(cfg, 'mmseg'), '@logits').meaning
    assert queries == Meaning(CLASSES, 'Mask2FormerHead', 19, None, False)
    assert not differences(queries.of(19), find(built(segmentor(tmp_path, tmp_path)), '@logits').meaning.of(19))


@pytest.mark.parametrize('student, teacher, said', [
    ('rtmdet', 'yolox', 'YOLOXHead multiplies its class scores with an objectness, and RTMDetSepBNHead has none'),
    ('yolox', 'rtmdet', 'which its objectness says already'), ('yolox', 'yolox', None), ('rtmdet', 'rtmdet', None)])
def test_classes_beside_an_objectness_say_nothing_of_the_background(student, teacher, said):
    """YOLOX learns its classes at positives alone; elsewhere they are whatever they are."""
    models = built(head_config(student)), head_config(teacher)
    notes = dict.fromkeys(distil(*models).agreement.notes)  # one a level, told once
    assert [said in note for note in notes if 'objectness' in note] == ([True] if said else [])
    notes = distil(*models, region=dict(type='GTBoxRegion')).agreement.notes
    assert not any('objectness' in note for note in notes)
