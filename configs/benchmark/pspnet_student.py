# Plain student of the segmentation benchmark: the one of configs/real on CamVid plus an auxiliary head, short schedule.
_base_ = '../real/camvid_student.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(auxiliary_head=dict(
    _delete_=True, type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1, concat_input=False,
    dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg, align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)))

train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=50, end=300),
]
