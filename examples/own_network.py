#!/usr/bin/env python3
"""Networks that know nothing of losses, such as those of torchvision or timm, in a plain PyTorch loop.

    python examples/own_network.py

Their forward takes pictures and returns outputs.  The student is put into a module that also computes its losses; the
teacher stays as it is.  Features are compared before the last pooling, and the class scores.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from kd_mm import Distiller


class Network(nn.Module):
    """As a classifier of torchvision: pictures (N, 3, H, W) to class scores (N, classes)."""

    def __init__(self, width, classes=4):
        super().__init__()
        self.layer1 = self._layer(3, width)
        self.layer2 = self._layer(width, 2 * width)
        self.fc = nn.Linear(2 * width, classes)

    @staticmethod
    def _layer(before, behind):
        return nn.Sequential(nn.Conv2d(before, behind, 3, stride=2, padding=1), nn.BatchNorm2d(behind), nn.ReLU())

    def forward(self, pictures):
        return self.fc(self.layer2(self.layer1(pictures)).mean((2, 3)))


class WithLosses(nn.Module):
    """A network with the forward that a distiller needs: ``mode='loss'`` returns a dict of losses."""

    def __init__(self, net, criterion):
        super().__init__()
        self.net, self.criterion = net, criterion

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.net(inputs)
        return dict(loss=self.criterion(outputs, data_samples)) if mode == 'loss' else outputs


def batches(steps, generator):
    """Pictures (8, 3, 32, 32) with one bright quarter each, and which."""
    for _ in range(steps):
        labels = torch.randint(4, (8, ), generator=generator)
        pictures = 0.5 * torch.randn(8, 3, 32, 32, generator=generator)
        for picture, label in zip(pictures, labels.tolist()):
            row, column = 16 * (label // 2), 16 * (label % 2)
            picture[:, row:row + 16, column:column + 16] += 1
        yield pictures, labels


def distil(net, teacher, steps, seed=0):
    """Train a network from a teacher; returns the numbers of the last step."""
    student = WithLosses(net, F.cross_entropy)
    distiller = Distiller(student, teacher, dict(
        # The paths of the student begin with `net.`, those of the teacher do not.
        loss_feature=dict(type='PKDLoss', student_at='net.layer2', teacher_at='layer2', loss_weight=1.0),
        loss_logit=dict(type='SoftmaxKDLoss', student_at='net.fc', teacher_at='fc', tau=2.0)),
        max_steps=steps, agreement=50)
    # The distiller has parameters of its own: where the widths differ, a 1x1 convolution makes them equal.
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05, momentum=0.9)
    student.train()
    distiller.attach()
    for step, (pictures, labels) in enumerate(batches(steps, torch.Generator().manual_seed(seed))):
        distiller.step = step  # schedules go by it
        losses = student(pictures, labels, mode='loss')
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        optimizer.step()
        numbers = {**losses, **distiller.after_step()}
    distiller.raise_if_not_finite()
    distiller.detach()  # net is what it was: no hook, no key, no flag
    return {name: float(value.detach()) for name, value in numbers.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=60)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    teacher, net = Network(16), Network(4)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for pictures, labels in batches(steps, torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        F.cross_entropy(teacher(pictures), labels).backward()
        optimizer.step()
    numbers = distil(net, teacher, steps)
    print(', '.join(f'{name} {value:.3f}' for name, value in numbers.items()))
    torch.save(net.state_dict(), 'student.pth')
    return net, numbers


if __name__ == '__main__':
    main()
