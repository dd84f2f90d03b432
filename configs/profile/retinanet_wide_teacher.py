# Teacher of retinanet_wide.py: RetinaNet R50 of full width up to the neck, three classes.
_base_ = './retinanet_cwd_teacher.py'

model = dict(
    backbone=dict(base_channels=64, stem_channels=64),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
    bbox_head=dict(num_classes=3))
