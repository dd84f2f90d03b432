"""One rank of a loop without a Runner: ``python own_loop_worker.py OUT RANKS``; saves the student and the extras."""

import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kd_mm import Distiller


class WithLosses(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.net(inputs)
        return dict(loss=F.cross_entropy(outputs, data_samples)) if mode == 'loss' else outputs


def main(out, ranks):
    rank = int(os.environ.get('RANK', 0))
    if ranks > 1:
        dist.init_process_group('gloo')
    torch.manual_seed(0)
    student, teacher = WithLosses(4), WithLosses(6)
    torch.manual_seed(rank)  # adapters are drawn from the distiller's own seed, and made equal
    distiller = Distiller(student, teacher.net, dict(
        loss_hint=dict(type='FitNetLoss', student_at='net.0', teacher_at='0', loss_weight=1.0)), max_steps=3)
    model = student
    if ranks > 1:
        model = DistributedDataParallel(student)
        distiller.follow(model)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    model.train()
    distiller.attach()
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        pictures = torch.randn(4, 3, 8, 8, generator=generator)
        labels = torch.randint(2, (4, 8, 8), generator=generator)
        share = slice(rank, None, ranks)
        distiller.step = step
        losses = model(pictures[share], labels[share], mode='loss')
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        optimizer.step()
        distiller.after_step()
    distiller.detach()
    torch.save(dict(student=student.state_dict(), extras=distiller.trainable_modules().state_dict()),
               f'{out}_rank{rank}.pth')
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
