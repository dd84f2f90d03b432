"""One rank of the two-process test of the gathered relations."""

import sys

import torch
import torch.distributed as dist

from kd_mm.ops import distributed
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def make(ranks=2):
    """Features and labels of two images a rank."""
    draw = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2 * ranks, width, 4, 6, generator=draw, dtype=torch.float64) for width in (3, 5))
    return student, teacher, torch.randint(0, 3, (2 * ranks, 4, 6), generator=draw)


def main(out):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    own = slice(2 * rank, 2 * rank + 2)
    student, teacher, labels = (part[own] for part in make())
    leaf = student.clone().requires_grad_()
    mini = build(dict(type='CIRKDMiniBatchLoss', gather=True))(leaf, teacher)
    mini.backward()
    memory = build(dict(type='CIRKDMemoryLoss', num_classes=3, pixel_memory=40, region_memory=9, pixel_keys=7,
                        region_keys=4, pixels_per_image=4))
    memory.prepare((student, ), (teacher, ))
    distributed.broadcast(memory)
    for step in range(2):
        memory(student, teacher, KDBatch(seg_map=labels, step=step))
    queue = build(dict(type='QueueKLLoss', size=9))
    histogram = build(dict(type='PLOPPseudoLabelLoss', size='logits'))
    running = build(dict(type='RunningStandardiseAdapter'))
    for step in range(2):
        queue(teacher[:1 + rank], teacher[:1 + rank], KDBatch(step=step))  # as many images as the rank has
        histogram(torch.zeros_like(teacher), teacher, KDBatch(seg_map=labels * 0, step=step))
        running((student, ), (teacher, ))
    states = {name: dict(module.state_dict()) for name, module in (
        ('queue', queue), ('histogram', histogram), ('running', running.statistics))}
    try:
        distributed.gather(torch.zeros(1 + rank, 3))
        message = ''
    except ValueError as error:
        message = str(error)
    # Of three parameters one has a gradient on both ranks, one on the second alone, one on none.
    parameters = [torch.zeros(size, requires_grad=True) for size in (2, 3, 1)]
    for parameter in parameters[:1 + rank]:
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
    distributed.average_gradients(parameters)
    torch.save(dict(loss=mini.detach(), grad=leaf.grad, queues=memory.queues.state_dict(), message=message,
                    states=states, averaged=[parameter.grad for parameter in parameters]),
               f'{out}_rank{rank}.pth')
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
