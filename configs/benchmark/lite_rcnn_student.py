# Plain student of the two-stage benchmark on pretrained backbones: Faster R-CNN on EfficientNet-lite0 with ImageNet
# weights; the pictures of rcnn_student.py.  To train it by hand: PYTHONPATH=. python tools/train.py THIS.
_base_ = './rcnn_student.py'
custom_imports = dict(imports=['tools.studies.lite'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True),
    backbone=dict(_delete_=True, type='LiteBackbone', variant='lite0', out_indices=(1, 2, 3, 4), frozen_stages=2),
    neck=dict(in_channels=[24, 40, 112, 320]))

train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=40, end=208),
]
optim_wrapper = dict(optimizer=dict(lr=0.002))
