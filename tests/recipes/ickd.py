"""Inter-channel correlation."""

from recipes.vector import Vector, recipe


@recipe('ickd')
def ickd(v: Vector) -> None:
    v.run(dict(type='ICKDLoss', loss_weight=v.number('loss_weight')),
          adapter=dict(type='ConvAdapter', bias=False, norm=True, always=True),
          rules=[('conv_weight', 'adapter.convs.0.weight'), ('bn_(weight|bias)', r'adapter.norms.0.\1')])
