# Cross-modal: the teacher sees the infrared picture of the scene, the student that of visible light.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        # A detector that was trained on infrared pictures: put the file there, or name yours.
        teacher_ckpt='checkpoints/retinanet_r101_infrared.pth',
        input_key='infrared',
        losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=6.0)))
]

train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    # COCO has no such pictures: of a set that has, they lie in a folder beside, under the same names.
    dict(type='kd_mm.LoadImageBeside', key='infrared', replace=('train2017/', 'infrared2017/'), color_type='color'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='kd_mm.SplitImageBeside', key='infrared'),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction', 'infrared'))
]))
