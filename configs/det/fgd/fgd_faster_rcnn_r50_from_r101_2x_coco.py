# FGD, two-stage weights: a twentieth of the one-stage ones. Card: README.md in this folder.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',  # noqa: E501
        losses=dict(
            loss_fgd=dict(
                type='FGDLoss',
                at='neck',
                # P2 to P5: P6 is a subsampled P5 and would count its cells twice.
                levels=[0, 1, 2, 3],
                tau=0.5,
                alpha=5e-5,
                beta=2.5e-5,
                gamma=5e-5,
                lambda_=5e-7)))
]

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
