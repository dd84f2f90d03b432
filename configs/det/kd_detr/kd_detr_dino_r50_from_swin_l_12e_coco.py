# KD-DETR: both decoders start from the same points. Card: README.md in this folder.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth',  # noqa: E501
        losses=dict(loss_points=dict(type='KDDETRLoss', at='bbox_head')))
]
