"""Decoupled features: the neck terms, and the two class terms on RoIs."""

import torch

from kd_mm.losses.defeat import decoupled_divergence
from kd_mm.regions.level_box import LevelBoxRegion
from recipes.vector import Vector, recipe


@recipe('defeat')
def defeat(v: Vector) -> None:
    student, teacher, levels = v.series('student_'), v.series('teacher_'), v.number('num_levels')
    foreground = LevelBoxRegion(strides=v.number('strides'))
    outcome = v.run(
        dict(type='DeFeatLoss', fg=v.number('hint_neck_w'), bg=v.number('hint_neck_back_w'), foreground=foreground),
        student=student[:levels], teacher=teacher[:levels],
        adapter=v.connector('adapter'),
        rules=[(r'adapter_(\d)_(\w+)', r'adapter.convs.\1.\2')], prefix='neck_')
    method, adapter = outcome.modules['loss'], outcome.modules['adapter']
    for level, mask in enumerate(foreground(tuple(teacher[:levels]), v.batch())):
        v.check(f'mask_{level}', mask[:, 0])

    adapted = adapter(tuple(outcome.student), tuple(outcome.teacher))
    terms = method.terms(*adapted, v.batch(), [None] * levels)
    logits = student[levels].requires_grad_()
    rows = decoupled_divergence(logits, teacher[levels], v.tensor('labels'), tau=v.number('head_cls_T'))
    weighted = {'neck': v.number('hint_neck_w') * terms['fg'], 'neck_back': v.number('hint_neck_back_w') * terms['bg'],
                'hcls': v.number('head_cls_w') * rows['fg'], 'hcls_back': v.number('head_cls_back_w') * rows['bg']}
    for name, term in weighted.items():
        v.check(f'loss_{name}', term)
    total = torch.stack(list(weighted.values())).sum()
    v.check('loss', total)
    total.backward()
    for index, tensor in enumerate([*outcome.student, logits]):
        v.check(f'grad_student_{index}', tensor.grad)
    for name, parameter in adapter.named_parameters():
        _, index, part = name.split('.')
        v.check(f'gradnorm_param_adapter_{index}_{part}', parameter.grad.norm())
