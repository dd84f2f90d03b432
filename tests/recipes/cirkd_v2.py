"""Channel relations, and the graph block, of CIRKD's second version."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.adapters.base import Adapter
from kd_mm.adapters.graph import GraphBlock
from kd_mm.types.batch import Features
from recipes.vector import Vector, recipe


def by_four(features: Tensor) -> Tensor:
    return F.avg_pool2d(features, 4, 4, ceil_mode=True)


class PoolByFour(Adapter):
    """Both sides averaged over windows of 4x4 cells, those at the end cut short."""

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        return tuple(map(by_four, student)), tuple(map(by_four, teacher))


@recipe('cirkdv2_channel')
def cirkdv2_channel(v: Vector) -> None:
    grid = tuple(-(-size // 4) for size in v.tensor('student_0').shape[2:])
    loss = dict(
        type='CIRKDChannelLoss', grid=grid, tau=v.number('contrast_temperature'),
        kd_tau=v.number('contrast_kd_temperature'), memory=v.number('channel_memory_size'),
        keys=v.number('channel_contrast_size'),
        # More are asked for than there are channels.
        channels_per_step=min(v.number('channel_update_freq'), v.number('channel_memory_size')),
        minibatch_weight=v.number('lambda_minibatch_channel'), memory_weight=v.number('lambda_memory_channel'),
        mse_weight=v.number('lambda_channel_kd'))
    v.agree('channel_contrast_size', len(v.tensor('contrast_index')))

    def setup(modules: nn.ModuleDict) -> None:
        method = modules['loss']
        method.queues[0].vectors.copy_(v.tensor('queue_before')[None])
        method.queues[0].pointer.copy_(v.tensor('ptr_before'))
        method.fixed_rows, method.fixed_slots = [v.tensor('enqueue_perm')], [v.tensor('contrast_index')]

    # The published pool has windows of 4 cells, ours a number of them: the same where 4 divides the size.
    even = not any(size % 4 for size in v.tensor('student_0').shape[2:])
    pool = None if even else PoolByFour()
    outcome = v.run(loss, setup=setup, adapter=pool, rules=[
        (r'project_([03])_weight', r'loss.projections.0.\1.weight'),
        (r'project_bn_(weight|bias)', r'loss.projections.0.1.\1')])
    method = outcome.modules['loss']
    v.check('queue_after', method.queues[0].vectors[0])
    v.check('ptr_after', method.queues[0].pointer)
    pair = [outcome.student[0], outcome.teacher[0]]
    terms = method.terms(0, *(pair if pool is None else map(by_four, pair)), v.batch())
    for ours, theirs in (('minibatch', 'minibatch_channel'), ('memory', 'memory_channel'), ('mse', 'channel_mse')):
        v.check(f'loss_{theirs}', terms[ours])


@recipe('cirkdv2_gcn')
def cirkdv2_gcn(v: Vector) -> None:
    v.agree('plane', v.tensor('student_0').shape[1])
    block = GraphBlock(v.number('plane'), dtype=torch.float64)
    names = {'node_q.weight': block.query.weight, 'node_k.weight': block.key.weight,
             'node_v.weight': block.value.weight, 'conv1.0.weight': block.spread[0].weight,
             'conv1.1.weight': block.spread[1].weight, 'conv1.1.bias': block.spread[1].bias,
             'out_conv.0.weight': block.fuse[0].weight, 'out_conv.1.weight': block.fuse[1].weight,
             'out_conv.1.bias': block.fuse[1].bias}
    for name, parameter in names.items():
        assert isinstance(parameter, nn.Parameter)
        parameter.data = v.tensor(f'param_{name}')
    student = v.tensor('student_0').requires_grad_()
    output = block(student)
    total = (output * v.tensor('cotangent')).sum()
    v.check('output', output)
    v.check('loss', total)
    v.check('grad_student_0', torch.autograd.grad(total, student)[0])
