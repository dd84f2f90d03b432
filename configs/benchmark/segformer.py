# What `tools/studies/benchmark.py --task seg` compares on a transformer: those entries of seg.py that need no CNN, on
# the pair of segformer_student.py and segformer_teacher.py.  The head's 64 channels have 1728 cells (36x48).
UNITS = 1728 / 8192

title = 'SegFormer on CamVid'
about = ('From scratch: no package of the index has ImageNet weights of a small transformer. MiT-B0 with a head of 64 '
         'channels teaches its half, with 32. 400 iterations for the students, 1600 for the teacher.')
data = 'camvid_cityscapes'
host = 'mmseg'
metric = 'mIoU'
student = 'segformer_student.py'
teacher = 'segformer_teacher.py'
shape = (144, 192)
weights = 'both'
recipe = True
longer = [1.25, 1.5, 2.0, 2.5]
leading = ['kd', 'cwd', 'recipe:auto', 'reviewkd', 'dist', 'cwd_feature', 'pkd', 'fitnet', 'skd_pairwise', 'ifvd',
           'transkd', 'kd+pkd', 'kd:auto', 'cwd:auto']

logits = 'decode_head.conv_seg'
hidden = 'decode_head.fusion_conv'

loss_kd = dict(type='SoftmaxKDLoss', at=logits, tau=1.0, loss_weight=1.0)
methods = dict(
    aicsd=dict(losses=dict(loss_aicsd=dict(type='AICSDLoss', at=logits, similarity=100.0, pixel=20.0))),
    at=dict(losses=dict(loss_at=dict(type='ATLoss', at=hidden, loss_weight=10000.0 * UNITS))),
    bpkd=dict(losses=dict(loss_bpkd=dict(type='BPKDLoss', at=logits))),
    cirkd=dict(losses=dict(
        loss_kd=loss_kd,
        loss_minibatch=dict(type='CIRKDMiniBatchLoss', at=hidden, tau=0.1, loss_weight=1.0),
        loss_memory=dict(
            type='CIRKDMemoryLoss', at=hidden, num_classes=19, tau=0.1, pixel_memory=20000, region_memory=2000,
            pixel_weight=0.1, region_weight=0.1))),
    cwd=dict(losses=dict(loss_cwd=dict(type='CWDLoss', at=logits, tau=1.0, loss_weight=5.0))),
    cwd_feature=dict(losses=dict(loss_cwd=dict(type='CWDLoss', at=hidden, tau=1.0, loss_weight=5.0))),
    dist=dict(losses=dict(loss_dist=dict(type='DISTLoss', at=logits))),
    dkd=dict(losses=dict(loss_dkd=dict(type='DKDLoss', at=logits))),
    fitnet=dict(losses=dict(loss_fitnet=dict(
        type='FitNetLoss', at=hidden, adapter=dict(type='ConvAdapter', bias=False, always=True), loss_weight=10.0))),
    ifvd=dict(losses=dict(
        loss_ifvd=dict(type='IFVDLoss', at=hidden, num_classes=19, loss_weight=20.0), loss_kd=loss_kd)),
    kd=dict(losses=dict(loss_kd=loss_kd)),
    pkd=dict(losses=dict(loss_pkd=dict(type='PKDLoss', at=hidden, loss_weight=10.0))),
    reviewkd=dict(losses=dict(loss_reviewkd=dict(type='ReviewKDLoss', at='backbone', loss_weight=1.0))),
    skd_pairwise=dict(losses=dict(
        loss_skd=dict(type='SKDPairwiseLoss', at=hidden, kernel=2, loss_weight=10.0), loss_kd=loss_kd)),
    transkd=dict(losses=dict(loss_transkd=dict(
        type='TransKDLoss', at=['backbone', 'backbone.layers.*.0'], middle=32, feature_weight=1.0,
        embed_weights=(0.1, 0.1, 0.5, 1.0), embedding='linear'))),
    zero_first_order=dict(losses=dict(loss_zero_first=dict(type='ZeroFirstOrderLoss', at=logits))),
)
combinations = {
    'kd+pkd': dict(losses=dict(loss_kd=loss_kd, loss_pkd=dict(type='PKDLoss', at=hidden, loss_weight=10.0))),
    'reviewkd+cwd': dict(losses=dict(
        loss_reviewkd=dict(type='ReviewKDLoss', at='backbone', loss_weight=1.0),
        loss_cwd=dict(type='CWDLoss', at=logits, tau=1.0, loss_weight=5.0))),
}
