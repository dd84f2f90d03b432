# Its teacher: EfficientNet-lite2, neck and head twice as wide, trained three times as long.
_base_ = './lite_gfl_student.py'

model = dict(
    backbone=dict(variant='lite2'),
    neck=dict(in_channels=[24, 48, 120, 352], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96))
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=40, end=624),
]
