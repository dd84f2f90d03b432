# Teacher of the segmentation demo: the student's twin, twice as wide; same data and schedule.
_base_ = './seg_student.py'

model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    decode_head=dict(in_channels=256, channels=64))
