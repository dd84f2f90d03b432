"""The models of ``tools/studies/instance.py``: stock configs of mmdet, narrowed, on instances and segments of CamVid.

Every config starts from one that the host ships; widths, depths, classes, data and schedule are replaced.  A teacher is
the same with a backbone three times as wide, trained longer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

from instance_data import STUFF, THINGS
from mmengine.config import Config

from kd_mm.hosts.zoo import zoo_config

SIZE = (160, 120)  # width, height: a third of the resolution
NECK = 48
CLASSES = tuple(THINGS.values())
SEGMENTS = (*CLASSES, *STUFF.values())
GROUPS = dict(type='GN', num_groups=8, requires_grad=True)

#: A config's model, narrowed to the width of the first stage.
Narrow = Callable[[int], Dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One kind of model: its student and its teacher.

    Attributes:
        title: for the table.
        config: of mmdet.
        narrow: overrides of the model.
        epochs: of the student; the teacher has :data:`LONGER` more.
        lr: of AdamW.
        metric: the score.
        losses: by method: what the students learn.
        panoptic: whether the data has stuff.
    """

    title: str
    config: str
    narrow: Narrow
    epochs: int
    lr: float
    metric: str
    losses: Dict[str, Dict[str, Dict[str, Any]]]
    panoptic: bool = False


def resnet(base: int) -> Dict[str, Any]:
    return dict(depth=18, base_channels=base, stem_channels=base, frozen_stages=-1, norm_eval=False, init_cfg=None,
                norm_cfg=dict(type='BN', requires_grad=True))


def widths(base: int) -> list:
    return [base * 2**stage for stage in range(4)]


def mask_rcnn(base: int) -> Dict[str, Any]:
    return dict(
        backbone=resnet(base),
        neck=dict(in_channels=widths(base), out_channels=NECK, num_outs=4),
        rpn_head=dict(in_channels=NECK, feat_channels=NECK,
                      anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=NECK, featmap_strides=[4, 8, 16], finest_scale=14),
            bbox_head=dict(in_channels=NECK, fc_out_channels=128, num_classes=len(CLASSES)),
            mask_roi_extractor=dict(out_channels=NECK, featmap_strides=[4, 8, 16], finest_scale=14),
            mask_head=dict(in_channels=NECK, conv_out_channels=NECK, num_convs=2, num_classes=len(CLASSES))),
        train_cfg=dict(rpn_proposal=dict(nms_pre=300, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
        test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=50), rcnn=dict(max_per_img=50)))


def rtmdet_ins(base: int) -> Dict[str, Any]:
    norm = dict(type='BN')
    return dict(
        # Its first stage has 64 channels at full width.
        data_preprocessor=dict(pad_size_divisor=32, pad_mask=True),
        backbone=dict(deepen_factor=0.167, widen_factor=base / 64, init_cfg=None, norm_cfg=norm),
        neck=dict(in_channels=widths(4 * base)[:3], out_channels=NECK, num_csp_blocks=1, norm_cfg=norm),
        bbox_head=dict(in_channels=NECK, feat_channels=NECK, stacked_convs=1, num_classes=len(CLASSES),
                       norm_cfg=dict(type='BN', requires_grad=True)),
        test_cfg=dict(max_per_img=50))


def solov2(base: int) -> Dict[str, Any]:
    return dict(
        backbone=resnet(base),
        neck=dict(in_channels=widths(base), out_channels=NECK),
        mask_head=dict(
            num_classes=len(CLASSES), in_channels=NECK, feat_channels=NECK, stacked_convs=2, norm_cfg=GROUPS,
            scale_ranges=((1, 24), (12, 48), (24, 96), (48, 192), (96, 512)), num_grids=[24, 20, 16, 12, 8],
            mask_feature_head=dict(feat_channels=NECK, out_channels=NECK, norm_cfg=GROUPS)),
        test_cfg=dict(max_per_img=50))


