# A teacher at twice the student's resolution: its stride 16 teaches the student's stride 8.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        view=dict(scale=2.0),
        losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=6.0)))
]
