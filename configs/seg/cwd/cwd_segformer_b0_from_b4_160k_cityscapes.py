# CWD on the fused features and on the logits, with a tenth of the usual weights. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::segformer/segformer_mit-b4_8xb1-160k_cityscapes-1024x1024.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b4_8x1_1024x1024_160k_cityscapes/segformer_mit-b4_8x1_1024x1024_160k_cityscapes_20211207_080709-07f6c333.pth',  # noqa: E501
        losses=dict(
            loss_cwd_feature=dict(type='CWDLoss', at='decode_head.fusion_conv', tau=4.0, loss_weight=5.0),
            loss_cwd_logit=dict(type='CWDLoss', at='decode_head.conv_seg', tau=4.0, loss_weight=0.3)))
]
