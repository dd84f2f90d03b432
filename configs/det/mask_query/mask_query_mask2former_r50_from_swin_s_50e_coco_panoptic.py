# Matched queries of two Mask2Formers, panoptic segmentation. Card: README.md in this folder.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic_20220329_225200-4a16ded7.pth',  # noqa: E501
        losses=dict(loss_queries=dict(type='MaskQueryLoss', at='panoptic_head')))
]
