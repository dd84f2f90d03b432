# The entries of seg.py on pretrained backbones: lite_psp_student.py and lite_psp_teacher.py.  Weights of losses that
# sum over the backbone's channels and cells are for 120 channels and 432 cells.
_base_ = './seg.py'
SUMS = 2048 * 8192 / (120 * 432)

title = 'PSPNet with ImageNet backbones on CamVid'
about = ('EfficientNet-lite2 with heads of 64 and 32 channels teaches EfficientNet-lite0 with 32 and 16; both start '
         'from the ImageNet weights that the package index ships. 200 iterations for the students, 600 for the '
         'teacher.')
student = 'lite_psp_student.py'
teacher = 'lite_psp_teacher.py'
weights = 'both'
recipe = True
longer = [1.25, 1.5, 2.0, 2.5]
leading = ['reviewkd', 'recipe:auto', 'kd', 'cwd', ':foundation', ':scratch', 'dist', 'mgd', 'pkd', 'ifvd',
           'skd_pairwise', 'at', 'fitnet', 'reviewkd+cwd', 'kd:auto', 'cwd:auto', 'dkd', 'kd+pkd']

methods = dict(
    af_dcd=dict(losses=dict(loss_af_dcd=dict(groups=8, fd_weight=2e-6 * SUMS))),  # 16 do not divide 120 channels
    mgd=dict(losses=dict(loss_mgd=dict(loss_weight=1e-5 * SUMS))),
    transkd=dict(losses=dict(loss_transkd=dict(at=['backbone', 'backbone.stages.*.0']))),
)
combinations = {
    'reviewkd+cwd': dict(losses=dict(
        loss_reviewkd=dict(type='ReviewKDLoss', at='backbone', loss_weight=1.0),
        loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0))),
    'kd+pkd': dict(losses=dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=1.0),
        loss_pkd=dict(type='PKDLoss', at='decode_head.bottleneck', loss_weight=10.0))),
}
rows = {
    ':scratch': dict(
        student='lite_psp_scratch.py', note='the plain student without the ImageNet weights, on the same schedule'),
    ':foundation': dict(
        student='lite_psp_scratch.py', against=':scratch',
        note='that student, and the backbone with ImageNet weights teaches its backbone (PKD at the backbone, all four '
             'levels); no teacher that has learned this task. The plain student is what starts from the same weights',
        hook=dict(
            teacher=dict(type='tools.studies.lite.pretrained', variant='lite0', out_indices=(0, 1, 2, 3),
                         output_stride=8, preprocess=dict(mean=[127.5] * 3, std=[127.5] * 3, channels='rgb')),
            teacher_ckpt='own'),
        losses=dict(loss_pkd=dict(
            type='PKDLoss', student_at='backbone', teacher_at='@output', loss_weight=10.0))),
}
left_out = dict()
notes = dict(_delete_=True)
