"""Maps of different H and W: what the losses do whose authors average-pool them, and what a config gets."""

import pytest
import torch
import torch.nn.functional as F

from kd_mm.adapters.auto import auto_adapter
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS, build, choices

POOLING = {'ATLoss': 'smaller', 'NSTLoss': 'smaller', 'VIDLoss': 'smaller', 'OFDLoss': 'student'}
SIZES = [((8, 10), (4, 5)), ((4, 5), (8, 10)), ((9, 6), (5, 6)), ((6, 4), (4, 9))]


def pair(student, teacher):
    return torch.randn(2, 6, *student).double().requires_grad_(), torch.randn(2, 6, *teacher).double()


def test_which_losses_pool():
    assert {name: MODELS.get(name).pools_to for name in choices(KDLoss) if MODELS.get(name).pools_to} == POOLING


@pytest.mark.parametrize('name', POOLING)
@pytest.mark.parametrize('sizes', SIZES)
def test_the_loss_is_that_of_the_pooled_maps(name, sizes):
    loss, (student, teacher) = build(dict(type=name)), pair(*sizes)
    size = sizes[0] if POOLING[name] == 'student' else tuple(map(min, *sizes))
    small = [F.adaptive_avg_pool2d(side, size) for side in (student, teacher)]
    found, wanted = loss(student, teacher), loss(*small)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    grads = [torch.autograd.grad(value, student)[0] for value in (found, wanted)]
    assert torch.allclose(*grads, rtol=1e-12) and grads[0].abs().sum() > 0


@pytest.mark.parametrize('name', POOLING)
def test_a_region_is_made_for_the_teachers_map_and_pooled_with_it(name):
    loss, (student, teacher) = build(dict(type=name)), pair((4, 5), (8, 10))
    loss(student, teacher)
    mask, seen = (torch.rand(2, 1, 8, 10) > 0.4).double(), []

    def region(features, batch):
        seen.append(features[0].shape)
        return (mask, )

    found = loss(student, teacher, None, region)
    assert seen == [teacher.shape]
    wanted = loss(student, F.avg_pool2d(teacher, 2), None, lambda features, batch: (F.avg_pool2d(mask, 2), ))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize('name', POOLING)
def test_no_adapter_resizes_before(name):
    student, teacher = (torch.zeros(1, 4, 4, 5), ), (torch.zeros(1, 6, 8, 10), )
    kind = type(auto_adapter(build(dict(type=name)), student, teacher)).__name__
    assert kind == ('ConvAdapter' if name == 'OFDLoss' else 'NoneType')


@pytest.mark.parametrize('name', POOLING)
def test_an_adapter_that_a_config_names_still_resizes(name):
    loss, (student, teacher) = build(dict(type=name)), pair((4, 5), (8, 10))
    resized, same = build(dict(type='ResizeAdapter'))((student, ), (teacher, ))
    wide = F.interpolate(student, size=(8, 10), mode='bilinear', align_corners=False)
    assert loss(resized, same).item() == pytest.approx(loss(wide, teacher).item(), rel=1e-12)
    assert loss(resized, same).item() != pytest.approx(loss(student, teacher).item(), rel=1e-3)


def test_ofd_takes_its_connector_before_the_sizes_are_matched():
    # Batch norm of a pooled map is not the pooled batch norm.
    loss, (student, teacher) = build(dict(type='OFDLoss', margin='batch', loss_weight=1.0)), pair((8, 10), (4, 5))
    connector = build(dict(type='ConvAdapter', bias=False, always=True, norm=True))
    connector.prepare((student, ), (teacher, ))
    adapted, _ = connector((student, ), (teacher, ))
    wide = teacher.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert loss(adapted, teacher).item() == pytest.approx(loss(adapted[0], wide).item(), rel=1e-12)
