# Masks and class scores of the proposals of the student. Card: README.md in this folder.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::mask_rcnn/mask-rcnn_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r101_fpn_2x_coco/mask_rcnn_r101_fpn_2x_coco_bbox_mAP-0.408__segm_mAP-0.366_20200505_071027-14b391c7.pth',  # noqa: E501
        losses=dict(
            loss_kd_mask=dict(type='SigmoidKDLoss', at='@roi_masks'),
            loss_kd_cls=dict(type='SoftmaxKDLoss', at='@roi_logits')))
]
