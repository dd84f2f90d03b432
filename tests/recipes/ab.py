"""Activation boundaries."""

from recipes.vector import Vector, recipe


@recipe('ab')
def ab(v: Vector) -> None:
    loss = dict(type='ABLoss', margin=v.number('margin'), reduction='batch_mean')
    weight = v.number('loss_weight')
    v.run(dict(loss, loss_weight=weight * 3 / 1000))  # the factor that mmrazor has in its code
    v.run(dict(loss, loss_weight=weight), prefix='variant_torchdistill_')
