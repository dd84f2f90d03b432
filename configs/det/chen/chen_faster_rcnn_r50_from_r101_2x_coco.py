# Soft classes, bounded boxes and a hint, in both stages. Card: README.md in this folder.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',  # noqa: E501
        losses=dict(
            loss_chen_cls=dict(type='ChenClassLoss', at='@roi_logits'),
            loss_chen_reg=dict(type='ChenBoxLoss', at='@roi_boxes'),
            loss_chen_rpn_cls=dict(type='ChenClassLoss', at='@rpn_logits'),
            loss_chen_rpn_reg=dict(type='ChenBoxLoss', at='@rpn_boxes'),
            loss_chen_hint=dict(
                type='FitNetLoss',
                at='backbone',
                levels=[3],
                adapter=dict(type='ConvAdapter', always=True),
                loss_weight=0.5)))
]
