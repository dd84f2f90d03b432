"""CanKD: with and without an adapter of the student."""

from torch import nn

from recipes.fbkd import evaluation_norm
from recipes.vector import Vector, recipe

RULES = [(r'(\d+)_(theta|phi|g)_(\w+)', r'loss.blocks.\1.\2.\3'), (r'(\d+)_W_(\w+)', r'loss.blocks.\1.conv.\2'),
         (r'(\d+)_bn_(\w+)', r'loss.blocks.\1.norm.\2'), (r'(\d+)_align_(\w+)', r'adapter.convs.\1.\2')]


def first_norm(modules: nn.ModuleDict) -> None:
    """Batch norms as the block starts: at 0."""
    for module in modules.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@recipe('cankd', 'cankd_*')
def cankd(v: Vector) -> None:
    v.only('pool', 'max 2x2 stride 2, floor')
    v.only('bn_layer', True)
    v.only('attention', 'dot product / number of key positions, no softmax')
    v.agree('in_channels', v.tensor('teacher_0').shape[1])
    v.agree('num_levels', len(v.series('student_')))
    adapter = None
    if v.number('adapter') != 'none':
        v.only('adapter', '1x1 conv with bias, one per level')
        adapter = dict(type='ConvAdapter', always=True)
    loss = dict(type='CanKDLoss', inner_channels=v.number('inter_channels'), sub_sample=v.number('sub_sample'),
                eps=v.number('instance_norm_eps'), norm_eps=v.number('bn_eps'),
                loss_weight=v.number('loss_weight'))
    v.run(loss, adapter=adapter, rules=RULES)
    v.run(loss, adapter=adapter, rules=RULES, setup=first_norm, prefix='variant_zero_init_')
    v.run(loss, adapter=adapter, rules=RULES, setup=evaluation_norm, prefix='variant_eval_')
