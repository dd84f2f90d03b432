# Its teacher: EfficientNet-lite2, two layers of encoder, wider networks behind attention, trained three times as long.
_base_ = './lite_dino_student.py'

model = dict(
    backbone=dict(variant='lite2'),
    neck=dict(in_channels=[120, 352]),
    encoder=dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=512))),
    decoder=dict(layer_cfg=dict(ffn_cfg=dict(feedforward_channels=512))))
train_cfg = dict(max_epochs=24, val_interval=24)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=40, end=1248),
]
