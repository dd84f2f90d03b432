# FSP between C3 and C4 and between C4 and C5 of the backbone. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            # The widths of R50 and R101 are equal.
            loss_fsp=dict(type='FSPLoss', at='backbone', levels=[1, 2, 3], loss_weight=1e-3)))
]
