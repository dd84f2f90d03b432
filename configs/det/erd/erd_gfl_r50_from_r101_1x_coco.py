# ERD between two GFLs of the same classes; for a student that knows more, see the card. Card: README.md in this folder.
_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',  # noqa: E501
        losses=dict(loss_erd=dict(type='ERDLoss', at='bbox_head', loss_weight=1.0)))
]
