"""Stock one-stage detectors of other kinds than those of ``heads.py``, narrowed: YOLOv3 and SSD on MobileNetV2."""

from typing import Any

from mmengine.config import Config

from kd_mm.hosts.zoo import zoo_config


def yolov3_config(classes: int = 3) -> Config:
    cfg = Config.fromfile(str(zoo_config('mmdet::yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py')))
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(widen_factor=0.25, init_cfg=None), neck=dict(in_channels=[80, 24, 8], out_channels=[16, 16, 16]),
        bbox_head=dict(num_classes=classes, in_channels=[16, 16, 16], out_channels=[16, 16, 16]))))
    cfg.custom_hooks = None
    return cfg


def ssd_config(classes: int = 3) -> Config:
    cfg = Config.fromfile(str(zoo_config('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py')))
    widths = (24, 1280, 32, 32, 32, 32)
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(widen_factor=0.25), neck=dict(in_channels=(24, 1280), out_channels=widths),
        bbox_head=dict(num_classes=classes, in_channels=widths))))
    cfg.custom_hooks = None
    return cfg


def as_teacher(cfg: Config, names: Any = None) -> Any:
    """The model of a config as a teacher's config; ``names``: its classes, as its data set would say them."""
    found = dict(model=cfg.model.to_dict(), default_scope=cfg.default_scope)
    if names is not None:
        kind = 'CocoDataset' if cfg.default_scope == 'mmdet' else 'CityscapesDataset'
        found['train_dataloader'] = dict(dataset=dict(type=kind, metainfo=dict(classes=tuple(names))))
    return found
