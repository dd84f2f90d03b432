# The plain student on CamVid plus one hook entry; nothing else differs.
_base_ = './camvid_student.py'

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/camvid_teacher.py',
    teacher_ckpt='work_dirs/camvid/camvid/teacher_seed0/iter_600.pth',
    losses=dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', tau=2.0, loss_weight=1.0),
        loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=3.0)))]
