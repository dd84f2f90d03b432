# Born again: the student's own config, trained before, teaches a new one. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='student',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_2x_coco/retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth',  # noqa: E501
        losses=dict(loss_kd=dict(
            type='SigmoidKDLoss', at='bbox_head.retina_cls', reduction='teacher_score', loss_weight=0.02)))
]
