"""Overhaul of feature distillation."""

import torch
from torch import nn

from kd_mm.losses.ofd import negative_mean
from recipes.vector import Vector, recipe


@recipe('ofd')
def ofd(v: Vector) -> None:
    margins = dict(enumerate(v.series('margin_')))
    for level, margin in margins.items():
        ours = negative_mean(v.tensor(f'teacher_bn_weight_{level}'), v.tensor(f'teacher_bn_bias_{level}'))
        assert torch.allclose(ours, margin, rtol=1e-6), 'margins (the file rounds them to float32)'

    def setup(modules: nn.ModuleDict) -> None:
        modules['loss'].set_margins(margins)

    weight, last = v.number('feat_loss_weight'), len(margins) - 1
    outcome = v.run(dict(type='OFDLoss', loss_weight=[weight * 2.0**(level - last) for level in margins]),
                    adapter=v.connector('connector'), setup=setup,
                    rules=[(r'connector_(\d)_conv_weight', r'adapter.convs.\1.weight'),
                           (r'connector_(\d)_bn_(\w+)', r'adapter.norms.\1.\2')])
    for level, term in enumerate(outcome.levels):
        v.check(f'loss_{level}', term)
        v.check(f'variant_mmrazor_{level}_loss', term / 1000)
