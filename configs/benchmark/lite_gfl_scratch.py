# The same student from scratch: everything learns, norms too.  Three times as long, as long as the teacher: after the
# student's four epochs it has learned next to nothing.
_base_ = './lite_gfl_student.py'

model = dict(backbone=dict(pretrained=False, frozen_stages=-1, norm_eval=False))
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=40, end=624),
]
