# DIST on the logits of both heads. Card: README.md in this folder.
#
# As 'mmseg::...' would read, but found in the onedl forks too: mmengine looks that name up as the distribution
# `mmsegmentation`, and theirs is called otherwise.
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/mobilenet_v2/mobilenet-v2-d8_pspnet_4xb4-160k_ade20k-512x512.py')

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmseg::pspnet/pspnet_r101-d8_4xb4-160k_ade20k-512x512.py',
        teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x512_160k_ade20k/pspnet_r101-d8_512x512_160k_ade20k_20200615_100650-967c316f.pth',  # noqa: E501
        losses=dict(
            loss_dist=dict(type='DISTLoss', at='decode_head.conv_seg'),
            loss_dist_aux=dict(type='DISTLoss', at='auxiliary_head.conv_seg', loss_weight=0.4)))
]
