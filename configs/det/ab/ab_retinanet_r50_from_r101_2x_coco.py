# AB on what goes into the last ReLU of both towers of the head. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_ab=dict(
                type='ABLoss',
                at=['bbox_head.cls_convs.3.conv', 'bbox_head.reg_convs.3.conv'],
                adapter=dict(type='ConvAdapter', bias=False, always=True, norm=True),
                loss_weight=0.05)))
]
