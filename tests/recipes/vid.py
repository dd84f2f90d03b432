"""Variational information distillation."""

from recipes.vector import Vector, recipe


@recipe('vid')
def vid(v: Vector) -> None:
    v.run(dict(type='VIDLoss', init_variance=v.number('init_pred_var'), eps=v.number('eps'),
               loss_weight=v.number('loss_weight')),
          rules=[(r'regressor_(\d)_weight', r'loss.regressors.0.\1.weight'), ('log_scale', 'loss.log_scales.0')])
