"""Relational knowledge distillation."""

import torch

from recipes.vector import Vector, recipe


@recipe('rkd')
def rkd(v: Vector) -> None:
    v.only('squared', False)
    v.only('eps', 1e-12)
    weights = {name: v.number(f'{name}_weight') for name in ('distance', 'angle')}
    loss = dict(type='RKDLoss', beta=v.number('smooth_l1_beta'), **{f'{k}_weight': w for k, w in weights.items()})
    rows = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    maps = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    outcome = v.run(loss, **rows)
    for name, term in outcome.modules['loss'].terms(outcome.student[0], outcome.teacher[0]).items():
        v.check(f'loss_{name}', term)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))  # an input of the variants only
    for name in weights:
        alone = dict(loss, **{f'{other}_weight': float(other == name) for other in weights})
        v.run(alone, prefix=f'variant_mmrazor_{name}_', **rows)
        prefix = f'variant_mmrazor_{name}_l2norm_'
        v.run(dict(alone, normalize=True, samples='image'), prefix=prefix, grads=['grad_student_1'], **maps)
        v.check(f'{prefix}grad_student_0', torch.zeros_like(v.tensor('student_0')))
