"""Configs of MMRotate, narrowed by overrides."""

import copy
from typing import Any

from mmengine.config import Config
from stock import _backbone, finish, widths

from kd_mm.hosts.zoo import zoo_config

CONFIGS = {
    'retinanet': 'rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py',
    'fcos': 'rotated_fcos/rotated-fcos-le90_r50_fpn_kld_1x_dota.py',
    'fcos_csl': 'rotated_fcos/rotated-fcos-hbox-le90_r50_fpn_csl-gaussian_1x_dota.py',
    'retinanet_csl': 'csl/rotated-retinanet-rbox-le90_r50_fpn_csl-gaussian_amp-1x_dota.py',
    'rtmdet': 'rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py',
    'oriented_rcnn': 'oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py',
}
CLASSES = 2


def rotate_config(family: str, base: int = 8) -> Config:
    """The stock config with two classes and a fraction of its width."""
    cfg = Config.fromfile(str(zoo_config(f'mmrotate::{CONFIGS[family]}')))
    model = cfg.model
    if family == 'rtmdet':
        norm = dict(type='BN')
        model.backbone.update(widen_factor=0.125, init_cfg=None, norm_cfg=norm)
        model.neck.update(in_channels=[32, 64, 128], out_channels=32, norm_cfg=norm)
        model.bbox_head.update(in_channels=32, feat_channels=32, num_classes=CLASSES, norm_cfg=norm)
        # mmcv has no rotated IoU loss for a CPU.
        model.bbox_head.loss_bbox = dict(type='GDLoss_v1', loss_type='kld', fun='log1p', tau=1, loss_weight=1.0)
        return cfg
    model.backbone.update(_backbone(base, 18))
    width = 32 if family.startswith('fcos') else 16  # FCOS has norms of 32 groups
    model.neck.update(in_channels=widths(base, 18), out_channels=width)
    if family == 'oriented_rcnn':
        model.rpn_head.update(in_channels=16, feat_channels=16)
        model.roi_head.bbox_roi_extractor.out_channels = 16
        model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=CLASSES)
        for part in (model.train_cfg.rpn_proposal, model.test_cfg.rpn):
            part.update(nms_pre=200, max_per_img=100)
        model.train_cfg.rcnn.sampler.num = 32
        return cfg
    model.bbox_head.update(num_classes=CLASSES, in_channels=width, feat_channels=width, stacked_convs=2)
    return cfg


def as_teacher(cfg: Config) -> Any:
    """The model of a config, as the config of a teacher."""
    return dict(model=copy.deepcopy(cfg.model.to_dict()), default_scope='mmrotate')


def write_dota(root: Any, images: int = 4, extra: bool = False) -> Any:
    """A data set in the layout of DOTA: pictures, and a text file with corners and classes for each.

    Args:
        extra: whether the first picture has a third, difficult object (ignored with ``diff_thr`` below 101), and the
            last one none.
    """
    import cv2
    import numpy as np
    draw = np.random.default_rng(0)
    for folder in ('annfiles', 'images'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(images):
        picture, lines = draw.integers(0, 90, (128, 128, 3)).astype(np.uint8), []
        for kind in range(2):
            centre = draw.integers(40, 88, 2).tolist()
            box = ((centre[0], centre[1]), (48, 20), float(draw.integers(0, 90)))
            corners = cv2.boxPoints(box)
            cv2.fillPoly(picture, [corners.astype(np.int32)], tuple(draw.integers(150, 255, 3).tolist()))
            lines.append(' '.join(f'{value:.1f}' for value in corners.flatten()) + f' {("plane", "ship")[kind]} 0')
        if extra and index == 0:
            lines.append('4.0 4.0 24.0 4.0 24.0 14.0 4.0 14.0 plane 101')
        if extra and index == images - 1:
            lines = []
        cv2.imwrite(str(root / 'images' / f'P{index:04d}.png'), picture)
        (root / 'annfiles' / f'P{index:04d}.txt').write_text(''.join(f'{line}\n' for line in lines))
    return root


def trainable(cfg: Config, root: Any, work_dir: Any, steps: int = 2) -> Config:
    """The config on those files, without evaluation."""
    pipeline = [dict(type='mmdet.LoadImageFromFile'), dict(type='mmdet.LoadAnnotations', with_bbox=True,
                                                           box_type='qbox'),
                dict(type='ConvertBoxType', box_type_mapping=dict(gt_bboxes='rbox')),
                dict(type='mmdet.PackDetInputs')]
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='DOTADataset', data_root=str(root), ann_file='annfiles/', data_prefix=dict(
            img_path='images/'), img_suffix='png', metainfo=dict(classes=('plane', 'ship')), pipeline=pipeline))
    return finish(cfg, work_dir, steps, False)
