"""FitNet."""

import torch

from recipes.vector import Vector, recipe


@recipe('fitnet')
def fitnet(v: Vector) -> None:
    first = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    v.run(dict(type='FitNetLoss', loss_weight=1.0), rules=[(r'adapter_(\d+)_weight', r'adapter.convs.\1.weight')],
          adapter=v.connector('adapter'), **first)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))
    second = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    variants = {
        'l2_normalize': dict(normalize=True, mult=v.number('mult'), reduction='batch_mean'),
        'l2_sum_n': dict(reduction='batch_mean'),
        'l2_div_element': dict(reduction='mean'),
        'l2_dist': dict(reduction='norm'),
        'l1_mean': dict(distance='l1', reduction='mean'),
        'l1_sum': dict(distance='l1', reduction='sum'),
    }
    for name, options in variants.items():
        loss = dict(type='FitNetLoss', loss_weight=v.number('loss_weight_mmrazor'), **options)
        v.run(loss, prefix=f'variant_{name}_', grads=['grad_student_1'], **second)
        v.check(f'variant_{name}_grad_student_0', torch.zeros_like(v.tensor('student_0')))


@recipe('fitnet_cirkd')
def fitnet_cirkd(v: Vector) -> None:
    v.run(dict(type='FitNetLoss', loss_weight=v.number('loss_weight', default=1.0)),
          adapter=dict(type='ConvAdapter', bias=False, always=True),
          rules=[('align_weight', 'adapter.convs.0.weight')])
