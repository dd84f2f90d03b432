# Two teachers at once: their class scores are averaged, and one of them gives its features.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teachers=dict(
            r101=dict(
                teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
                teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'),  # noqa: E501
            x101=dict(
                teacher='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
                teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth')),  # noqa: E501
        losses=dict(
            loss_kd=dict(
                type='SigmoidKDLoss', at='bbox_head.retina_cls', teacher=('r101', 'x101'), reduction='teacher_score',
                loss_weight=0.02),
            loss_pkd=dict(type='PKDLoss', at='neck', teacher='x101', loss_weight=6.0)))
]
