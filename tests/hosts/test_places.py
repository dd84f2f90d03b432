"""Places on real models; every family is tried by ``tools/studies/sweep.py``."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import build_model
from kd_mm.hosts.picks import semantic_logits, yolo_v3
from kd_mm.hosts.places import PLACES, find
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config


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
    ('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py', 'decode_head.pixel_decoder', (
        'decode_head', )),
])
def test_where_they_are(name, neck, logits):
    built = model(name)
    assert find(built, '@neck').paths == (neck, )
    assert find(built, '@backbone').paths == ('backbone', )
    assert find(built, '@logits').paths == logits


def test_query_heads_have_no_dense_logits():
    with pytest.raises(KeyError, match="DETR with DETRHead has no dense class logits.*'@neck'"):
        find(model('mmdet::detr/detr_r50_8xb2-150e_coco.py'), '@logits')


def test_semantic_logits_by_hand():
    """Two queries of two classes on two pixels; each query is half "nothing"."""
    scores = torch.log(torch.tensor([[[0.5, 1e-9, 0.5], [1e-9, 0.25, 0.75]]]))
    masks = torch.logit(torch.tensor([[0.8, 0.1], [0.4, 0.2]])).view(1, 2, 1, 2)
    found = semantic_logits(scores, masks)
    # class 0: 0.5 * (0.8, 0.1); class 1: 0.25 * (0.4, 0.2)
    expected = torch.tensor([[0.4, 0.05], [0.1, 0.05]]).view(1, 2, 1, 2)
    assert torch.allclose(found.exp(), expected, atol=1e-6)
    assert torch.allclose(found.softmax(dim=1)[0, :, 0], torch.tensor([[0.8, 0.5], [0.2, 0.5]]), atol=1e-6)
    empty = semantic_logits(scores, torch.full_like(masks, -1e4))
    assert torch.allclose(empty, torch.full_like(empty, 1e-6).log()) and torch.isfinite(empty).all()
    assert semantic_logits(scores.half(), masks.half()).dtype == torch.float32


@pytest.mark.parametrize('name', ['mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
                                  'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py'])
def test_semantic_logits_are_what_the_model_predicts(name):
    built = model(f'mmseg::{name}').eval()
    built.data_preprocessor.size = (64, 64)
    data = built.data_preprocessor(synthetic_batch(built, 2, (64, 64)), False)
    place = find(built, '@logits')
    tap = Tap(built, *place.paths)
    tap.arm((64, 64))
    with torch.no_grad():
        forward_tensor(built, data['inputs'], data['data_samples'], list(place.paths))
        found, = place.pick(tap.read())
        metas = [dict(sample.metainfo, batch_input_shape=(64, 64), pad_shape=tuple(found.shape[2:]),
                      img_shape=tuple(found.shape[2:])) for sample in data['data_samples']]
        # At the size of the masks, the host's own prediction does no resizing.
        predicted = built.decode_head.predict(built.extract_feat(data['inputs']), metas, built.test_cfg)
    assert found.shape == predicted.shape and found.shape[1] == built.decode_head.num_classes
    assert torch.allclose(found.exp(), predicted.clamp(min=1e-6), rtol=1e-4, atol=1e-6)


def test_class_channels_of_yolo_v3():
    class Head(nn.Module):
        num_attrib = 7  # 2 classes

    channels = torch.arange(14.).view(1, 14, 1, 1)
    assert yolo_v3(Head(), (channels, ))[0].flatten().tolist() == [5, 6, 12, 13]


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


def test_of_a_trident_the_branch_that_is_tested():
    """In training the branches are images of their own, and their batch norm is that of evaluation."""
    built = model('mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py')
    for part in built.backbone.modules():
        if type(part).__name__ == 'TridentConv':  # mmdet 3.3.0 leaves its weights as the memory was
            nn.init.kaiming_uniform_(part.weight)
    images, found = torch.rand(2, 3, 64, 96), []
    for training in (True, False):
        built.backbone.train(training)
        with torch.no_grad():
            output = tuple(built.backbone(images))
        assert len(output[0]) == (6 if training else 2)
        found.append(find(built, '@backbone').pick(output)[0])
    assert torch.allclose(*found, rtol=1e-5) and find(built, '@logits').paths == ('rpn_head.rpn_cls', )
    built.backbone.train()
    assert find(built, '@logits').pick((torch.arange(6.), ))[0].tolist() == [2, 3]
    built.backbone.test_branch_idx = -1  # all of them are tested
    assert len(find(built, '@logits').pick((torch.arange(6.), ))[0]) == 6


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
