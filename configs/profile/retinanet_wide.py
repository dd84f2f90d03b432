# The memory of a step whose teacher is larger than the student: RetinaNet, CWD on the five levels of the neck.
# Student R18 at a quarter of the width, teacher R50 of full width, three classes:
#   python tools/measure.py configs/profile/retinanet_wide.py --batch 8 --shape 256 320
_base_ = './retinanet_cwd.py'

model = dict(bbox_head=dict(num_classes=3))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/retinanet_wide_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0)))]
