# MGD, one-stage weights. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        # The 1x teacher is the better one: 41.0 box AP in the model zoo, the 2x one has 40.8.
        teacher='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth',  # noqa: E501
        inherit=('neck', 'bbox_head'),
        losses=dict(loss_mgd=dict(type='MGDLoss', at='neck', mask_ratio=0.65, loss_weight=2e-5)))
]

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
