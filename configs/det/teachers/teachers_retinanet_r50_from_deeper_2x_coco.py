# Self-distillation: the last stage teaches the one before where to look; there is no second model.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='self',
        # Attention has no channels: the widths of the stages do not matter, and no adapter could cheat.
        losses=dict(loss_at=dict(type='ATLoss', student_at='backbone.layer3', teacher_at='backbone.layer4')))
]
