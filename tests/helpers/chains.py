"""Small teachers of convolutions and norms, and a run of them."""

import torch
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.fast import distance
from kd_mm.types.batch import KDBatch


def settle(model):
    """Statistics and factors as after a training, not 0 and 1."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model


class Chain(nn.Module):
    """Two pairs; ``twist`` is what a host might do between them."""

    def __init__(self, twist='', act=None):
        super().__init__()
        self.twist = twist
        self.a, self.an = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, images):
        if self.twist == 'used twice':
            before = self.a(images)
            return self.b(self.act(self.an(before)) + before)
        if self.twist == 'changed before':
            x = self.a(images)
            x = self.act(self.an(x.mul_(2)))
        elif self.twist == 'changed and let go':
            x = self.act(self.an(self.a(images).mul_(2)))
        elif self.twist == 'conv twice':
            self.a(images)
            x = self.a(images)
            x = self.act(self.an(x))
        elif self.twist == 'norm twice':
            x = self.a(images)
            x = self.an(x)
            x = self.act(self.an(x))
        elif self.twist == 'kept':
            self.kept = self.a(images)
            x = self.act(self.an(self.kept))
        elif self.twist == 'norm first':
            x = self.an(self.b(self.act(self.a(images))))
            return self.bn(x)
        elif self.twist == 'view':
            x = self.a(images)
            x = self.act(self.an(x.view(x.shape)))
        else:
            x = self.a(images)
            x = self.an(x)
            x = self.act(x)
        x = self.b(x)
        return self.bn(x)


def teach(model, speed=None, paths=('bn', ), images=None, runs=2):
    """A teacher after its dry pass and some steps, and what the taps gave in the last of them."""
    images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0)) if images is None else images
    teacher = Teacher(model, nn.Conv2d(3, 3, 1))
    teacher.go(dict(fold=True) if speed is None else speed)
    taps = [Tap(model, path, 'teacher') for path in paths]
    batch = KDBatch(input_shape=tuple(images.shape[-2:]))
    teacher.run(images, (), taps, batch, full=True)
    exact = {tap.path: tap.read() for tap in taps}
    for _ in range(runs):
        teacher.run(images, (), taps, batch)
        found = {tap.path: tap.read() for tap in taps}
    return teacher, max(distance(found[path], exact[path]) for path in found), found
