# Teacher of pspnet_wide.py: PSPNet R50 of full width.
_base_ = './pspnet_cwd_teacher.py'

model = dict(
    backbone=dict(base_channels=64, stem_channels=64),
    decode_head=dict(in_channels=2048),
    auxiliary_head=dict(in_channels=1024))
