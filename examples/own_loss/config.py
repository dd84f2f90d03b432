# RetinaNet R50 teaches RetinaNet R18 by a loss that kd_mm does not have. From the root of the repository:
#   PYTHONPATH=examples/own_loss kd-mm check examples/own_loss/config.py
#   PYTHONPATH=examples/own_loss kd-mm train examples/own_loss/config.py
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

custom_imports = dict(imports=['smooth_hint'], allow_failed_imports=False)

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    losses=dict(loss_hint=dict(type='SmoothHintLoss', at='neck', beta=0.5, loss_weight=2.0)))]
