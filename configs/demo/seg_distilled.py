# The plain student of the segmentation demo plus one hook entry; nothing else differs.
_base_ = './seg_student.py'

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/seg_teacher.py',
    teacher_ckpt='work_dirs/demo/segmentation/teacher_seed0/iter_480.pth',
    losses=dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', tau=2.0, loss_weight=1.0),
        loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=3.0)))]
