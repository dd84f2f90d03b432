# FreeKD and its hint on the neck; the tokens come from tools/learn_tokens.py. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_freekd=dict(
                type='FreeKDLoss',
                at='neck',
                tokens='work_dirs/learned/freekd_retinanet-r101_coco.pth',
                depth=3,
                num_tokens=4,
                loss_weight=1.0),
            loss_hint=dict(type='FitNetLoss', at='neck', loss_weight=5.0)))
]
