# DETRDistill, its three parts, from a Deformable DETR with iterative boxes. Card: README.md in this folder.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco/deformable-detr-refine_r50_16xb2-50e_coco_20221022_225303-844e0f93.pth',  # noqa: E501
        losses=dict(
            loss_logits=dict(type='DETRDistillLogitsLoss', at='bbox_head'),
            loss_memory=dict(type='DETRDistillFeatureLoss', at='bbox_head'),
            loss_prior=dict(type='DETRDistillQueryPriorLoss', at='bbox_head')))
]
