"""Configs of MMYOLO, narrowed by overrides: the real models, loaders, hooks and schedules."""

from typing import Any, Dict

from mmengine.config import Config
from stock import finish

from kd_mm.hosts.zoo import zoo_config

#: Family -> its smallest stock config.
CONFIGS = {
    'yolov5': 'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov6': 'yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov6_m': 'yolov6/yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py',  # with distributions
    'yolov7': 'yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'yolov8': 'yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    'yolox': 'yolox/yolox_nano_fast_8xb8-300e_coco.py',
    'ppyoloe': 'ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    'rtmdet': 'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
}
#: Of a family that is there already, for what only this one has: re-parametrised blocks.
MORE = {'yolov7_l': 'yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py'}
CLASSES = 2
#: Of pictures: the coarsest level needs 9 cells for the first assigner of YOLOv6 and PPYOLOE.
SIZE = (96, 96)


def yolo_config(family: str, width: float = 0.125) -> Config:
    """The stock config with two classes, a fraction of its width and the least depth."""
    cfg = Config.fromfile(str(zoo_config('mmyolo::' + {**CONFIGS, **MORE}[family])))
    model = cfg.model
    model.backbone.pop('init_cfg', None)
    for part in (model.backbone, model.neck, model.bbox_head.head_module):
        if 'widen_factor' in part:
            part.widen_factor = width
        if 'deepen_factor' in part:
            part.deepen_factor = 0.1
    head = model.bbox_head.head_module
    head.num_classes = CLASSES
    for name in ('assigner', 'initial_assigner'):
        if 'num_classes' in (model.get('train_cfg') or {}).get(name, {}):
            model.train_cfg[name].num_classes = CLASSES
    for augment in model.data_preprocessor.get('batch_augments') or ():
        augment.update(random_size_range=(96, 128), size_divisor=32, interval=1)
    return cfg


def as_teacher(cfg: Config) -> Dict[str, Any]:
    """The model of a config, as the config of a teacher."""
    return dict(model=cfg.model.to_dict(), default_scope='mmyolo')


def trainable(cfg: Config, root: Any, work_dir: Any, steps: int = 2, **extra: Any) -> Config:
    """The config on the COCO files of the tests: its loader's collate function, its constructor, no evaluation."""
    loader, wrapper = cfg.train_dataloader, cfg.optim_wrapper.to_dict()
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                dict(type='LetterResize', scale=SIZE, allow_scale_up=True, pad_val=dict(img=114.0)),
                dict(type='mmdet.PackDetInputs')]
    cfg.train_dataloader = dict(
        batch_size=4, num_workers=0, persistent_workers=False, collate_fn=loader.collate_fn,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='YOLOv5CocoDataset', data_root=str(root), ann_file='annotations.json',
                     data_prefix=dict(img='images/'), metainfo=dict(classes=('square', 'disc')), pipeline=pipeline,
                     filter_cfg=None))
    cfg = finish(cfg, work_dir, steps, True)
    cfg.optim_wrapper = wrapper
    cfg.merge_from_dict(extra)
    return cfg
