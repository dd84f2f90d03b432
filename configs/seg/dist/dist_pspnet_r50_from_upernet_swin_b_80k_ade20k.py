# DIST on the logits of both heads, from a transformer. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/swin/upernet_swin_base_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/upernet_swin_base_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210526_192340-593b0e13.pth',  # noqa: E501
        losses=dict(
            loss_dist=dict(type='DISTLoss', at='decode_head.conv_seg'),
            loss_dist_aux=dict(type='DISTLoss', at='auxiliary_head.conv_seg', loss_weight=0.4)))
]
