# What `tools/studies/benchmark.py --task seg` compares: one hook entry a method, on the pair of pspnet_student.py /
# pspnet_teacher.py.
#
# Taps and weights are those of the method's own config in configs/seg, but for what changes with the size of the maps.
# There ResNet-101's last stage has 2048 channels and 8192 cells (512x1024), here 256 and 432: losses that *sum* over
# channels and cells become smaller, and *means* over cells of vectors of length 1 become larger.
SUMS = 2048 * 8192 / (256 * 432)
UNITS = 432 / 8192

title = 'PSPNet R18 on CamVid'
data = 'camvid_cityscapes'
host = 'mmseg'
metric = 'mIoU'
student = 'pspnet_student.py'
teacher = 'pspnet_teacher.py'
shape = (144, 192)

logits = 'decode_head.conv_seg'
hidden = 'decode_head.bottleneck'

loss_kd = dict(type='SoftmaxKDLoss', at=logits, tau=1.0, loss_weight=1.0)
loss_minibatch = dict(type='CIRKDMiniBatchLoss', at=hidden, tau=0.1, loss_weight=1.0)
loss_memory = dict(
    type='CIRKDMemoryLoss', at=hidden, num_classes=19, tau=0.1, pixel_memory=20000, region_memory=2000,
    pixel_weight=0.1, region_weight=0.1)
