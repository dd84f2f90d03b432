# FRS, feature and class terms. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_frs=dict(
                type='FRSLoss',
                at='neck',
                adapter=dict(type='ConvAdapter', kernel_size=3, always=True),
                region=dict(type='TeacherScoreRegion', logits_at='bbox_head.retina_cls'),
                loss_weight=dict(type='LinearWarmup', steps=500, start=1e-5, value=0.005)),
            loss_frs_class=dict(
                type='SigmoidKDLoss',
                at='bbox_head.retina_cls',
                divergence='cross_entropy',
                reduction='teacher_score',
                loss_weight=dict(type='LinearWarmup', steps=500, start=4e-5, value=0.02))))
]
