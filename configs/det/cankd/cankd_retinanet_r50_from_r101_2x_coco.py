# CanKD: the FPN of the student asks that of the teacher. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        # P3 to P6, as published.
        losses=dict(loss_cankd=dict(type='CanKDLoss', at='neck', levels=[0, 1, 2, 3], loss_weight=10.0)))
]