methods = dict(
    af_dcd=dict(losses=dict(
        loss_kd=loss_kd,
        loss_af_dcd=dict(type='AfDCDLoss', at='backbone', levels=[-1], mask_ratio=0.75, fd_weight=2e-6 * SUMS,
                         contrast_weight=5e-3))),
    aicsd=dict(losses=dict(loss_aicsd=dict(type='AICSDLoss', at=logits, similarity=100.0, pixel=20.0))),
    at=dict(losses=dict(loss_at=dict(type='ATLoss', at=hidden, loss_weight=10000.0 * UNITS))),
    bpkd=dict(losses=dict(loss_bpkd=dict(type='BPKDLoss', at=logits))),
    cankd=dict(losses=dict(loss_cankd=dict(
        type='CanKDLoss', at='backbone', levels=[-1], adapter=dict(type='ConvAdapter'), loss_weight=10.0))),
    cirkd=dict(losses=dict(loss_kd=loss_kd, loss_minibatch=loss_minibatch, loss_memory=loss_memory)),
    cirkd_v2=dict(losses=dict(
        loss_kd=loss_kd, loss_minibatch=loss_minibatch, loss_memory=loss_memory,
        loss_channel=dict(type='CIRKDChannelLoss', at=hidden, grid=(9, 12), tau=0.1, memory=10000,
                          minibatch_weight=1.0, memory_weight=0.1, mse_weight=100.0),
        loss_hint=dict(type='FitNetLoss', at=hidden, adapter=dict(type='GraphAdapter'), loss_weight=1.0))),
    cwd=dict(losses=dict(loss_cwd=dict(type='CWDLoss', at=logits, tau=1.0, loss_weight=5.0))),
    cwd_feature=dict(losses=dict(loss_cwd=dict(type='CWDLoss', at=hidden, tau=1.0, loss_weight=5.0))),
    dist=dict(losses=dict(
        loss_dist=dict(type='DISTLoss', at=logits),
        loss_dist_aux=dict(type='DISTLoss', at='auxiliary_head.conv_seg', loss_weight=0.4))),
    dkd=dict(losses=dict(loss_dkd=dict(type='DKDLoss', at=logits))),
    dsi=dict(losses=dict(loss_dsi=dict(
        type='DSILoss', at='backbone', levels=[-1], adapter=dict(type='ConvAdapter', always=True), loss_weight=5.0))),
    dsd=dict(losses=dict(
        loss_dsd=dict(type='DSDLoss', at=['auxiliary_head.convs', hidden, logits], psd=1000.0 * UNITS, csd=10.0),
        loss_kd=loss_kd)),
    fitnet=dict(losses=dict(loss_fitnet=dict(
        type='FitNetLoss', at=hidden, adapter=dict(type='ConvAdapter', bias=False, always=True), loss_weight=10.0))),
    ickd=dict(losses=dict(loss_ickd=dict(
        type='ICKDLoss', at=hidden, adapter=dict(type='ConvAdapter', bias=False, norm=True, always=True),
        loss_weight=1.0))),
    idd=dict(losses=dict(
        loss_idd=dict(type='IDDLoss', at=hidden, scale='mean', num_classes=19), loss_kd=loss_kd)),
    ifvd=dict(losses=dict(
        loss_ifvd=dict(type='IFVDLoss', at=hidden, num_classes=19, loss_weight=20.0), loss_kd=loss_kd)),
    kd=dict(losses=dict(loss_kd=loss_kd)),
    ktaad=dict(learn=200, losses=dict(loss_ktaad=dict(
        type='KTAADLoss', at=hidden, code=32, kta_weight=50.0, affinity_weight=1.0, p=1))),
    local_pod=dict(losses=dict(loss_pod=dict(
        type='LocalPODLoss', at='backbone', adapter=dict(type='ConvAdapter', bias=False, always=True),
        loss_weight=0.01 / 4))),
    maskd=dict(learn=200, losses=dict(loss_maskd=dict(
        type='MasKDLoss', at=logits, num_tokens=8, token_weights='mean', student_mask_after=None, loss_weight=0.5))),
    mgd=dict(losses=dict(
        loss_mgd=dict(type='MGDLoss', at='backbone', levels=[-1], mask_ratio=0.75, loss_weight=1e-5 * SUMS),
        loss_cwd=dict(type='CWDLoss', at=logits, tau=4.0, loss_weight=3.0))),
    ofd=dict(losses=dict(loss_ofd=dict(
        type='OFDLoss', at='decode_head.bottleneck.bn',
        adapter=dict(type='ConvAdapter', bias=False, always=True, norm=True), margin='norm',
        loss_weight=1e-4 * SUMS))),
    pkd=dict(losses=dict(loss_pkd=dict(type='PKDLoss', at=hidden, loss_weight=10.0))),
    reviewkd=dict(losses=dict(loss_reviewkd=dict(type='ReviewKDLoss', at='backbone', loss_weight=1.0))),
    skd_holistic=dict(losses=dict(
        loss_kd=loss_kd,
        loss_pairwise=dict(type='SKDPairwiseLoss', at=hidden, kernel=2, loss_weight=10.0),
        loss_holistic=dict(type='SKDHolisticLoss', at=logits, objective='wgan-gp', width=16, loss_weight=0.001))),
    skd_pairwise=dict(losses=dict(
        loss_skd=dict(type='SKDPairwiseLoss', at=hidden, kernel=2, loss_weight=10.0), loss_kd=loss_kd)),
    transkd=dict(losses=dict(loss_transkd=dict(
        type='TransKDLoss', at=['backbone', 'backbone.layer*.0'], middle=32, feature_weight=1.0,
        embed_weights=(0.1, 0.1, 0.5, 1.0), embedding='linear'))),
    zero_first_order=dict(losses=dict(loss_zero_first=dict(type='ZeroFirstOrderLoss', at=logits))),
)
left_out = dict(
    mib='is for a student that knows more classes than its teacher, with a background class; this data has none',
    plop='its labels are for a student that knows more classes than its teacher, with a background class; this data '
         'has none. Its features are `local_pod`',
    mask_query='compares queries of mask transformers; the student here has none',
)
# {label.seed} are scores of `trials` in benchmark.json, {run.seed} those of the table.
notes = dict(
    aicsd='loses by its first term: with `similarity=0`, which leaves what `kd` does, seed 0 gave {first.0}, with 10 '
          'instead of 100 it gave {ten.0}.',
    at='with the weight not scaled to this size, 19 times as much, seed 0 gave {unscaled.0} instead of {run.0}.',
    ofd='a sum over channels and cells: the published weight makes it more than 100 times the task\'s loss. No other '
        'weight was tried.',
    ickd='loses the more the larger its weight: with 10 instead of 1 seed 0 gave {ten.0} instead of {run.0}.',
    zero_first_order='gains by its first term and loses by its second: with `first=0` seed 0 gave {only_second.0}, '
                     'with 1 instead of 0.1 it gave {one.0}, with `zero=0` and `first=1` {only_first.0}. The default, '
                     'ours, was chosen by these.',
)
