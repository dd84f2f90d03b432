"""Operators that read memory as if the channels were not innermost."""

from unittest import mock

import pytest
import torch
from chains import settle, teach
from mmcv import ops
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import kernels, maps, packed
from kd_mm.teachers.layout import operators, slow
from kd_mm.types.batch import KDBatch


class Deformed(nn.Module):

    def __init__(self, kind):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.deform = kind(8, 8, 3, padding=1)
        nn.init.normal_(self.deform.conv_offset.weight, std=0.1)
        self.late, self.pool, self.end = nn.Conv2d(8, 8, 1), ops.RoIAlign((3, 3)), nn.Identity()
        self.seen = []
        self.late.register_forward_pre_hook(lambda module, given: self.seen.append(given[0].stride()))

    def forward(self, images):
        maps = self.late(self.deform(self.relu(self.norm(self.stem(images)))))
        return self.end((maps, self.pool(input=maps, rois=images.new_tensor([[0, 1, 1, 9, 9], [1, 2, 0, 12, 7]]))))


@pytest.mark.parametrize('compiled', [False, 'eager'])
@pytest.mark.parametrize('kind', [ops.ModulatedDeformConv2dPack, ops.DeformConv2dPack,
                                  type('OfAHost', (ops.ModulatedDeformConv2dPack, ), {})])
def test_they_get_usual_maps(kind, compiled):
    torch.manual_seed(0)
    model = settle(Deformed(kind))
    assert operators(model) == [model.deform, model.pool]
    _, far, found = teach(model, dict(channels_last=True, compile=compiled), paths=('end', ))
    assert far < 1e-5
    assert model.seen[-1][1] == 1  # what comes after them has the channels innermost again
    assert not any('forward' in vars(module) for module in model.modules())


def test_one_that_is_put_in_later_gets_usual_maps():
    torch.manual_seed(0)
    model = settle(Deformed(lambda *args, **kwargs: PlainOffset(8, 8, 3, padding=1)))
    teacher, _, _ = teach(model, dict(channels_last=True), paths=('end', ))
    model.deform = ops.ModulatedDeformConv2dPack(8, 8, 3, padding=1)
    nn.init.normal_(model.deform.conv_offset.weight, std=0.1)
    images, tap = torch.randn(2, 3, 16, 20), Tap(model, 'end', 'teacher')
    for _ in range(3):
        teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
        with torch.no_grad():
            torch.testing.assert_close(tap.read()[0], model(images)[0], rtol=1e-4, atol=1e-4)


class PlainOffset(nn.Conv2d):
    """A convolution with the part that the test above initialises."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = nn.Conv2d(1, 1, 1)


class Holes(nn.Module):
    """A depthwise convolution with large holes, as in DeepLabV3+, and one without."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.near = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.far = nn.Conv2d(8, 8, 3, padding=9, dilation=9, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.end = nn.Conv2d(8, 8, 1)

    def forward(self, images):
        return self.end(self.norm(self.far(self.near(self.stem(images)))))


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('speed', ['auto', dict(channels_last=True), dict(fold=True, channels_last=True, onednn=True)])
def test_convolutions_with_large_holes_get_usual_maps(norm, speed, monkeypatch):
    """On a CPU they take up to twelve times as long with the channels innermost."""
    torch.manual_seed(0)
    model, seen = settle(Holes(norm)), {}
    own = nn.functional.conv2d

    def conv2d(images, weight, *rest):
        seen.setdefault(rest[3], []).append(images.is_contiguous())  # by dilation
        return own(images, weight, *rest)

    monkeypatch.setattr(nn.functional, 'conv2d', conv2d)
    monkeypatch.setattr(torch.nn.modules.conv.F, 'conv2d', conv2d)
    images = torch.randn(2, 3, 160, 200)
    teacher, far, _ = teach(model, speed, paths=('end', ), images=images)
    assert far < 1e-5 and slow(model) == [model.far] and teacher.fast.speed.channels_last
    seen.clear()
    with torch.no_grad():
        teacher.fast.run(images, (), [Tap(model, 'end', 'teacher')])
    assert seen[9, 9] == [True]
    assert not any('forward' in vars(module) for module in model.modules())
    assert not norm or not teacher.fast.folding.pairs or teacher.fast.folding.names == ['far']


@pytest.mark.parametrize('avx512, reach', [(True, 6), (False, 4)])
def test_how_far_is_far(avx512, reach, monkeypatch):
    """What the library does fast: holes up to a reach, any reach without holes, and many channels at once."""
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512' if avx512 else 'AVX2')

    def is_far(dilation, groups=8, kernel=3, **options):
        return maps.far(nn.Conv2d(8, 8, kernel, **{**dict(
            padding=dilation * (kernel - 1) // 2, dilation=dilation, groups=groups), **options}))

    assert [is_far(dilation) for dilation in (1, reach, reach + 1)] == [False, False, True]
    assert not is_far(reach + 1, groups=1) and not is_far(reach + 1, groups=4) and not is_far(1, kernel=21)
    assert not is_far(reach + 1, padding=0) and not maps.far(nn.Linear(8, 8))


@pytest.mark.parametrize('options, cells, expected', [
    (dict(), 1024, True), (dict(), 1023, False), (dict(in_channels=2048), 1024, True),
    (dict(in_channels=1536), 1024, False),
    (dict(kernel_size=1, padding=0), 1024, False), (dict(dilation=4, padding=4), 1024, True),
    (dict(dilation=12, padding=12), 1024, False), (dict(stride=2), 1024, False),
    (dict(groups=2), 1024, False)], ids=str)
def test_dense_convolutions_of_very_many_channels_run_in_the_usual_layout(options, cells, expected):
    layer = nn.Conv2d(**{**dict(in_channels=1024, out_channels=4, kernel_size=3, padding=1), **options})
    maps_in = torch.randn(1, layer.in_channels, 1, cells).contiguous(memory_format=torch.channels_last)
    assert maps.wide(layer, maps_in) == expected
    with torch.no_grad():
        model, given = nn.Sequential(layer, nn.ReLU(), nn.Identity()), []
        packing, apply = packed.Packing(True), torch.ops.mkldnn._convolution_pointwise

        def noted(images, weight, *args):
            given.append((images.is_contiguous(), weight.is_mkldnn))
            return apply(images, weight, *args)

        packing.on = True
        with mock.patch.object(torch.ops.mkldnn, '_convolution_pointwise', noted):
            found = kernels.direct(layer, None, packing)(maps_in)
        assert given == [(expected, not expected)] and found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, model[0](maps_in), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 70, 9, 9), (2, 1, 3, 3), (3, 5, 1, 1), (2, 64, 64, 64)], ids=str)
def test_maps_are_turned(shape):
    usual = torch.randn(shape)
    innermost = usual.contiguous(memory_format=torch.channels_last)
    for images in (usual, innermost, usual.transpose(2, 3).contiguous().transpose(2, 3), usual[:, :, ::2]):
        one, other = maps.to_usual(images), maps.to_innermost(images)
        assert torch.equal(one, images) and one.is_contiguous()
        assert torch.equal(other, images) and other.is_contiguous(memory_format=torch.channels_last)
    assert maps.to_usual(usual) is usual and maps.to_innermost(innermost) is innermost
