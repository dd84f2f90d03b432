# MasKD on the FPN; learn the tokens first: tools/learn_tokens.py. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        losses=dict(
            loss_maskd=dict(
                type='MasKDLoss',
                at='neck',
                tokens='work_dirs/learned/maskd_retinanet-r101_coco.pth',
                num_tokens=6,
                student_mask_after=1000,
                loss_weight=7.0)))
]
