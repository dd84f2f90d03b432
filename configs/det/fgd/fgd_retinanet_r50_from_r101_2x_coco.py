# FGD, one-stage weights. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',  # noqa: E501
        inherit=('neck', 'bbox_head'),
        losses=dict(
            loss_fgd=dict(
                type='FGDLoss', at='neck', tau=0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6)))
]

# The published recipe clips: sums over a whole feature map give large gradients at the start.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
