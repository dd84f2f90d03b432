"""What the losses share."""

from kd_mm.losses.base.loss import (
    Adversarial,
    KDLoss,
    PicksInstances,
    Pretrained,
    ReadsModules,
    as_features,
    labelled,
    opponents_of,
    total,
    weighted_sum,
)

__all__ = ['Adversarial', 'KDLoss', 'PicksInstances', 'Pretrained', 'ReadsModules', 'as_features', 'labelled',
           'opponents_of', 'total', 'weighted_sum']
