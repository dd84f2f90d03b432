# OFD before the last ReLU of three stages. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_ofd=dict(
                type='OFDLoss',
                student_at=['backbone.layer2.3:pre_relu', 'backbone.layer3.5:pre_relu', 'backbone.layer4.2:pre_relu'],
                teacher_at=['backbone.layer2.3:pre_relu', 'backbone.layer3.22:pre_relu', 'backbone.layer4.2:pre_relu'],
                adapter=dict(type='ConvAdapter', bias=False, always=True, norm=True),
                margin='norm',
                loss_weight=[1.25e-5, 2.5e-5, 5e-5])))
]
