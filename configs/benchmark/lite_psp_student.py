# Plain student of the segmentation benchmark on pretrained backbones: PSPNet on EfficientNet-lite0 with ImageNet
# weights, its fourth stage dilated to stride 8 and the fifth left out; the pictures of pspnet_student.py.  To train it
# by hand: PYTHONPATH=. python tools/train.py THIS.
_base_ = './pspnet_student.py'
custom_imports = dict(imports=['tools.studies.lite'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True, type='LiteBackbone', variant='lite0', out_indices=(0, 1, 2, 3), output_stride=8,
        frozen_stages=1),
    decode_head=dict(in_channels=112, in_index=3, channels=32),
    auxiliary_head=dict(in_channels=40, in_index=2, channels=16))

train_cfg = dict(max_iters=200, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=40, end=200),
]
