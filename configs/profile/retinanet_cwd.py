# Cheap models for tools/measure.py, so that the engine's own cost shows: RetinaNet, CWD on the five levels of the neck.
# Student R18 and teacher R50, both at a quarter of the width; measured with 8 images, 320 wide and 256 high:
#   python tools/measure.py configs/profile/retinanet_cwd.py --batch 8 --shape 256 320
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

model = dict(
    backbone=dict(base_channels=16, stem_channels=16, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/retinanet_cwd_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0)))]
