# Masks that both heads make at the student's positive cells, and class scores. Card: README.md in this folder.
_base_ = 'mmdet::solov2/solov2_r50_fpn_1x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::solov2/solov2_r101-dcn_fpn_ms-3x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/solov2/solov2_r101_dcn_fpn_3x_coco/solov2_r101_dcn_fpn_3x_coco_20220513_214734-16c966cb.pth',  # noqa: E501
        losses=dict(
            loss_kd_mask=dict(type='SigmoidKDLoss', at='@instance_masks', loss_weight=5.0),
            loss_kd_cls=dict(type='SigmoidKDLoss', at='@logits', reduction='teacher_score', loss_weight=0.02)))
]
