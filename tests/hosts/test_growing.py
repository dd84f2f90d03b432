"""Heads that grow: every layout of class rows on real heads of both hosts, and what cannot be grown."""

import math

import pytest
import torch
from heads import CONFIGS, head_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import widths

from kd_mm.hosts.growing import FROM_BACKGROUND, GROW, grow_head
from kd_mm.hosts.models import build_model
from kd_mm.hosts.weights import inherit_weights
from kd_mm.hosts.zoo import zoo_config

OLD, NEW = ['disc', 'square'], ['star', 'square', 'disc']  # of the teacher; of the student, in another order
PLACE = {1: 1, 2: 0}  # row of the student -> row of the teacher
FREE = ('num_batches_tracked', )


def build(cfg, classes, scope='mmdet'):
    """The model of a config with so many classes in every head."""
    cfg = Config(cfg.to_dict())

    def set_count(section):
        for value in section.values() if hasattr(section, 'values') else section:
            if hasattr(value, 'values') or isinstance(value, (list, tuple)):
                set_count(value)
        if hasattr(section, 'get') and section.get('num_classes') is not None:
            section['num_classes'] = classes

    set_count(cfg.model)
    with DefaultScope.overwrite_default_scope(scope):
        model = build_model(cfg, scope)
    for parameter in model.parameters():  # norms and biases start equal in every model
        torch.nn.init.normal_(parameter)
    return model


def narrow(path, **model):
    cfg = Config.fromfile(str(zoo_config(path)))
    cfg.merge_from_dict(dict(model=dict(backbone=dict(
        depth=18, base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1), **model)))
    return cfg


def two_stage(name='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', **roi):
    return narrow(f'mmdet::{name}', neck=dict(in_channels=widths(8, 18), out_channels=16),
                  rpn_head=dict(in_channels=16, feat_channels=16), roi_head=roi)


def grown(path, cfg, way=GROW, scope='mmdet', names=(NEW, OLD)):
    """Student before, student after, teacher: the state dicts of a module."""
    models = build(cfg, len(names[0]), scope), build(cfg, len(names[1]), scope)
    own, other = (model.get_submodule(path) for model in models)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    problems = inherit_weights(*models, {path: way}, classes=names)
    assert problems == []
    return before, own.state_dict(), other.state_dict()


def check(before, after, teacher, wise, block=1, anchors=1, rest=0, lead=0, place=PLACE):
    """Every row of every parameter: of the class-wise ones by the layout, of the others the teacher's."""
    seen = set()
    for key, value in after.items():
        if not any(key.startswith(start) for start in wise):
            assert torch.equal(value, teacher[key]), key
            continue
        seen.update(start for start in wise if key.startswith(start))
        width, old_width = (lead + count * block + rest for count in (len(NEW), len(OLD)))
        assert len(value) == anchors * width and len(teacher[key]) == anchors * old_width, key
        for anchor in range(anchors):
            own, was, theirs = value[anchor * width:], before[key][anchor * width:], teacher[key][anchor * old_width:]
            for row in range(len(NEW)):
                part = slice(lead + row * block, lead + (row + 1) * block)
                if row in place:
                    source = slice(lead + place[row] * block, lead + (place[row] + 1) * block)
                    assert torch.equal(own[part], theirs[source]), (key, row)
                else:
                    assert torch.equal(own[part], was[part]) and not torch.equal(own[part], theirs[part]), (key, row)
            assert torch.equal(own[:lead], theirs[:lead])
            assert torch.equal(own[width - rest:width], theirs[old_width - rest:old_width])
    assert seen == set(wise)


#: Head -> the parameters with class rows, and anchors a cell.
DENSE = dict(
    retinanet=(['retina_cls.'], 9), fcos=(['conv_cls.'], 1), atss=(['atss_cls.'], 1), gfl=(['gfl_cls.'], 1),
    paa=(['atss_cls.'], 1), tood=(['tood_cls.'], 1), rtmdet=([f'rtm_cls.{level}.' for level in range(3)], 1),
    yolox=([f'multi_level_conv_cls.{level}.' for level in range(3)], 1), vfnet=(['vfnet_cls.'], 1),
    ddod=(['atss_cls.'], 1), fovea=(['conv_cls.'], 1), autoassign=(['conv_cls.', 'center_prior.'], 1),
    yolof=(['cls_score.'], 5))


@pytest.mark.parametrize('name', sorted(DENSE))
def test_dense_heads(name):
    assert name in CONFIGS
    wise, anchors = DENSE[name]
    check(*grown('bbox_head', head_config(name)), wise, anchors=anchors)


