# CWD on the logits. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/hrnet/fcn_hr18s_4xb4-80k_ade20k-512x512.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::hrnet/fcn_hr48_4xb4-80k_ade20k-512x512.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/hrnet/fcn_hr48_512x512_80k_ade20k/fcn_hr48_512x512_80k_ade20k_20200614_193946-7ba5258d.pth',  # noqa: E501
        losses=dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0)))
]
