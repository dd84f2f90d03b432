"""Places on real models; every family is tried by ``tools/sweep.py``."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from kd_mm.checkpoint import zoo_config
from kd_mm.places import DENSE, PLACES, find
from kd_mm.teacher import build_model


def model(name):
    cfg = Config.fromfile(str(zoo_config(name)))
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        if cfg.model.get(part) is not None and 'norm_cfg' in cfg.model[part]:
            cfg.model[part].norm_cfg = dict(type='BN')
    return build_model(cfg, cfg.default_scope)


@pytest.mark.parametrize('name, neck, logits', [
    ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'neck', ('bbox_head.retina_cls', )),
    ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', 'neck', ('bbox_head.multi_level_conv_cls.*', )),
    ('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', 'neck', ('bbox_head.cls_convs.*', )),
    ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'neck', ('rpn_head.rpn_cls', )),
    ('mmdet::solo/solo_r50_fpn_1x_coco.py', 'neck', ('mask_head.conv_cls', )),
    ('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', 'backbone', ('decode_head.conv_seg', )),
    ('mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py', 'backbone', ('decode_head.1.conv_seg', )),
    ('mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py', 'neck', ('decode_head.0.conv_seg', )),
])
def test_where_they_are(name, neck, logits):
    built = model(name)
    assert find(built, '@neck').paths == (neck, )
    assert find(built, '@backbone').paths == ('backbone', )
    assert find(built, '@logits').paths == logits


def test_query_heads_have_no_dense_logits():
    with pytest.raises(KeyError, match="DETR with DETRHead has no dense class logits.*'@neck'"):
        find(model('mmdet::detr/detr_r50_8xb2-150e_coco.py'), '@logits')


def test_class_channels_of_yolo_v3():
    class Head(nn.Module):
        num_attrib = 7  # 2 classes

    pick = DENSE['YOLOV3Head'][1]
    channels = torch.arange(14.).view(1, 14, 1, 1)
    assert pick(Head(), (channels, ))[0].flatten().tolist() == [5, 6, 12, 13]


@pytest.mark.parametrize('name', [
    'mmseg::ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
])
def test_backbones_that_return_more_in_training(name):
    """The pick leaves what evaluation returns, so that student and teacher are compared alike."""
    built = model(name)
    place = find(built, '@backbone')
    images = torch.rand(2, 3, 64, 64)
    shapes = []
    for training in (True, False):
        built.backbone.train(training)
        with torch.no_grad():
            output = built.backbone(images)
        outputs = (output, ) if isinstance(output, torch.Tensor) else tuple(output)
        assert len(outputs) == (1 if not training else 3 if 'pid' in name else 2)
        shapes.append([tuple(tensor.shape) for tensor in place.pick(outputs)])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 1


def test_class_tokens_are_left_out():
    built = nn.Module()
    built.backbone = nn.Identity()
    pick = find(built, '@backbone').pick
    maps, token = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8)
    assert [tensor.dim() for tensor in pick((maps, token, maps))] == [4, 4]
    assert pick((token, )) == (token, )


def test_unknown_place_and_empty_model():
    with pytest.raises(KeyError, match="'@head' is no place; there are " + ', '.join(map(repr, PLACES))):
        find(nn.Linear(1, 1), '@head')
    with pytest.raises(KeyError, match='Linear has none of neck, .* give a module path'):
        find(nn.Linear(1, 1), '@neck')
