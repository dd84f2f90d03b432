#!/usr/bin/env python3
"""A Distiller in a plain PyTorch loop: networks of your own, no Runner and no host.

    python examples/plain_loop.py

A network can be distilled if its forward takes ``mode='loss'`` and then returns a dict of losses, as the models of
mmdet and mmseg do.  A wide one learns to tell discs from squares, pixel by pixel; a narrow one is then trained twice,
by itself and with the wide one as its teacher.
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn import functional as F

from kd_mm import Distiller

CLASSES = ('background', 'disc', 'square')


class Segmenter(nn.Module):
    """Four convolutions, the class scores at a quarter of the size."""

    def __init__(self, width):
        super().__init__()
        widths = (3, width, width, width)
        self.backbone = nn.Sequential(*[layer for index in range(3) for layer in (
            nn.Conv2d(widths[index], widths[index + 1], 3, stride=2 if index < 2 else 1, padding=1),
            nn.BatchNorm2d(width), nn.ReLU())])
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.head(self.backbone(inputs))
        if mode != 'loss':
            return logits
        logits = F.interpolate(logits, size=data_samples.shape[-2:], mode='bilinear', align_corners=False)
        return dict(loss_ce=F.cross_entropy(logits, data_samples))


def pictures(count, generator, side=48):
    """Noisy pictures (N, 3, side, side) of one disc and one square each, and their classes (N, side, side)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    centres = torch.randint(10, side - 10, (count, 2, 2, 1, 1), generator=generator)
    gaps = torch.stack([rows - centres[:, :, 0], columns - centres[:, :, 1]]).float()
    labels = torch.zeros(count, side, side, dtype=torch.long)
    labels[gaps[:, :, 0].norm(dim=0) < 8] = 1
    labels[gaps[:, :, 1].abs().amax(dim=0) < 7] = 2
    bright = (labels > 0).float()[:, None].expand(-1, 3, -1, -1)
    return bright + 0.7 * torch.randn(count, 3, side, side, generator=generator), labels


def train(model, steps, teacher=None, seed=0):
    """Train a network, with a teacher or without; returns the last losses."""
    generator = torch.Generator().manual_seed(seed)
    distiller = teacher and Distiller(model, teacher, dict(
        loss_feature=dict(type='PKDLoss', at='backbone', loss_weight=1.0),
        loss_logit=dict(type='SoftmaxKDLoss', at='head', tau=2.0, loss_weight=1.0)), classes=CLASSES, max_steps=steps)
    # The distiller has parameters of its own: where the widths differ, a 1x1 convolution makes them equal.
    extras = list(distiller.parameters()) if distiller else []
    optimizer = torch.optim.SGD([*model.parameters(), *extras], lr=0.05, momentum=0.9)
    model.train()
    if distiller:
        distiller.attach()
    for step in range(steps):
        inputs, labels = pictures(8, generator)
        if distiller:
            distiller.step = step  # schedules and random masks go by it
        losses = model(inputs, labels, mode='loss')  # with a distiller: its terms too, and numbers for the log
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        optimizer.step()
        if distiller:
            distiller.after_step()
    if distiller:
        distiller.raise_if_not_finite()
        distiller.detach()
    return {name: float(value) for name, value in losses.items()}


@torch.no_grad()
def score(model):
    """Mean intersection over union on 64 pictures."""
    inputs, labels = pictures(64, torch.Generator().manual_seed(1000))
    model.eval()
    found = F.interpolate(model(inputs), size=labels.shape[-2:], mode='bilinear', align_corners=False).argmax(1)
    shares = [((found == index) & (labels == index)).sum() / ((found == index) | (labels == index)).sum().clamp(min=1)
              for index in range(len(CLASSES))]
    return float(sum(shares) / len(shares))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=150, help='of a training; the teacher takes three times as many')
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    teacher, student = Segmenter(48), Segmenter(6)
    alone = copy.deepcopy(student)
    train(teacher, 3 * args.steps)
    train(alone, args.steps)
    losses = train(student, args.steps, teacher)
    print('last losses of the distilled student:', ', '.join(f'{name} {value:.3f}' for name, value in losses.items()))
    for name, model in (('teacher', teacher), ('student alone', alone), ('distilled student', student)):
        print(f'{name:<18} mIoU {100 * score(model):.1f}')
    return student, losses


if __name__ == '__main__':
    main()
