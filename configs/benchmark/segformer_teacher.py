# Its teacher: the widths of MiT-B0, trained four times as long.
_base_ = './segformer_student.py'

model = dict(
    backbone=dict(embed_dims=32),
    decode_head=dict(in_channels=[32, 64, 160, 256], channels=64))
train_cfg = dict(max_iters=1600, val_interval=1600)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=50, end=1600),
]
