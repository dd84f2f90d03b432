# Teacher of the two-stage benchmark: four times as wide in the backbone and trained three times as long.
_base_ = './rcnn_student.py'

model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256]))
train_cfg = dict(max_epochs=18, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=936),
]
