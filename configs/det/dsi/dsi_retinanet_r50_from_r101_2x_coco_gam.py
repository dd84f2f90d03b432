# DSI, whose weight follows the share of the last stage in the gradient (GAM). Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(loss_dsi=dict(
            type='DSILoss', at='backbone', levels=[3], adapter=dict(type='ConvAdapter', always=True),
            # The authors hold the share of a transformer encoder; which share is right for this module is not known.
            loss_weight=dict(type='GradientShareSchedule', module='backbone.layer4', target=11.0, band=1.0, start=5.0,
                             default=20.0))))
]
