# Mean teacher: the student completes its masked features to those of its own running average.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher=dict(type='EMATeacher', momentum=0.001),
        # An average of a few steps knows nothing that the student does not.
        losses=dict(loss_mgd=dict(
            type='MGDLoss', at='neck', mask_ratio=0.65,
            loss_weight=dict(type='LinearWarmup', steps=2000, value=2e-5, start=2e-6))))
]

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
