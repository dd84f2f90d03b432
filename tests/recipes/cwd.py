"""Channel-wise distillation."""

from typing import Any, Dict

from recipes.vector import Vector, identical_loss, recipe


@recipe('cwd')
def cwd(v: Vector) -> None:
    tau = v.number('tau')
    outcome = v.run(dict(type='CWDLoss', tau=tau, loss_weight=v.number('loss_weight')))
    v.agree('num_levels', len(outcome.levels))
    for level, term in enumerate(outcome.levels):
        v.check(f'variant_torchdistiller_{level}_loss', term)
    if 'student_cirkd' not in v:
        return
    student, teacher = v.tensor('student_cirkd'), v.tensor('teacher_cirkd')
    bridged = dict(student=[student], teacher=[teacher], adapter=dict(type='ConvAdapter', bias=False),
                   rules=[('cirkd_adapter_weight', 'adapter.convs.0.weight')])
    v.run(dict(type='CWDLoss', tau=tau, loss_weight=1.0, divisor='student', student_channels=student.shape[1]),
          prefix='variant_cirkd_adapter_', **bridged)
    v.run(dict(type='CWDLoss', tau=tau, loss_weight=1.0), prefix='variant_cirkd_adapter_fixed_', **bridged)


@recipe('cwd_norm')
def cwd_norm(v: Vector) -> None:
    eps, = v.words('norm', r'BN affine=False track_running_stats=False eps (\S+)')
    v.only('student_adapter', '1x1 conv with bias, no norm, no activation')
    v.run(dict(type='CWDLoss', tau=v.number('tau'), loss_weight=v.number('loss_weight')),
          adapter=dict(type='NormAdapter', eps=float(eps)),
          rules=[(r'adapter_(\d+)_conv_(weight|bias)', r'adapter.convs.\1.\2')])


@recipe('cwd_cirkd*', 'cwd_mmrazor*', 'cwd_mmseg_distiller*', 'cwd_torchdistiller*')
def cwd_segmentation(v: Vector) -> None:
    loss = dict(type='CWDLoss', tau=v.number('temperature', 'tau'),
                loss_weight=v.number('loss_weight', 'weight', default=1.0))
    v.only('norm_type', 'channel')
    v.only('divergence', 'kl')
    if 'mmseg_distiller' in v.report.name:
        loss['divergence'] = 'cross_entropy'
    if 'cirkd' in v.report.name or 'mmseg_distiller' in v.report.name:
        loss.update(divisor='student', student_channels=v.tensor('student_0').shape[1])
    bridged: Dict[str, Any] = {}
    if 'param_align_weight' in v:
        bridged = dict(adapter=dict(type='ConvAdapter', bias='param_align_bias' in v),
                       rules=[(r'align_(weight|bias)', r'adapter.convs.0.\1')])
    v.run(loss, **bridged)
    if 'loss_identical' in v:
        v.check('loss_identical', identical_loss(v, loss))
