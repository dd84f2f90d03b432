# Pixel-wise KD from the semantic scores of a mask transformer. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024/mask2former_swin-s_8xb2-90k_cityscapes-512x1024_20221127_143802-9ab177f6.pth',  # noqa: E501
        losses=dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits', loss_weight=1.0)))
]
