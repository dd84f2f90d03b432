"""Taps that give nothing, or something else in training than in the forward pass that a teacher runs."""

import re

import pytest
import torch
from heads import head_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from one_stage import as_teacher
from torch import nn
from two_stage import two_stage_config

from kd_mm import build
from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.hosts.rows import shared_places
from kd_mm.hosts.zoo import zoo_config
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS

DDRNET = 'mmseg::ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py'
PIDNET = 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
TRIDENT = 'mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py'


def zoo(name):
    """A segmentor on crops of 64 x 64, as its config has it otherwise."""
    cfg = Config.fromfile(str(zoo_config(name)))
    for part in ('backbone', 'decode_head'):
        if 'norm_cfg' in cfg.model[part]:
            cfg.model[part].norm_cfg = dict(type='BN')
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.backbone.init_cfg = None
    return cfg


def distil(cfg, **loss):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build_model(cfg, cfg.default_scope).train()
    loss = dict(dict(type='CWDLoss'), **loss)
    return Distiller(model, as_teacher(cfg), dict(loss_x=loss), teacher_ckpt='random', scope=cfg.default_scope)


def refusal(cfg, **loss):
    with pytest.raises(ValueError) as caught:
        distil(cfg, **loss)
    text, = caught.value.found
    return text


def test_a_head_of_training_only():
    text = refusal(zoo(DDRNET), at='decode_head.aux_cls_seg')
    assert text.startswith("loss_x: the tap at teacher 'decode_head.aux_cls_seg' never fires: the module is used in "
                           'training only (an auxiliary output, ')
    assert re.search(r"Beside it fire .*'decode_head\.conv_seg' \[2x19x8x8\]", text) and 'kd-mm taps CONFIG' in text


def test_a_method_that_no_pass_calls():
    text = refusal(head_config('retinanet'), at='bbox_head.get_anchors')
    assert "never fires: the module is used in training only" in text  # the host's losses call it
    text = refusal(head_config('retinanet'), at='backbone.make_stage_plugins')
    assert 'never fires: the module is not used by the forward pass, or returns no floating-point tensor' in text
    assert "Beside it fire 'backbone." in text


@pytest.mark.parametrize(('name', 'at', 'shapes', 'mend'), [
    (DDRNET, 'backbone', r'\[2x64x8x8, 2x128x8x8\] in training and \[2x128x8x8\]', "Write at='@backbone'"),
    (PIDNET, 'decode_head', r'\[2x19x8x8, 2x19x8x8, 2x1x8x8\] in training and \[2x19x8x8\]', "such as '@logits'")])
def test_outputs_of_training_that_come_first(name, at, shapes, mend):
    """Compared by index the student's auxiliary branch would learn from the teacher's main one, without a word."""
    text = refusal(zoo(name), at=at)
    assert re.search(shapes, text) and mend in text and f"student '{at}'" in text
    assert distil(zoo(name), at='@backbone' if at == 'backbone' else '@logits').terms


def test_outputs_of_training_that_come_last():
    """The first is the same in both: what a config of today says goes on."""
    assert distil(zoo(DDRNET), at='decode_head').terms


def test_rows_in_one_model_belong_together():
    """Self-distillation asks one model about its own proposals."""
    cfg = two_stage_config('faster')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg, 'mmdet').train()
    losses = dict(loss_x=dict(type='FitNetLoss', student_at='roi_head.bbox_head.shared_fcs.0',
                              teacher_at='roi_head.bbox_head.shared_fcs.1'))
    assert Distiller(model, 'self', losses, scope='mmdet').terms


def test_which_place_stands_for_a_path():
    models = {}
    for kind in ('faster', 'mask', 'cascade'):
        with DefaultScope.overwrite_default_scope('mmdet'):
            models[kind] = build_model(two_stage_config(kind), 'mmdet')
    for kind, path, places in (
            ('faster', 'roi_head.bbox_head.fc_cls', ('@roi_logits', )),
            ('cascade', 'roi_head.bbox_head.2.fc_reg', ('@roi_boxes', )),
            ('cascade', 'roi_head.mask_head.0', ('@roi_masks', )), ('mask', 'roi_head', ('@roi_features', )),
            ('mask', 'roi_head.mask_head.conv_logits', ('@roi_masks', )),
            ('faster', 'roi_head.mask_head', ('@roi_features', )), ('faster', 'rpn_head.rpn_cls', None)):
        assert shared_places(models[kind], path) == places, path
    wrapped = nn.Module()
    wrapped.teacher = models['faster']
    assert shared_places(wrapped, 'teacher.roi_head.bbox_head.fc_cls') == ('@roi_logits', )


def test_a_stage_that_cannot_be_asked():
    model = nn.Module()
    model.roi_head = nn.Module()  # a second stage of another kind
    model.roi_head.semantic_head = type('FusedSemanticHead', (nn.Module, ), {})()
    assert shared_places(model, 'roi_head.bbox_head') == ()
    assert shared_places(model, 'roi_head.semantic_head') is None  # it looks at whole images


class CarelessLoss(KDLoss):
    """A loss of a user that has not thought of everything, and does not say what it takes."""

    def level_loss(self, level, student, teacher, batch, mask):
        return (student[0, 0, 0, 10**6] - teacher.mean()).square()


def test_what_a_loss_raises_is_told_with_its_taps(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'CarelessLoss', CarelessLoss)
    text = refusal(head_config('retinanet'), type='CarelessLoss', at='neck', levels=[0])
    assert text.startswith("loss_x: CarelessLoss cannot take what its taps give: student 'neck' [2x32x16x16, ")
    assert text.endswith('dimension 3 with size 16)') and 'IndexError' in text and "teacher 'neck'" in text


def test_kinds_of_tensors():
    """Tokens, rows and volumes for a loss on maps, and maps for one on rows."""
    loss = build(dict(type='CWDLoss'))
    for shape, said in (((8, 6), 'rows (M, C)'), ((2, 5, 6), 'tokens (N, L, C)'), ((2, 3, 4, 5, 6), 'of 5 dimensions')):
        with pytest.raises(ValueError, match=re.escape(
                f'CWDLoss, level 0: student {shape} is {said}, and CWDLoss needs maps (N, C, H, W)')):
            loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match='rows of proposals are needed'):
        build(dict(type='ChenClassLoss'))(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
