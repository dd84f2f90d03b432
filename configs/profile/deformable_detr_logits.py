# Queries matched one to one: Deformable DETR R18 at a quarter of the width from R50.
#   python tools/measure.py configs/profile/deformable_detr_logits.py --batch 2 --shape 256 320
_base_ = './deformable_detr_logits_teacher.py'

model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16),
    neck=dict(in_channels=[32, 64, 128]))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/deformable_detr_logits_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_kd=dict(type='DETRDistillLogitsLoss', at='bbox_head')))]
