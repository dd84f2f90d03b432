"""Stock two-stage detectors, narrowed by overrides: Faster, Mask and Cascade R-CNN, and what is recorded of a step."""

import copy
from typing import Any, Callable, Dict

import torch
from mmengine.config import Config
from stock import coco_data, finish, merge, widths

from kd_mm.hosts.heads.proposals import proposal_taps
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config
from kd_mm.ops.modes import preserved_random_state

CONFIGS = dict(
    faster='faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    mask='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    cascade='cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py')
SHAPE = (128, 160)


def two_stage_config(kind: str, width: int = 16, classes: int = 3, base: int = 8) -> Config:
    """The stock config with a narrow backbone, neck and heads; few proposals."""
    cfg = Config.fromfile(str(zoo_config(f'mmdet::{CONFIGS[kind]}')))
    roi = cfg.model.roi_head
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(depth=18, base_channels=base, stem_channels=base, init_cfg=None, frozen_stages=-1),
        neck=dict(in_channels=widths(base, 18), out_channels=width),
        rpn_head=dict(in_channels=width, feat_channels=width),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=width)),
        train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=40)),
        test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=40)))))
    small = dict(in_channels=width, fc_out_channels=2 * width, num_classes=classes)
    for head in roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]:
        head.update(small)
    for stage in cfg.model.train_cfg.rcnn if isinstance(cfg.model.train_cfg.rcnn, list) else [cfg.model.train_cfg.rcnn]:
        stage.sampler.num = 32
    if 'mask_head' in roi:
        roi.mask_roi_extractor.out_channels = width
        roi.mask_head.update(in_channels=width, conv_out_channels=width, num_classes=classes, num_convs=1)
    cfg.custom_hooks = None
    return cfg


def two_stage(root: Any, work_dir: Any, kind: str = 'faster', steps: int = 2, **options: Any) -> Config:
    """The same on the test's COCO data, for a Runner."""
    cfg = two_stage_config(kind, classes=2, **options)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.batch_sampler = None
    data = coco_data(root, batch=2)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for step in data[loader]['dataset']['pipeline']:
            if step['type'] == 'LoadAnnotations':
                step['with_mask'] = kind in ('mask', 'cascade')
    return finish(merge(cfg, data), work_dir, steps, False)


def build_two_stage(kind: str, seed: int = 0, **options: Any) -> Any:
    """The detector in training mode, its predictors spread out by random weights."""
    with preserved_random_state(seed):
        model = build_model(two_stage_config(kind, **options), 'mmdet')
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and 'backbone' not in name:
                torch.nn.init.normal_(module.weight, std=0.3 if 'fc_cls' in name else 0.05)
    return model.train()


def kept_two_stage() -> Callable[..., Any]:
    """:func:`build_two_stage` that builds every detector once."""
    built: Dict[Any, Any] = {}

    def get(kind, seed=0, **options):
        key = (kind, seed, *sorted(options.items()))
        if key not in built:
            built[key] = build_two_stage(kind, seed, **options)
        return built[key]

    return get


def batch_of(model: Any, seed: int = 0) -> Dict[str, Any]:
    return model.data_preprocessor(synthetic_batch(model, 2, SHAPE, seed=seed), True)


def recorded(model: Any, side: str, place: str, data: Any, proposals: str = 'student') -> Any:
    """The losses of a training forward (side 'student') or a raw forward, and the records for a place."""
    taps = [Tap(model, path, side, structured=True) for path in proposal_taps(place, side, model, proposals)]
    for tap in taps:
        tap.arm()
    try:
        if side == 'student':
            output = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        else:
            with torch.no_grad():
                output = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='tensor')
        return output, {tap.path: tap.read() for tap in taps}
    finally:
        for tap in taps:
            tap.clear()
