# DeFeat, neck term and class term. Card: README.md in this folder.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',  # noqa: E501
        losses=dict(
            loss_defeat=dict(
                type='DeFeatLoss',
                at='neck',
                adapter=dict(type='ConvAdapter', kernel_size=3, always=True),
                fg=3.0,
                bg=12.0,
                foreground=dict(type='LevelBoxRegion', strides=[4, 8, 16, 32, 64])),
            loss_defeat_cls=dict(type='DeFeatClassLoss', at='@roi_logits', proposals='teacher', fg=2.0, bg=2.0)))
]
