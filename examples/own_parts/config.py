# RetinaNet R18 learns from itself, by parts that kd_mm does not have. From the root of the repository:
#   PYTHONPATH=examples/own_parts kd-mm check examples/own_parts/config.py
# The two files stand for checkpoints of your own, such as two epochs of one training.
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

custom_imports = dict(imports=['parts'], allow_failed_imports=False)

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher=dict(type='AveragedTeacher', config='mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
                 files=['epoch_11.pth', 'epoch_12.pth']),
    losses=dict(
        loss_step=dict(type='StepBetweenLoss', at=['backbone.layer3', 'backbone.layer4']),
        loss_hint=dict(type='FitNetLoss', at='neck', adapter=dict(type='TwoLayerAdapter', width=64),
                       region=dict(type='LowerPartRegion', share=0.5))))]
