# Masks that both heads make at the student's positive priors, and class scores. Card: README.md in this folder.
_base_ = 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py'

custom_hooks = [
    # A list replaces the list of the base: without this line its EMA and its pipeline switch would be lost.
    *_base_.custom_hooks,
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::rtmdet/rtmdet-ins_m_8xb32-300e_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet-ins_m_8xb32-300e_coco/rtmdet-ins_m_8xb32-300e_coco_20221123_001039-6eba602e.pth',  # noqa: E501
        losses=dict(
            loss_kd_mask=dict(type='SigmoidKDLoss', at='@instance_masks', loss_weight=5.0),
            loss_kd_cls=dict(type='SigmoidKDLoss', at='@logits', reduction='teacher_score', loss_weight=0.02)))
]
