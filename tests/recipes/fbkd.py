"""Feature-based distillation for detectors."""

import torch
from torch import nn

from recipes.vector import Vector, recipe

RULES = [(r'student_channel_wise_adaptation_(\w+)', r'loss.adapters.0.channel.\1'),
         (r'student_spatial_wise_adaptation_(\w+)', r'loss.adapters.0.spatial.\1'),
         (r'student_adaptation_layers_(\w+)', r'loss.adapters.0.feature.\1'),
         (r'student_non_local_adaptation_(\w+)', r'loss.adapters.0.nonlocal_.\1'),
         (r'(s|t)\w+_non_local_(g|theta|phi)_conv_(\w+)', r'loss.adapters.0.block_\1.\2.\3'),
         (r'(s|t)\w+_non_local_conv_out_conv_(\w+)', r'loss.adapters.0.block_\1.conv.\2'),
         (r'(s|t)\w+_non_local_conv_out_bn_(\w+)', r'loss.adapters.0.block_\1.norm.\2')]


def evaluation_norm(modules: nn.ModuleDict) -> None:
    """Batch norms with running statistics of mean 0 and variance 1, in evaluation mode."""
    for module in modules.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.zeros_like(module.weight)
            module.running_var = torch.ones_like(module.weight)
            module.eval()


@recipe('fbkd')
def fbkd(v: Vector) -> None:
    v.only('mode', 'dot_product')
    v.only('norm', 'BN on conv_out of the non-local block, TRAIN mode (batch statistics)')
    v.ignore('temperature of the channel attention, which the published code computes and does not use', 'channel_T')
    # g and phi are pooled by 2 and then by the stride, or not at all.
    pool = 2 * v.number('maxpool_stride', default=1) if v.number('sub_sample') else 1
    v.ignore('edge of a pooling that is switched off', *(() if v.number('sub_sample') else ('maxpool_stride', )))
    loss = dict(type='FBKDLoss', feature=v.number('mask_l2_weight'), channel=v.number('channel_weight'),
                spatial=v.number('spatial_weight'), nonlocal_=v.number('nonlocal_weight'), tau=v.number('spatial_T'),
                reduction=v.number('reduction'), pool=pool,
                loss_weight=v.number('loss_weight'))
    outcome = v.run(loss, rules=RULES)
    terms = outcome.modules['loss'].terms(0, outcome.student[0], outcome.teacher[0])
    for name, ours in (('feat', 'feature'), ('channel', 'channel'), ('spatial', 'spatial'), ('nonlocal', 'nonlocal')):
        v.check(f'loss_{name}', terms[ours])
    v.run(loss, rules=RULES, setup=evaluation_norm, prefix='variant_eval_bn_')
