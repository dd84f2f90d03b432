"""Similarity-preserving distillation."""

from kd_mm.losses.sp import similarity_gap_factored
from recipes.vector import Vector, recipe


@recipe('sp')
def sp(v: Vector) -> None:
    loss = dict(type='SPLoss', samples='image', loss_weight=v.number('loss_weight'))
    outcome = v.run(loss)
    gap = similarity_gap_factored(outcome.student[0].flatten(1), outcome.teacher[0].flatten(1))
    v.check('loss', v.number('loss_weight') * gap)
    v.run(dict(loss, norm='l1', loss_weight=1.0), prefix='variant_torchdistill_l1_')
