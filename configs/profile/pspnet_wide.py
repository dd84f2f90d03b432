# The memory of a step whose teacher is larger than the student: PSPNet, CWD on the logits.
#   python tools/measure.py configs/profile/pspnet_wide.py --batch 4 --shape 192 256
_base_ = './pspnet_cwd.py'

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/pspnet_wide_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0)))]
