"""Frequency distillation."""

import torch

from kd_mm.losses.freekd import haar_bands
from kd_mm.registry import build
from recipes.vector import Vector, recipe


@recipe('freekd')
def freekd(v: Vector) -> None:
    v.only('wave', 'haar')
    v.only('mode', 'zero')
    depth = v.number('J')
    student, teacher = v.series('student_'), v.series('teacher_')
    tokens = [v.tensor(f'param_{level}_mask_token') for level in range(len(student))]
    v.agree('num_tokens', tokens[0].shape[1])
    config = dict(type='FreeKDLoss', depth=depth, tokens=tokens, loss_weight=v.number('loss_weight'))
    v.run(config)
    for level, features in enumerate(teacher):
        for index, band in enumerate(haar_bands(features, depth)):
            v.check(f'dwt_{level}_yh_{index}', band)
    # Tokens are frozen in the loss; their gradient is compared all the same.
    loss = build(config)
    loss.prepare(tuple(student), tuple(teacher))
    leaves = [tokens.requires_grad_() for tokens in loss.prompts.tokens]
    for level, grad in enumerate(torch.autograd.grad(loss(student, teacher), leaves)):
        v.check(f'gradnorm_param_{level}_mask_token', grad.norm())
