# Teacher of deformable_detr_logits.py: Deformable DETR R50 with three layers in encoder and decoder.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

model = dict(
    backbone=dict(frozen_stages=-1, init_cfg=None),
    encoder=dict(num_layers=3),
    decoder=dict(num_layers=3),
    bbox_head=dict(num_classes=3))
