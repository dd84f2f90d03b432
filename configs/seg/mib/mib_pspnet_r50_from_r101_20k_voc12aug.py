# MiB: unbiased cross-entropy and distillation on VOC, 15 classes and then 5 more. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pspnet/pspnet_r50-d8_4xb4-20k_voc12aug-512x512.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        # In a sequence of steps the teacher is the model of the step before, of fewer classes. The zoo's stands here
        # for it, and `old_classes` says how many of its classes count: 15 and the background.
        teacher='mmseg::pspnet/pspnet_r101-d8_4xb4-20k_voc12aug-512x512.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x512_20k_voc12aug/pspnet_r101-d8_512x512_20k_voc12aug_20200617_102003-4aef3c9a.pth',  # noqa: E501
        # The unbiased cross-entropy takes the place of the student's own.
        task_loss_weight=0.0,
        losses=dict(
            loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg', old_classes=16, loss_weight=1.0),
            loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg', old_classes=16, loss_weight=10.0)))
]
