"""Flow of the solution procedure."""

from golden.vector import Vector, recipe


@recipe('fsp')
def fsp(v: Vector) -> None:
    v.run(dict(type='FSPLoss', distance='column_norm', loss_weight=v.number('weight')))
