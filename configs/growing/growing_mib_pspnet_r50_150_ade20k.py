# MiB: 100 classes of ADE20K are known, 50 are learned from their labels alone. Card: README.md in this folder.
_base_ = './growing_pspnet_r50_150_ade20k.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='{{ fileDirname }}/growing_pspnet_r50_100_ade20k.py',
        teacher_ckpt='work_dirs/growing_pspnet_r50_100_ade20k/iter_80000.pth',
        inherit=dict(backbone='copy', decode_head='grow_from_background', auxiliary_head='grow'),
        # The cross-entropy of the method takes the place of the student's own.
        task_loss_weight=0.0,
        losses=dict(
            loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg', loss_weight=1.0),
            loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg', loss_weight=10.0)))
]
