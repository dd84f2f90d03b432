"""Masked distillation with receptive tokens."""

from typing import Any

import torch
from torch import nn

from kd_mm.losses.maskd import TokenLearner
from recipes.vector import Vector, identical_loss, recipe

SEGMENTATION = dict(token_weights='mean', student_mask_after=None, eps=1e-5)


def thaw(modules: nn.ModuleDict) -> None:
    """The file has gradients of the tokens, which are frozen in distillation."""
    modules['loss'].finder.requires_grad_(True)


@recipe('maskd')
def maskd(v: Vector) -> None:
    loss = dict(type='MasKDLoss', tokens='random', num_tokens=v.number('num_tokens'),
                loss_weight=v.number('loss_weight'))
    rules = [(r'(\d+)_mask_token', r'loss.finder.levels.\1.tokens')]
    weighted = [*rules, (r'(\d+)_prob_(\d)_(weight|bias)', r'loss.finder.levels.\1.prob.\2.\3')]
    warm = v.number('custom_mask_warmup')
    published = weighted if v.number('weight_mask') else rules
    token_weights = dict() if v.number('weight_mask') else dict(token_weights='mean')
    v.run(dict(loss, student_mask_after=0, **token_weights), rules=published, setup=thaw)
    v.run(dict(loss, student_mask_after=warm, **token_weights), rules=published, setup=thaw, prefix='variant_warmup_')
    v.run(dict(loss, student_mask_after=warm, token_weights='mean'), rules=rules, setup=thaw,
          prefix='variant_no_weight_mask_')
    for level in range(len(v.series('student_'))):
        v.run(dict(loss, loss_weight=0.5, **SEGMENTATION), student=[v.tensor(f'student_{level}')],
              teacher=[v.tensor(f'teacher_{level}')], setup=thaw, prefix=f'variant_seg_{level}_',
              rules=[(rf'{level}_mask_token', 'loss.finder.levels.0.tokens')])


@recipe('maskd_seg')
def maskd_segmentation(v: Vector) -> None:
    v.agree('channels', v.tensor('teacher_0').shape[1])
    loss: Any = dict(type='MasKDLoss', tokens={'levels.0.tokens': v.tensor('param_mask_token')},
                     num_tokens=v.number('num_tokens'), loss_weight=0.5 * v.number('loss_weight'), **SEGMENTATION)
    outcome = v.run(loss)
    v.check('mask', outcome.modules['loss'].finder.levels[0].masks(v.tensor('teacher_0')))
    v.check('loss_identical', identical_loss(v, loss))


@recipe('maskd_seg_mask_learning')
def maskd_token_learning(v: Vector) -> None:
    teacher = v.tensor('teacher_0').requires_grad_()
    v.agree('channels', teacher.shape[1])
    v.agree('num_tokens', len(v.tensor('param_mask_token')))
    learner = TokenLearner(v.number('num_tokens'), weighted=False)
    learner.prepare((teacher, ))
    module: Any = learner.levels[0]
    module.tokens.data = v.tensor('param_mask_token')
    shown, dice = learner(0, teacher)
    grads = torch.autograd.grad(dice, [teacher, module.tokens])
    v.check('mask', module.masks(teacher))
    v.check('masked_output', shown)
    v.check('loss', dice)
    v.check('grad_teacher_0', grads[0])
    v.check('grad_param_mask_token', grads[1])
