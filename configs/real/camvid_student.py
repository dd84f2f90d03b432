# Plain student on street scenes (CamVid in Cityscapes layout): PSPNet with a narrow ResNet-18, from scratch.
_base_ = '../demo/seg_student.py'

data_root = 'data/camvid_cityscapes/'
size = (240, 180)  # width, height: half the resolution
crop = (144, 192)  # height, width

model = dict(data_preprocessor=dict(size=crop))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=size, ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
files = dict(data_root=data_root, img_suffix='_leftImg8bit.jpg')
train_dataloader = dict(dataset=dict(**files, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**files, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=600, val_interval=150)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=50, end=600),
]
default_hooks = dict(checkpoint=dict(interval=75))
