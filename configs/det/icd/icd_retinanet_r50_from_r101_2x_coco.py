# ICD with the weights for RetinaNet. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_icd=dict(type='ICDLoss', at='neck', num_classes=80, heads=8, distill=8.0, auxiliary=1.0)))
]

# The authors' recipe clips gradients; the value is this project's usual one.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
