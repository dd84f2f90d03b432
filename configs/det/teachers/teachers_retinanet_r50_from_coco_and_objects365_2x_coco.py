# Two data sets: each teacher knows its own classes; every class is taught by those that know it.
# Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teachers=dict(
            coco=dict(
                teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
                teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'),  # noqa: E501
            objects365=dict(
                teacher='mmdet::objects365/retinanet_r50_fpn_1x_objects365v1.py',
                teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/objects365/retinanet_r50_fpn_1x_obj365v1/retinanet_r50_fpn_1x_obj365v1_20221219_181859-ba3e3dd5.pth')),  # noqa: E501
        losses=dict(loss_kd=dict(
            type='SigmoidKDLoss', at='bbox_head.retina_cls', teacher=('coco', 'objects365'), classes='common',
            reduction='teacher_score', loss_weight=0.02)))
]
