# What `tools/studies/benchmark.py --task det` compares on a DETR-type detector: losses on queries, and losses on
# features behind the neck.  See det.py.
title = 'DINO with ImageNet backbones on blood cells (BCCD)'
about = ('EfficientNet-lite2 with two layers of encoder teaches EfficientNet-lite0 with one, both with two layers of '
         'decoder, two levels of strides 16 and 32 and 40 queries; both backbones start from ImageNet weights. Eight '
         'epochs for the students, twenty-four for the teacher.')
data = 'bccd'
host = 'mmdet'
metric = 'coco/bbox_mAP'
student = 'lite_dino_student.py'
teacher = 'lite_dino_teacher.py'
shape = (144, 192)
recipe = True
longer = [1.25, 1.5, 2.0]
leading = ['recipe:auto', 'kd_detr', 'detrdistill', 'detrdistill:logits', 'pkd', 'cwd', 'mimic', 'mgd', 'fitnet',
           'kd_detr+pkd']

methods = dict(
    cwd=dict(losses=dict(loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0))),
    detrdistill=dict(losses=dict(
        loss_logits=dict(type='DETRDistillLogitsLoss', at='bbox_head'),
        loss_memory=dict(type='DETRDistillFeatureLoss', at='bbox_head'),
        loss_prior=dict(type='DETRDistillQueryPriorLoss', at='bbox_head'))),
    fitnet=dict(losses=dict(loss_fitnet=dict(
        type='FitNetLoss', at='neck', adapter=dict(type='ConvAdapter', always=True), loss_weight=2.0))),
    kd_detr=dict(losses=dict(loss_points=dict(type='KDDETRLoss', at='bbox_head', general=40))),
    # Sums over 256 channels and 135 cells, published for 256 and about 22000.
    mgd=dict(losses=dict(loss_mgd=dict(
        type='MGDLoss', at='neck', mask_ratio=0.65, loss_weight=4e-7 * 22000 / 135))),
    mimic=dict(losses=dict(loss_mimic=dict(type='MimicLoss', at='neck', assign='size', loss_weight=1.0))),
    pkd=dict(losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0))),
)
combinations = {
    'detrdistill:logits': dict(losses=dict(loss_logits=dict(type='DETRDistillLogitsLoss', at='bbox_head'))),
    'kd_detr+pkd': dict(losses=dict(
        loss_points=dict(type='KDDETRLoss', at='bbox_head', general=40),
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0))),
}
left_out = dict()
notes = dict()
