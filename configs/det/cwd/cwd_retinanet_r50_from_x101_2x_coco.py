# CWD on all pyramid levels. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        # The 1x teacher is the better one: 41.0 box AP in the model zoo, the 2x one has 40.8.
        teacher='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth',  # noqa: E501
        losses=dict(loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0)))
]
