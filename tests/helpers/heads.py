"""Every kind of dense head of mmdet, as its stock config builds it, narrowed; and one recorded training step of it."""

import copy
from typing import Any, Dict

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from stock import widths

from kd_mm.hosts.heads.assigned import assignment_taps
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config
from kd_mm.ops.modes import preserved_random_state

NECK, CLASSES, SHAPE = 32, 3, (128, 160)
SMALL = dict(num_classes=CLASSES, in_channels=NECK, feat_channels=NECK)
CONFIGS = dict(
    retinanet='retinanet/retinanet_r50_fpn_1x_coco.py',
    fcos='fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    fcos_norm='fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py',
    atss='atss/atss_r50_fpn_1x_coco.py',
    gfl='gfl/gfl_r50_fpn_1x_coco.py',
    paa='paa/paa_r50_fpn_1x_coco.py',
    tood='tood/tood_r50_fpn_1x_coco.py',
    rtmdet='rtmdet/rtmdet_s_8xb32-300e_coco.py',
    yolox='yolox/yolox_tiny_8xb8-300e_coco.py',
    vfnet='vfnet/vfnet_r50_fpn_1x_coco.py',
    ddod='ddod/ddod_r50_fpn_1x_coco.py',
    fsaf='fsaf/fsaf_r50_fpn_1x_coco.py',
    fovea='foveabox/fovea_r50_fpn_4xb4-1x_coco.py',
    autoassign='autoassign/autoassign_r50-caffe_fpn_1x_coco.py',
    yolof='yolof/yolof_r50-c5_8xb8-1x_coco.py')


def head_config(name: str, base: int = 8) -> Config:
    """The stock config of a head with a narrow backbone, neck and head."""
    cfg = Config.fromfile(str(zoo_config(f'mmdet::{CONFIGS[name]}')))
    model: Dict[str, Any]
    if name == 'yolox':
        model = dict(backbone=dict(widen_factor=0.125), bbox_head=dict(SMALL),
                     neck=dict(in_channels=[32, 64, 128], out_channels=NECK, num_csp_blocks=1),
                     data_preprocessor=dict(batch_augments=[]))
    elif name == 'rtmdet':
        model = dict(backbone=dict(widen_factor=0.125, init_cfg=None), bbox_head=dict(SMALL),
                     neck=dict(in_channels=[32, 64, 128], out_channels=NECK, num_csp_blocks=1))
    else:
        width = widths(base, 18)
        model = dict(backbone=dict(depth=18, base_channels=base, stem_channels=base, init_cfg=None, frozen_stages=-1),
                     neck=dict(in_channels=width, out_channels=NECK), bbox_head=dict(SMALL))
        if name == 'yolof':
            model['neck'] = dict(in_channels=width[-1], out_channels=NECK, block_mid_channels=8)
            model['bbox_head'] = dict(num_classes=CLASSES, in_channels=NECK)
    if name == 'ddod':
        model['bbox_head']['use_dcn'] = False  # it takes no map smaller than its kernel
    cfg.merge_from_dict(dict(model=model))
    cfg.custom_hooks = None
    return cfg


def build_head(name: str, seed: int = 0) -> Any:
    """The detector of :func:`head_config` in training mode, its class scores spread out by random weights."""
    with preserved_random_state(seed), DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(head_config(name), 'mmdet')
        for module in model.bbox_head.modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight.requires_grad:
                torch.nn.init.normal_(module.weight, std=0.1)
        if name == 'yolox':  # it takes raw grey levels
            model.backbone.stem.conv.conv.weight.data /= 255
    return model.train()


def batch_of(model: Any, shape=SHAPE, seed: int = 0) -> Dict[str, Any]:
    return model.data_preprocessor(synthetic_batch(model, 2, shape, seed=seed), True)


def recorded_step(model: Any, data: Any, extra=()) -> Any:
    """One training forward: the host's losses, and what was recorded at the head, its assignment and ``extra``."""
    MessageHub.get_current_instance().update_info('epoch', 0)  # TOOD asks for it; a Runner says it
    head = model.bbox_head
    taps = {name: Tap(head, name, structured=True) for name in (*assignment_taps(head), *extra)}
    taps[''] = Tap(model, 'bbox_head', structured=True)
    for tap in taps.values():
        tap.arm()
    try:
        losses = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        return losses, {name: tap.read() for name, tap in taps.items()}
    finally:
        for tap in taps.values():
            tap.clear()
