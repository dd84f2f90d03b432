# TransKD-Base: fused stages and patch embeddings. Card: README.md in this folder.
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
            loss_transkd=dict(
                type='TransKDLoss',
                at=['backbone', 'backbone.layers.*.0'],
                middle=64,
                feature_weight=1.0,
                embed_weights=(0.1, 0.1, 0.5, 1.0),
                embedding='linear')))
]
