# What `tools/studies/benchmark.py --task det` compares on pretrained backbones: the entries of det.py on the pair of
# lite_gfl_student.py and lite_gfl_teacher.py.  Weights of losses that sum are for the teacher's neck of 96 channels.
_base_ = './det.py'
SUMS = 256 * 22000 / (96 * 570)  # sums over channels and cells
CHANNELS = 256 / 96  # sums over channels, means over cells

title = 'GFL with ImageNet backbones on blood cells (BCCD)'
about = ('EfficientNet-lite2 with a neck and head of 96 channels teaches EfficientNet-lite0 with 48; both start from '
         'the ImageNet weights that the package index ships. Four epochs for the students, twelve for the teacher.')
student = 'lite_gfl_student.py'
teacher = 'lite_gfl_teacher.py'
weights = 'both'  # published, and measured in training
recipe = True
longer = [1.25, 1.5, 2.0, 2.5]  # times the plain student's steps
leading = ['pkd', 'recipe:auto', 'fgd', ':foundation', ':scratch', 'mimic', 'gid', 'fbkd', 'cwd', 'defeat', 'bckd',
           'ld', 'pkd+ld', 'pkd:auto', 'fgd:auto', 'freekd', 'ld:auto', 'mimic+bckd']

depthwise = ['backbone.stages.2.1.depthwise.1', 'backbone.stages.3.5.depthwise.1', 'backbone.stages.4.4.depthwise.1']
methods = dict(
    fbkd=dict(losses=dict(loss_fbkd=dict(feature=7e-5 * CHANNELS, nonlocal_=7e-5 * CHANNELS))),
    fgd=dict(losses=dict(loss_fgd=dict(
        alpha=1e-3 * CHANNELS, beta=5e-4 * CHANNELS, gamma=5e-4 * CHANNELS, lambda_=5e-6 * SUMS))),
    fgfi=dict(losses=dict(loss_fgfi=dict(loss_weight=0.01 * CHANNELS))),
    frs=dict(losses=dict(loss_frs=dict(loss_weight=0.005 * CHANNELS))),
    gid=dict(losses=dict(loss_gid=dict(feature=5e-3 * CHANNELS))),
    mgd=dict(losses=dict(loss_mgd=dict(loss_weight=4e-7 * SUMS))),
    # Norms before a ReLU; sums of ResNet-50's stages at 800x1333 against ours.
    ofd=dict(losses=dict(loss_ofd=dict(
        at=depthwise, loss_weight=[1.25e-5 * 69, 2.5e-5 * 55, 5e-5 * 62]))),
)
combinations = {
    'pkd+ld': dict(losses=dict(
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0),
        loss_ld=dict(type='LDLoss', at='bbox_head', tau=10.0, bins='mean', normalise=False, valuable_weight=0.25,
                     loss_weight=0.25))),
    'mimic+bckd': dict(losses=dict(
        loss_mimic=dict(type='MimicLoss', at='neck', assign='size', loss_weight=1.0),
        loss_bckd=dict(type='BCKDLoss', at='bbox_head'))),
    'pkd+sigmoid_kd': dict(losses=dict(
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0),
        loss_kd=dict(type='SigmoidKDLoss', at='bbox_head.gfl_cls', reduction='teacher_score', loss_weight=1.0))),
}
rows = {
    ':scratch': dict(
        student='lite_gfl_scratch.py', note='the plain student without the ImageNet weights, for twelve epochs'),
    ':foundation': dict(
        student='lite_gfl_scratch.py', against=':scratch',
        note='that student, and the backbone with ImageNet weights teaches its backbone (PKD at the backbone, all four '
             'levels), for twelve epochs; no teacher that has learned this task. The plain student is what starts from '
             'the same weights',
        hook=dict(
            teacher=dict(type='tools.studies.lite.pretrained', variant='lite0', out_indices=(1, 2, 3, 4),
                         preprocess=dict(mean=[127.5] * 3, std=[127.5] * 3, channels='rgb')),
            teacher_ckpt='own'),
        losses=dict(loss_pkd=dict(
            type='PKDLoss', student_at='backbone', teacher_at='@output', loss_weight=10.0))),
}
left_out = dict(crosskd="the student's features go through the teacher's head, and these necks differ in width")
notes = dict(_delete_=True)