def mask2former(base: int, panoptic: bool = False) -> Dict[str, Any]:
    things, stuff, feed = len(CLASSES), len(STUFF) if panoptic else 0, 2 * NECK
    attention = dict(embed_dims=NECK, num_heads=4)
    counts = dict(num_things_classes=things, num_stuff_classes=stuff)
    return dict(
        data_preprocessor=dict(batch_augments=None),
        backbone=resnet(base),
        panoptic_head=dict(
            in_channels=widths(base), feat_channels=NECK, out_channels=NECK, num_queries=30, **counts,
            pixel_decoder=dict(
                norm_cfg=GROUPS, encoder=dict(num_layers=1, layer_cfg=dict(
                    self_attn_cfg=dict(attention), ffn_cfg=dict(embed_dims=NECK, feedforward_channels=feed))),
                positional_encoding=dict(num_feats=NECK // 2)),
            positional_encoding=dict(num_feats=NECK // 2),
            transformer_decoder=dict(num_layers=2, layer_cfg=dict(
                self_attn_cfg=dict(attention), cross_attn_cfg=dict(attention),
                ffn_cfg=dict(embed_dims=NECK, feedforward_channels=feed))),
            loss_cls=dict(class_weight=[1.0] * (things + stuff) + [0.1])),
        panoptic_fusion_head=counts,
        train_cfg=dict(num_points=1024),
        test_cfg=dict(max_per_image=30))


SEGM, PQ = 'coco/segm_mAP', 'coco_panoptic/PQ'
NECK_LOSS = dict(type='PKDLoss', at='@neck', loss_weight=5.0)


def methods(masks: Dict[str, Any]) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """What is compared: the masks alone, the features alone, both."""
    return dict(masks=dict(loss_masks=masks), features=dict(loss_features=NECK_LOSS),
                both=dict(loss_masks=masks, loss_features=NECK_LOSS))


QUERIES = dict(type='MaskQueryLoss', at='panoptic_head', points=1024)
KERNELS = dict(type='SigmoidKDLoss', at='@instance_masks', loss_weight=5.0)
PAIRS: Dict[str, Pair] = {
    'mask_rcnn': Pair(
        'Mask R-CNN R18', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', mask_rcnn, 4, 0.002, SEGM,
        methods(dict(type='SigmoidKDLoss', at='@roi_masks'))),
    'rtmdet_ins': Pair(
        'RTMDet-Ins', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', rtmdet_ins, 4, 0.002, SEGM, methods(KERNELS)),
    'solov2': Pair(
        'SOLOv2 R18', 'solov2/solov2-light_r18_fpn_ms-3x_coco.py', solov2, 4, 0.001, SEGM, methods(KERNELS)),
    'mask2former': Pair(
        'Mask2Former R18, instances', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', mask2former, 4, 0.001, SEGM,
        methods(QUERIES)),
    'mask2former_panoptic': Pair(
        'Mask2Former R18, panoptic', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
        lambda base: mask2former(base, panoptic=True), 4, 0.001, PQ, methods(QUERIES), panoptic=True),
}
#: Width of the first stage of students and teachers.
BASE, WIDE = 8, 24
#: Epochs that a teacher is trained longer.
LONGER = 2
BATCH = 4


def data_of(panoptic: bool, root: str, size: Tuple[int, int] = SIZE) -> Dict[str, Any]:
    """Data sets, pipelines and evaluators on what ``instance_data.py`` writes."""
    load: Dict[str, Any] = dict(type='LoadPanopticAnnotations') if panoptic else dict(
        type='LoadAnnotations', with_bbox=True, with_mask=True)
    meta = dict(classes=SEGMENTS, thing_classes=CLASSES, stuff_classes=tuple(STUFF.values())) if panoptic else dict(
        classes=CLASSES)
    train = [dict(type='LoadImageFromFile'), load, dict(type='Resize', scale=size, keep_ratio=True),
             dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', *(['segments_info'] if panoptic else []))
    test = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=size, keep_ratio=True), load,
            dict(type='PackDetInputs', meta_keys=keys)]
    kind = 'panoptic' if panoptic else 'instances'

    def loader(split: str, pipeline: list, **options: Any) -> Dict[str, Any]:
        prefix = dict(img=f'{split}/', **(dict(seg=f'panoptic_{split}/') if panoptic else {}))
        dataset = dict(type='CocoPanopticDataset' if panoptic else 'CocoDataset', data_root=root, metainfo=meta,
                       ann_file=f'annotations/{kind}_{split}.json', data_prefix=prefix, pipeline=pipeline)
        # The pictures are small: a worker costs more than it brings.
        return dict(batch_size=BATCH, num_workers=0, dataset=dict(dataset, **options))

    evaluator: Dict[str, Any] = dict(
        type='CocoMetric', ann_file=f'{root}annotations/instances_val.json', metric=['bbox', 'segm'])
    if panoptic:
        evaluator = dict(type='CocoPanopticMetric', ann_file=f'{root}annotations/panoptic_val.json',
                         seg_prefix=f'{root}panoptic_val/', nproc=1)
    val = dict(loader('val', test, test_mode=True), drop_last=False,
               sampler=dict(type='DefaultSampler', shuffle=False))
    return dict(
        data_root=root,
        train_dataloader=dict(loader('train', train, filter_cfg=dict(filter_empty_gt=True)),
                              sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=val, test_dataloader=val, val_evaluator=evaluator, test_evaluator=evaluator)


def schedule(epochs: int, images: int, lr: float) -> Dict[str, Any]:
    iters = epochs * -(-images // BATCH)
    warm = min(50, iters // 2)
    return dict(
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=epochs),
        val_cfg=dict(type='ValLoop'), test_cfg=dict(type='TestLoop'),
        param_scheduler=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm),
                         dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=warm, end=iters)],
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05),
                           clip_grad=dict(max_norm=10, norm_type=2)),
        default_hooks=dict(
            timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=20),
            param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook'),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)),
        log_processor=dict(type='LogProcessor', window_size=20, by_epoch=True),
        custom_hooks=[], auto_scale_lr=None)


def model_of(name: str, base: int) -> Config:
    """The stock config of a pair, its model narrowed."""
    cfg = Config.fromfile(str(zoo_config(f'mmdet::{PAIRS[name].config}')))
    cfg.merge_from_dict(dict(model=PAIRS[name].narrow(base)))
    return cfg


def config_of(name: str, teacher: bool, root: str, images: int) -> Config:
    """The whole config of a student or a teacher.

    Args:
        name: of :data:`PAIRS`.
        teacher: whether it is the teacher's.
        root: folder with the data, with a slash at its end.
        images: of the training set, for the length of the schedule.
    """
    pair, cfg = PAIRS[name], model_of(name, WIDE if teacher else BASE)
    epochs = pair.epochs + (LONGER if teacher else 0)
    content = dict(model=cfg.model.to_dict(), default_scope='mmdet', env_cfg=cfg.env_cfg.to_dict(),
                   vis_backends=[dict(type='LocalVisBackend')],
                   visualizer=dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')],
                                   name='visualizer'),
                   log_level='INFO', load_from=None, resume=False,
                   **data_of(pair.panoptic, root), **schedule(epochs, images, pair.lr))
    return Config(content)


def write(name: str, folder: Path, root: str, images: int) -> Tuple[Path, Path]:
    """The files of student and teacher; they change only where their content does."""
    files = []
    for side in ('student', 'teacher'):
        path = folder / f'instance_{name}_{side}.py'
        text = config_of(name, side == 'teacher', root, images).pretty_text
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        files.append(path)
    return files[0], files[1]
