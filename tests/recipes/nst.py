"""Neuron selectivity transfer."""

from kd_mm.losses.nst import selectivity
from kd_mm.ops.functional import average_to
from recipes.vector import Vector, identity_check, recipe


@recipe('nst')
def nst(v: Vector) -> None:
    degree, offset = (float(part) for part in v.words('kernel', r'polynomial d=(\S+) c=(\S+)'))
    weight = v.number('loss_weight')
    loss = dict(type='NSTLoss', degree=int(degree), offset=offset, loss_weight=weight)
    outcome = v.run(loss)
    student, teacher = outcome.student[0], outcome.teacher[0]
    if (degree, offset) == (2, 0) and len(outcome.student) == 1:
        # The mean over pairs of channels is then also the squared distance of the products over pairs of cells.
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        s, t = (selectivity(average_to(side, size)) for side in (student, teacher))
        gap = t.transpose(1, 2) @ t / t.shape[1] - s.transpose(1, 2) @ s / s.shape[1]
        v.check('loss', weight * gap.square().sum(dim=(1, 2)).mean())
    identity_check(v, loss)
