"""Probabilistic knowledge transfer."""

import torch

from golden.vector import Vector, identical_loss, recipe


@recipe('pkt')
def pkt(v: Vector) -> None:
    loss = dict(type='PKTLoss', eps=v.number('eps'), loss_weight=v.number('loss_weight'))
    v.run(loss)
    # The order of the samples does not matter.
    order = torch.arange(v.tensor('student_0').shape[0]).flip(0)
    v.run(loss, student=[v.tensor('student_0')[order]], teacher=[v.tensor('teacher_0')[order]], grads=['no such'])
    assert abs(float(identical_loss(v, loss)) - v.meta['identity_check']['loss(student==teacher)']) < 1e-15
