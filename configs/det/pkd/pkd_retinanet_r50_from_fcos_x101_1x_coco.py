# PKD across detectors: an anchor-free teacher, an anchor-based student. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::fcos/fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/fcos/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8.pth',  # noqa: E501
        # Both necks give P3 to P7, strides 8 to 128, so equal indices are equal strides. P7 is left out as published.
        losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', levels=[0, 1, 2, 3], loss_weight=10.0)))
]
