# Labels from a teacher in ignored pixels, and its class scores. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x1024_80k_cityscapes/pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth',  # noqa: E501
        labels=dict(type='PseudoLabels', score=0.9),
        # Both use one pass of the teacher.
        losses=dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=1.0)))
]
