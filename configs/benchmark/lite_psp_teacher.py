# Its teacher: EfficientNet-lite2, heads twice as wide, trained three times as long.
_base_ = './lite_psp_student.py'

model = dict(
    backbone=dict(variant='lite2'),
    decode_head=dict(in_channels=120, channels=64),
    auxiliary_head=dict(in_channels=48, channels=32))
train_cfg = dict(max_iters=600, val_interval=600)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=40, end=600),
]
