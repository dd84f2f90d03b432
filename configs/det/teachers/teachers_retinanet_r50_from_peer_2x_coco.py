# Mutual learning: a second student of the same kind learns from the first, in the same run.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        # Without a checkpoint it starts as its own config says: backbone from ImageNet, head from other random numbers.
        teacher=dict(type='PeerTeacher', config='mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'),
        losses=dict(loss_kd=dict(
            type='SigmoidKDLoss', at='bbox_head.retina_cls', reduction='teacher_score', loss_weight=0.02)))
]
