"""Queue KL, as published: the queue gets the batch before the loss, and rows that were never filled are zeros."""

from torch import nn

from recipes.dsi import LINEAR, RULES
from recipes.vector import Vector, recipe


@recipe('queue_kl')
def queue_kl(v: Vector) -> None:
    v.only('projector', *LINEAR)
    v.ignore('a guard against vectors of length 0', 'normalize_eps')
    v.ignore('says what the defaults are', 'released')
    v.as_maps('student_0', 'teacher_0', 'grad_student_0', 'param_projector_weight', 'grad_param_projector_weight')
    queue = v.tensor('queue_before')
    v.agree('queue_size', len(queue))

    def fill(modules: nn.ModuleDict) -> None:
        modules['loss'].queues[0].rows.copy_(queue)

    loss = dict(type='QueueKLLoss', size=len(queue), tau=v.number('temperature'), update='before', empty='zero',
                loss_weight=v.number('loss_weight'))
    outcome = v.run(loss, adapter=dict(type='ConvAdapter', always=True), rules=RULES, setup=fill)
    v.check('generated_queue', outcome.modules['loss'].queues[0].rows)
