# Two teachers one after the other, the nearer first; a teacher whose loss has no weight does not run.
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
        # Windows are (first iteration, end): 12 of the 24 epochs of COCO at 16 images a step.
        losses=dict(
            loss_near=dict(
                type='MGDLoss', at='neck', teacher='r101', mask_ratio=0.65,
                loss_weight=dict(type='WindowSchedule', windows=[(0, 87960)], value=2e-5)),
            loss_far=dict(
                type='MGDLoss', at='neck', teacher='x101', mask_ratio=0.65,
                loss_weight=dict(type='WindowSchedule', windows=[(87960, None)], value=2e-5))))
]

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
