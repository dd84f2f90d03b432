# FGFI with the anchors of RetinaNet. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_fgfi=dict(
                type='FGFILoss',
                at='neck',
                # Without the published ReLU: what an FPN returns may be negative.
                adapter=dict(type='ConvAdapter', kernel_size=3, always=True),
                region=dict(type='FineGrainedRegion', strides=[8, 16, 32, 64, 128]),
                # Off for the first 400 iterations, as published.
                loss_weight=dict(type='WindowSchedule', windows=[(400, None)], value=0.01))))
]
