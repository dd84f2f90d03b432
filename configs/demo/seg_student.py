# Plain student of the segmentation demo: PSPNet with a narrow ResNet-18, trained from scratch on drawn streets.
#
# As 'mmseg::_base_/...' would read, but found in the onedl forks too (see configs/seg).
_base_ = [__import__('mmengine').utils.get_installed_path('mmseg') + '/.mim/configs/_base_/' + name for name in (
    'models/pspnet_r50-d8.py', 'datasets/cityscapes.py', 'default_runtime.py', 'schedules/schedule_20k.py')]

data_root = 'work_dirs/demo/data/streets/'
size = (192, 96)  # width, height
norm_cfg = dict(type='BN', requires_grad=True)

model = dict(
    data_preprocessor=dict(size=size[::-1]),
    pretrained=None,
    backbone=dict(depth=18, base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=128, channels=32, norm_cfg=norm_cfg),
    auxiliary_head=None)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=size, ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=size[::-1], cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
loader = dict(num_workers=0, persistent_workers=False)  # the pictures are small: a worker costs more than it brings
train_dataloader = dict(batch_size=4, **loader, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, **loader, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=480, val_interval=240)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=0.9, by_epoch=False, begin=50, end=480),
]
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=0.002, weight_decay=0.05))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=60, max_keep_ckpts=1))
