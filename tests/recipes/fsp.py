"""Flow of the solution procedure."""

from recipes.vector import Vector, recipe


@recipe('fsp')
def fsp(v: Vector) -> None:
    v.run(dict(type='FSPLoss', distance='column_norm', loss_weight=v.number('weight')))
