# FBKD on P2 to P5. Card: README.md in this folder.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',  # noqa: E501
        losses=dict(
            loss_fbkd=dict(
                type='FBKDLoss',
                at='neck',
                levels=[0, 1, 2, 3],
                feature=7e-5,
                channel=4e-3,
                spatial=4e-3,
                nonlocal_=7e-5,
                tau=0.5,
                # mmrazor pools by 2 and then by 8, 4, 2, 2.
                pool=[16, 8, 4, 4])))
]
