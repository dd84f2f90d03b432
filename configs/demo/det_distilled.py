# The plain student of the detection demo plus one hook entry; nothing else differs.
_base_ = './det_student.py'

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/det_teacher.py',
    teacher_ckpt='work_dirs/demo/detection/teacher_seed0/epoch_8.pth',
    inherit=('bbox_head',),
    losses=dict(
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0),
        loss_kd=dict(type='SigmoidKDLoss', at='bbox_head.gfl_cls', reduction='teacher_score', loss_weight=1.0)))]