def test_a_softmax_of_every_anchor_with_the_background_last():
    cfg = narrow('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', neck=dict(in_channels=widths(8, 18), out_channels=16),
                 bbox_head=dict(in_channels=16, feat_channels=16, loss_cls=dict(
                     _delete_=True, type='CrossEntropyLoss', use_sigmoid=False)))
    check(*grown('bbox_head', cfg), ['retina_cls.'], anchors=9, rest=1)


def test_yolo_has_boxes_before_its_classes():
    cfg = Config.fromfile(str(zoo_config('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py')))
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict(dict(model=dict(bbox_head=dict(out_channels=[8, 8, 8], in_channels=[8, 8, 8]),
                                        neck=dict(out_channels=[8, 8, 8]))))
    wise = [f'convs_pred.{level}.' for level in range(3)]
    check(*grown('bbox_head', cfg), wise, anchors=3, lead=5)


def test_boxes_and_masks_of_every_class():
    before, after, teacher = grown('roi_head', two_stage(bbox_head=dict(in_channels=16, fc_out_channels=16),
                                                         mask_head=dict(in_channels=16, conv_out_channels=16)))
    parts = dict(cls=(['bbox_head.fc_cls.'], dict(rest=1)), reg=(['bbox_head.fc_reg.'], dict(block=4)),
                 mask=(['mask_head.conv_logits.'], {}))
    wise = [start for starts, _ in parts.values() for start in starts]
    for starts, layout in parts.values():
        kept = {key: value for key, value in after.items()
                if key.startswith(starts[0]) or not any(key.startswith(start) for start in wise)}
        check(before, kept, teacher, starts, **layout)


def test_boxes_without_classes_are_copied():
    cfg = two_stage(bbox_head=dict(in_channels=16, fc_out_channels=16, reg_class_agnostic=True),
                    mask_head=dict(in_channels=16, conv_out_channels=16))
    check(*grown('roi_head.bbox_head', cfg), ['fc_cls.'], rest=1)


def test_a_cascade():
    cfg = two_stage('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py')
    for head in cfg.model.roi_head.bbox_head:
        head.update(in_channels=16, fc_out_channels=16)
    check(*grown('roi_head', cfg), [f'bbox_head.{stage}.fc_cls.' for stage in range(3)], rest=1)
    check(*grown('roi_head.bbox_head.1', cfg), ['fc_cls.'], rest=1)


def test_queries():
    cfg = narrow('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', neck=dict(
        in_channels=widths(8, 18)[1:], norm_cfg=dict(type='GN', num_groups=8)))
    # One layer under six names, for the boxes are not refined.
    check(*grown('bbox_head', cfg), [f'cls_branches.{layer}.' for layer in range(6)])
    cfg = narrow('mmdet::detr/detr_r50_8xb2-150e_coco.py', neck=dict(in_channels=[64]))
    check(*grown('bbox_head', cfg), ['fc_cls.'], rest=1)


def segmenter(name='fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', **head):
    norm = dict(type='BN', requires_grad=True)
    cfg = narrow(f'mmseg::{name}', pretrained=None, decode_head=dict(
        in_channels=64, channels=16, norm_cfg=norm, **head), auxiliary_head=dict(
            in_channels=32, channels=16, norm_cfg=norm))
    cfg.model.backbone.norm_cfg = norm
    return cfg


def test_segmenters():
    check(*grown('decode_head', segmenter(), scope='mmseg'), ['conv_seg.'])
    check(*grown('auxiliary_head', segmenter(), scope='mmseg'), ['conv_seg.'])
    cfg = segmenter('encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', in_index=[1, 2, 3])
    cfg.model.decode_head.update(in_channels=[16, 32, 64], num_codes=4)
    check(*grown('decode_head', cfg, scope='mmseg'), ['conv_seg.', 'se_layer.'])


def test_new_classes_start_from_the_background():
    names = ['background', 'road', 'car', 'sky'], ['background', 'road']
    before, after, teacher = grown('decode_head', segmenter(), FROM_BACKGROUND, 'mmseg', names)
    weight, bias = teacher['conv_seg.weight'], teacher['conv_seg.bias']
    assert torch.equal(after['conv_seg.weight'], weight[[0, 1, 0, 0]])
    torch.testing.assert_close(after['conv_seg.bias'],
                               torch.stack([bias[0] - math.log(3), bias[1], *[bias[0] - math.log(3)] * 2]))
    # All that was background is the background or a new class, and no old class has changed.
    features = torch.randn(2, 16, 5, 5)
    own, theirs = (torch.nn.functional.conv2d(features, state['conv_seg.weight'], state['conv_seg.bias']).softmax(dim=1)
                   for state in (after, teacher))
    torch.testing.assert_close(own[:, [0, 2, 3]].sum(dim=1), theirs[:, 0])
    torch.testing.assert_close(own[:, 1], theirs[:, 1])

    before, after, teacher = grown('roi_head.bbox_head', two_stage(bbox_head=dict(in_channels=16, fc_out_channels=16)),
                                   FROM_BACKGROUND)
    weight, bias = teacher['fc_cls.weight'], teacher['fc_cls.bias']
    assert torch.equal(after['fc_cls.weight'], weight[[2, 1, 0, 2]])
    torch.testing.assert_close(after['fc_cls.bias'], bias[[2, 1, 0, 2]] - torch.tensor([1., 0., 0., 1.]) * math.log(2))
    assert torch.equal(after['fc_reg.weight'][:4], before['fc_reg.weight'][:4])  # a box has no background


