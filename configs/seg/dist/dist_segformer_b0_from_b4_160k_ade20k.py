# DIST on the logits. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::segformer/segformer_mit-b4_8xb2-160k_ade20k-512x512.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b4_512x512_160k_ade20k/segformer_mit-b4_512x512_160k_ade20k_20210728_183055-7f509d7d.pth',  # noqa: E501
        losses=dict(loss_dist=dict(type='DISTLoss', at='decode_head.conv_seg')))
]
