# Matched queries of two Mask2Formers, semantic segmentation. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024/mask2former_swin-s_8xb2-90k_cityscapes-512x1024_20221127_143802-9ab177f6.pth',  # noqa: E501
        losses=dict(loss_queries=dict(type='MaskQueryLoss', at='decode_head')))
]