def refusal(path, cfg, way=GROW, scope='mmdet', names=(NEW, OLD), teacher=None):
    models = build(cfg, len(names[0]), scope), build(teacher or cfg, len(names[1]), scope)
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    problems = inherit_weights(*models, {path: way}, classes=names)
    assert len(problems) == 1
    assert all(torch.equal(value, before[key]) for key, value in models[0].state_dict().items())
    return problems[0]


def test_what_cannot_be_grown():
    gfl = head_config('gfl')
    assert "'neck' (FPN) cannot be grown: no parameter in it is known to have rows for classes" in refusal('neck', gfl)
    assert 'neither a class of that name nor a last row of a softmax' in refusal('bbox_head', gfl, FROM_BACKGROUND)
    assert "'bigger' is none of 'copy', 'grow'" in refusal('bbox_head', gfl, 'bigger')
    assert 'no class name in common' in refusal('bbox_head', gfl, names=(NEW, ['a', 'b']))
    wide = head_config('gfl')
    wide.model.bbox_head.feat_channels = 64
    assert 'cls_convs.0.conv.weight, student (32, 32, 3, 3), teacher (64, 32, 3, 3): it is not known' in refusal(
        'bbox_head', gfl, teacher=wide)
    agnostic = two_stage(bbox_head=dict(in_channels=16, fc_out_channels=16, reg_class_agnostic=True))
    assert 'the teacher has reg_class_agnostic=True and the student has not' in refusal(
        'roi_head.bbox_head', two_stage(bbox_head=dict(in_channels=16, fc_out_channels=16)), teacher=agnostic)
    seg = segmenter()
    text = refusal('decode_head', seg, FROM_BACKGROUND, 'mmseg')
    assert 'has no row for the background that both know' in text
    assert 'the rows are not in the same order' in refusal('bbox_head', narrow_retina(9), teacher=narrow_retina(3))
    pointed = Config.fromfile(str(zoo_config('mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py')))
    pointed.model.pretrained = None
    assert 'PointHead cannot be grown, for it takes the scores of the classes as inputs' in refusal(
        'decode_head', pointed, scope='mmseg')


def narrow_retina(anchors):
    return narrow('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', neck=dict(
        in_channels=widths(8, 18), out_channels=16), bbox_head=dict(
            in_channels=16, feat_channels=16, anchor_generator=dict(scales_per_octave=anchors // 3)))


def test_names_must_be_known_and_as_many_as_the_classes():
    cfg = head_config('gfl')
    models = build(cfg, 3), build(cfg, 2)
    heads = [model.bbox_head for model in models]
    for names, side in (((None, OLD), 'student'), ((NEW, None), 'teacher')):
        assert f'those of the {side} are not known' in grow_head('bbox_head', *heads, names).problems[0]
    problem = grow_head('bbox_head', *heads, (NEW, [*OLD, 'moon'])).problems[0]
    assert 'the teacher has 2 classes in this head and 3 class names (disc, square, moon)' in problem


class BBoxHead(torch.nn.Module):
    """A copy of the host's, changed: its classifier has more rows than classes and a background."""

    def __init__(self, classes, rows):
        super().__init__()
        self.num_classes, self.fc_cls = classes, torch.nn.Linear(4, rows)


def test_rows_of_a_meaning_that_is_not_known():
    """A background is one row more, and Seesaw's classifier has two; which class is more than that belongs to?"""
    for more in range(4):
        growth = grow_head('bbox_head', BBoxHead(3, 3 + more), BBoxHead(2, 2 + more), (['a', 'b', 'c'], ['a', 'b']))
        if more < 3:
            assert not growth.problems and len(growth.rows['fc_cls.bias'][0]) == 2 + more
        else:
            assert 'its 6 rows in the student are not those of 3 classes' in growth.problems[0]
