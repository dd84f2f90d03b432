"""Neuron selectivity transfer."""

from golden.vector import Vector, identical_loss, recipe
from kd_mm.losses.nst import selectivity


@recipe('nst')
def nst(v: Vector) -> None:
    degree, offset = (float(part.split('=')[1]) for part in v.number('kernel').split()[1:])
    weight = v.number('loss_weight')
    loss = dict(type='NSTLoss', degree=int(degree), offset=offset, loss_weight=weight)
    outcome = v.run(loss)
    # With degree 2 the mean over pairs of channels is also the squared distance of the products over pairs of cells.
    s, t = selectivity(outcome.student[0]), selectivity(outcome.teacher[0])
    gap = t.transpose(1, 2) @ t / t.shape[1] - s.transpose(1, 2) @ s / s.shape[1]
    v.check('loss', weight * gap.square().sum(dim=(1, 2)).mean())
    assert abs(float(identical_loss(v, loss)) - v.meta['identity_check']['loss(student==teacher)']) < 1e-15
