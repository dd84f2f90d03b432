# CIRKD v2: the first version, channel relations, and a hint after a graph block. Card: README.md in this folder.
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
        losses=dict(
            loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=1.0),
            loss_minibatch=dict(type='CIRKDMiniBatchLoss', at='decode_head.bottleneck', tau=0.1, loss_weight=1.0),
            loss_memory=dict(
                type='CIRKDMemoryLoss',
                at='decode_head.bottleneck',
                num_classes=19,
                tau=0.1,
                pixel_memory=20000,
                region_memory=2000,
                pixel_weight=0.1,
                region_weight=0.1),
            loss_channel=dict(
                type='CIRKDChannelLoss',
                at='decode_head.bottleneck',
                grid=(16, 32),
                tau=0.1,
                memory=10000,
                minibatch_weight=1.0,
                memory_weight=0.1,
                mse_weight=100.0),
            loss_hint=dict(
                type='FitNetLoss',
                at='decode_head.bottleneck',
                adapter=dict(type='GraphAdapter'),
                loss_weight=1.0)))
]
