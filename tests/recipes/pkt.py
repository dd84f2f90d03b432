"""Probabilistic knowledge transfer."""

import torch

from recipes.vector import Vector, identity_check, recipe


@recipe('pkt')
def pkt(v: Vector) -> None:
    loss = dict(type='PKTLoss', eps=v.number('eps'), loss_weight=v.number('loss_weight'))
    v.run(loss)
    # The order of the samples does not matter.
    order = torch.arange(v.tensor('student_0').shape[0]).flip(0)
    v.run(loss, student=[v.tensor('student_0')[order]], teacher=[v.tensor('teacher_0')[order]], grads=['no such'])
    identity_check(v, loss)
