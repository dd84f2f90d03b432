"""Attention transfer."""

import torch

from recipes.vector import Vector, identical_loss, recipe


@recipe('at')
def at(v: Vector) -> None:
    loss = dict(type='ATLoss', p=v.number('p'), loss_weight=v.number('loss_weight'))
    first = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    second = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    v.run(loss, **first)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))  # an input of the variants only
    v.run(dict(loss, loss_weight=1.0), prefix='variant_cirkd_', **first)
    v.run(dict(loss, p=v.number('mdistiller_p'), loss_weight=1.0), prefix='variant_mdistiller_resize_',
          grads=['grad_student_1'], **second)
    v.check('variant_mdistiller_resize_grad_student_0', torch.zeros_like(v.tensor('student_0')))
    v.run(dict(loss, reduction='norm', loss_weight=1.0), prefix='variant_torchdistill_paper_', **first)
    v.check('variant_torchdistill_paper_grad_student_1', torch.zeros_like(v.tensor('student_1')))


@recipe('at_cirkd', 'at_mmrazor')
def at_segmentation(v: Vector) -> None:
    loss = dict(type='ATLoss', p=v.number('p'), loss_weight=v.number('loss_weight'))
    v.run(loss)
    v.check('loss_identical', identical_loss(v, loss))
