"""DSI: the cosine of each cell, and the change of its weight by a share of the gradient (GAM)."""

import numpy as np
import torch

from kd_mm.ops.modulation import GradientShareSchedule, modulated_weight
from recipes.vector import Vector, recipe

LINEAR = ('one linear layer with bias (= 1x1 conv), no activation, no norm', 'one linear layer with bias',
          'one linear layer with bias (its own, not that of relation_kl)')
RULES = [(r'projector_(\w+)', r'adapter.convs.0.\1')]


@recipe('dsi', 'dsi_*')
def dsi(v: Vector) -> None:
    v.only('projector', *LINEAR)
    v.only('resize', 'teacher to student size, bilinear, align_corners False, no antialias')
    v.ignore('guards against vectors of length 0, which here have the cosine 0', 'normalize_eps', 'cosine_eps')
    v.as_maps('param_projector_weight', 'grad_param_projector_weight')
    weight = v.number('loss_weight')
    outcome = v.run(dict(type='DSILoss', loss_weight=weight), adapter=dict(type='ConvAdapter', always=True),
                    rules=RULES)
    v.check('loss_cosine', outcome.levels[0])


@recipe('gam')
def gam(v: Vector) -> None:
    """A table of weights before and after an epoch: there is no loss, and no gradient."""
    for name, value in (('zero_share', 1e-6), ('min_weight', 1e-6), ('min_denominator', 1e-9)):
        v.only(name, value)
    v.ignore('of which the rows are made', 'sets_rho_delta_default')
    v.ignore('what the authors have released, for the docstring', 'released')
    rows = [v.tensor(f'gam_{name}').tolist() for name in (
        'weight_before', 'share', 'rho', 'delta', 'default_weight', 'final_phase')]
    low, high = v.number('ratio_min'), v.number('ratio_max')
    found = []
    for before, share, target, band, default, final in zip(*rows):
        found.append(modulated_weight(before, share, target, band, default, final=bool(final), low=low, high=high))
        weight = GradientShareSchedule('encoder', target, band, before, default, low=low, high=high,
                                       final=0 if final else None)
        weight.observe(torch.tensor(share, dtype=torch.float64))
        weight.update()
        assert weight(0) == found[-1]
    v.check('generated_weight_after', found)
    v.check('loss', np.sum(found))
