# PLOP: 100 classes of ADE20K are known, 50 are learned from their labels alone. Card: README.md in this folder.
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
            # The published weights for ADE20K; six maps as published: stages, the head's feature, logits.
            loss_pod_stages=dict(type='LocalPODLoss', at='backbone', growth=(101, 50), loss_weight=0.001 / 6),
            loss_pod_head=dict(
                type='LocalPODLoss', at='decode_head.bottleneck', growth=(101, 50), loss_weight=0.001 / 6),
            loss_pod_logits=dict(
                type='LocalPODLoss', at='decode_head.conv_seg', growth=(101, 50), loss_weight=0.00001 / 6),
            loss_pseudo=dict(type='PLOPPseudoLabelLoss', at='decode_head.conv_seg')))
]
