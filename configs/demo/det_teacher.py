# Teacher of the detection demo: the student's twin with a wider backbone; same data and schedule.
_base_ = './det_student.py'

model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256]))
