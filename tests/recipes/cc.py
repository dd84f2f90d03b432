"""Correlation congruence."""

from recipes.vector import Vector, recipe


@recipe('cc')
def cc(v: Vector) -> None:
    loss = dict(type='CCLoss', gamma=v.number('gamma'), order=v.number('max_p'), normalize=False, distance='norm',
                loss_weight=v.number('loss_weight', default=1.0))
    v.only('kernel', 'gaussian RBF Taylor')
    v.only('reduction', 'batchmean')
    v.run(loss)
    v.run(dict(loss, kernel='bilinear'), prefix='variant_bilinear_')
