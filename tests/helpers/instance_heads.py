"""Stock instance and panoptic segmentors, narrowed, and drawn scenes whose label maps become objects and segments."""

import copy
import sys
from pathlib import Path
from typing import Any, Dict

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import TOOLS, finish

from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.ops.modes import preserved_random_state

sys.path.insert(0, str(TOOLS / 'studies'))

import instance_data  # noqa: E402
import instance_models  # noqa: E402

CAR, PERSON, RIDER, ROAD, SKY, IGNORE = 13, 11, 12, 0, 10, 255
KINDS = ('rtmdet_ins', 'condinst', 'solov2')
SIZE = (96, 64)  # width, height


def draw_scenes(root: Path, images: int = 4, seed: int = 0) -> Path:
    """Scenes in Cityscapes layout: round and oblong objects on a road below a sky; the last image has none."""
    draw = np.random.default_rng(seed)
    width, height = SIZE
    for split in ('train', 'val'):
        for kind in ('leftImg8bit', 'gtFine'):
            (root / kind / split / 'town').mkdir(parents=True, exist_ok=True)
        for index in range(images):
            labels = np.full((height, width), ROAD, np.uint8)
            labels[:16] = SKY
            labels[16:18] = IGNORE
            for number in range(0 if index == images - 1 else 3):
                x = 16 + 32 * number + int(draw.integers(-4, 5))
                axes = (int(draw.integers(7, 11)), int(draw.integers(8, 14)))
                cv2.ellipse(labels, (x, 40), axes, 0, 0, 360, [CAR, PERSON, RIDER][number], -1)
            picture = (labels[..., None] * np.array([15, 11, 5]) + draw.integers(0, 40, (height, width, 3))) % 256
            picture = picture.astype(np.uint8)
            stem = f'town_{index:06d}_000019'
            cv2.imwrite(str(root / 'leftImg8bit' / split / 'town' / f'{stem}_leftImg8bit.png'), picture)
            cv2.imwrite(str(root / 'gtFine' / split / 'town' / f'{stem}_gtFine_labelTrainIds.png'), labels)
    return root


def make_instances(folder: Path) -> Path:
    """The scenes as objects and segments, by the command of the study."""
    instance_data.make(draw_scenes(folder / 'scenes'), folder / 'instances', least=40)
    return folder / 'instances'


def condinst(base: int) -> Dict[str, Any]:
    neck = instance_models.NECK
    return dict(
        backbone=instance_models.resnet(base),
        neck=dict(in_channels=instance_models.widths(base), out_channels=neck),
        bbox_head=dict(num_classes=len(instance_models.CLASSES), in_channels=neck, feat_channels=neck, stacked_convs=1,
                       norm_cfg=instance_models.GROUPS),
        mask_head=dict(mask_feature_head=dict(in_channels=neck, feat_channels=16, num_stacked_convs=1)))


def model_config(name: str, base: int = 8, **model: Any) -> Config:
    """The stock config of a kind, narrowed."""
    if name == 'condinst':
        cfg = Config.fromfile(str(instance_models.zoo_config(
            'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py')))
        cfg.merge_from_dict(dict(model=condinst(base)))
    elif name == 'panoptic_fpn':
        cfg = Config.fromfile(str(instance_models.zoo_config('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py')))
        narrow = instance_models.mask_rcnn(base)
        counts = dict(num_things_classes=len(instance_models.CLASSES), num_stuff_classes=len(instance_models.STUFF))
        narrow['semantic_head'] = dict(counts, in_channels=instance_models.NECK, inner_channels=16, end_level=4,
                                       norm_cfg=instance_models.GROUPS)
        narrow['panoptic_fusion_head'] = counts
        cfg.merge_from_dict(dict(model=narrow))
    else:
        cfg = instance_models.model_of(name, base)
    cfg.merge_from_dict(dict(model=model))
    return cfg


def build(name: str, seed: int = 0, base: int = 8, **model: Any) -> Any:
    """The segmentor in training mode; kernels, scores and mask features spread out by random weights."""
    with preserved_random_state(seed), DefaultScope.overwrite_default_scope('mmdet'):
        built = build_model(model_config(name, base, **model), 'mmdet')
        built.init_weights()
        for path, module in built.named_modules():
            if isinstance(module, torch.nn.Conv2d) and path.startswith(('bbox_head', 'mask_head')):
                torch.nn.init.normal_(module.weight, std=2 * module.weight[0].numel()**-0.5)
    return built.train()


def batch_of(model: Any, seed: int = 0, shape: Any = (64, 96)) -> Dict[str, Any]:
    return model.data_preprocessor(synthetic_batch(model, 2, shape, seed=seed), True)


def runner_config(name: str, data: Path, work_dir: Path, steps: int = 2, base: int = 8) -> Config:
    """A config for a Runner on the drawn scenes."""
    panoptic = 'panoptic' in name
    cfg = Config(dict(model=copy.deepcopy(model_config(name, base).model.to_dict()), default_scope='mmdet',
                      vis_backends=[], visualizer=dict(type='Visualizer', vis_backends=[], name='none'),
                      env_cfg=dict(), **instance_models.data_of(panoptic, f'{data}/', SIZE)))
    cfg.train_dataloader.batch_size = 2
    return finish(cfg, work_dir, steps, False)
