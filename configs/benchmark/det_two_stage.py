# What `tools/studies/benchmark.py --task det` compares on a two-stage detector: losses on shared proposals.
# See det.py.
title = 'Faster R-CNN R18 on blood cells (BCCD)'
data = 'bccd'
host = 'mmdet'
metric = 'coco/bbox_mAP'
student = 'rcnn_student.py'
teacher = 'rcnn_teacher.py'
shape = (144, 192)

strides = [4, 8, 16, 32]

methods = dict(
    chen=dict(losses=dict(
        loss_chen_cls=dict(type='ChenClassLoss', at='@roi_logits'),
        loss_chen_reg=dict(type='ChenBoxLoss', at='@roi_boxes'),
        loss_chen_rpn_cls=dict(type='ChenClassLoss', at='@rpn_logits'),
        loss_chen_rpn_reg=dict(type='ChenBoxLoss', at='@rpn_boxes'),
        loss_chen_hint=dict(
            type='FitNetLoss', at='backbone', levels=[3], adapter=dict(type='ConvAdapter', always=True),
            loss_weight=0.5))),
    defeat=dict(losses=dict(
        loss_defeat=dict(
            type='DeFeatLoss', at='neck', adapter=dict(type='ConvAdapter', kernel_size=3, always=True), fg=3.0,
            bg=12.0, foreground=dict(type='LevelBoxRegion', strides=strides)),
        loss_defeat_cls=dict(type='DeFeatClassLoss', at='@roi_logits', proposals='teacher', fg=2.0, bg=2.0))),
    dist=dict(losses=dict(loss_dist=dict(type='DISTLoss', at='@roi_logits'))),
    dkd=dict(losses=dict(loss_dkd=dict(type='DKDLoss', at='@roi_logits', alpha=1.0, beta=0.25, tau=1.0))),
    kd=dict(losses=dict(loss_kd=dict(type='SoftmaxKDLoss', at='@roi_logits'))),
    pkd=dict(losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0))),
    rkd=dict(losses=dict(loss_rkd=dict(
        type='RKDLoss', at='@roi_features', samples='image', limit=32, loss_weight=0.1))),
    sp=dict(losses=dict(loss_sp=dict(
        type='SPLoss', at='@roi_features', samples='image', limit=512, loss_weight=500.0))),
)
