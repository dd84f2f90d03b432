# Class scores and masks of the proposals of the student, and of stuff in each pixel. Card: README.md in this folder.
_base_ = 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::panoptic_fpn/panoptic-fpn_r101_fpn_1x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/panoptic_fpn/panoptic_fpn_r101_fpn_1x_coco/panoptic_fpn_r101_fpn_1x_coco_20210820_193950-ab9157a2.pth',  # noqa: E501
        losses=dict(
            loss_kd_cls=dict(type='SoftmaxKDLoss', at='@roi_logits'),
            loss_kd_mask=dict(type='SigmoidKDLoss', at='@roi_masks'),
            loss_kd_stuff=dict(type='SoftmaxKDLoss', at='semantic_head.conv_logits', loss_weight=0.5)))
]
