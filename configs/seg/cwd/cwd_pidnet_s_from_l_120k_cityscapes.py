# CWD on the logits of the main branch. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::pidnet/pidnet-l_2xb6-120k_1024x1024-cityscapes.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/pidnet/pidnet-l_2xb6-120k_1024x1024-cityscapes/pidnet-l_2xb6-120k_1024x1024-cityscapes_20230303_114514-0783ca6b.pth',  # noqa: E501
        losses=dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0)))
]
