# Rows of proposals that both heads are asked about: Faster R-CNN R18 at a quarter of the width from R50.
#   python tools/measure.py configs/profile/faster_rcnn_roi.py --batch 4 --shape 256 320
_base_ = './faster_rcnn_roi_teacher.py'

model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/faster_rcnn_roi_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_kd=dict(type='SoftmaxKDLoss', at='@roi_logits', tau=1.0)))]
