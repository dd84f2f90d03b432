import math

import pytest
import torch
from torch import nn

from kd_mm.losses.cirkd_v2 import channel_vectors
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SMALL = dict(grid=(2, 3), memory=40, keys=8, channels_per_step=12)
SWEEP = {'CIRKDChannelLoss': dict(options=SMALL, skip=dict(
    test_zero_for_equal_inputs='the student is projected first',
    test_outside_of_the_region_nothing_counts='the batch norm of the projection sees the whole map, and cells are '
                                              'pooled',
    test_prepare_twice_changes_nothing='the memory is state that a step writes'))}
#: softmax of (1, 0) at this temperature is (3/4, 1/4).
TAU = 1 / math.log(3)
KL = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def prepared(student, teacher, **options):
    torch.manual_seed(0)
    loss = build(dict(dict(type='CIRKDChannelLoss', **SMALL), **options))
    loss.prepare((student, ), (teacher, ))
    return loss


@pytest.mark.parametrize('kd_tau', [1.0, 2.0])
def test_closed_form(kd_tau):
    # Two channels over two cells: the student's are orthogonal, the teacher's equal.
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).double().view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 1.0], [4.0, 4.0]]).double().view(1, 2, 1, 2)
    loss = prepared(student, teacher, grid=(1, 2), tau=TAU, kd_tau=kd_tau, minibatch_weight=2.0, memory_weight=3.0,
                    mse_weight=5.0).eval()
    loss.projections[0] = nn.Identity()
    loss.queues[0].vectors[0, :2] = torch.eye(2).double()
    loss.fixed_slots = [torch.tensor([0, 1])]
    terms = loss.terms(0, student, teacher, KDBatch())
    share = 3**(1 / kd_tau) / (3**(1 / kd_tau) + 1)
    assert terms['minibatch'].item() == pytest.approx(KL, rel=1e-12)
    assert terms['memory'].item() == pytest.approx(
        kd_tau**2 * (0.5 * math.log(0.5 / share) + 0.5 * math.log(0.5 / (1 - share))), rel=1e-12)
    assert terms['mse'].item() == pytest.approx(((1 - 0.5**0.5)**2 + 0.5) / 2, rel=1e-12)
    total = 2 * terms['minibatch'] + 3 * terms['memory'] + 5 * terms['mse']
    assert torch.isclose(loss(student, teacher), total, rtol=1e-12)


def test_images_are_related_to_each_other():
    student, teacher = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 4, 4, 6).double()
    loss = prepared(student, teacher).eval()
    loss.projections[0] = nn.Identity()
    joined = loss.terms(0, student, teacher, KDBatch())['minibatch']
    pairs = []
    pooled = [nn.functional.adaptive_avg_pool2d(x, (2, 3)) for x in (student, teacher)]
    s, t = (channel_vectors(x) for x in pooled)
    for i in range(2):
        for j in range(2):
            logs = [(v[i] @ v[j].T / 0.1).log_softmax(1) for v in (s, t)]
            pairs.append((logs[1].exp() * (logs[1] - logs[0])).sum(1).mean())
    assert torch.isclose(joined, sum(pairs) / 4, rtol=1e-12)


def test_any_size_fits_the_memory():
    loss = prepared(torch.randn(2, 4, 8, 12), torch.randn(2, 6, 8, 12))
    for step, size in enumerate(((8, 12), (16, 16), (1, 2))):
        total = loss(torch.randn(2, 4, *size), torch.randn(2, 6, *size), KDBatch(step=step))
        assert torch.isfinite(total)
    assert loss.queues[0].pointer.tolist() == [36]


def test_the_memory_is_state():
    student, teacher = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 8, 12)
    loss = prepared(student, teacher)
    loss.eval()(student, teacher, KDBatch(step=0))
    assert loss.queues[0].pointer.item() == 0
    loss.train()(student, teacher, KDBatch(step=0))
    saved = {key: value.clone() for key, value in loss.state_dict().items()}
    assert torch.equal(loss(student, teacher, KDBatch(step=0)), loss(student, teacher, KDBatch(step=0)))
    assert loss.queues[0].pointer.item() == 12
    stored = loss.queues[0].vectors[0, :12]
    known = channel_vectors(nn.functional.adaptive_avg_pool2d(teacher, (2, 3))).flatten(0, 1)
    # All twelve channels of the batch are in it, in random order.
    assert (stored[:, None] - known).abs().amax(dim=2).argmin(dim=1).sort().values.tolist() == list(range(12))
    expected = loss(student, teacher, KDBatch(step=1))
    torch.manual_seed(5)
    other = build(dict(type='CIRKDChannelLoss', **SMALL))
    other.prepare((student, ), (teacher, ))
    other.load_state_dict(saved)
    assert torch.equal(other(student, teacher, KDBatch(step=1)), expected)
    other.load_state_dict(saved)
    assert not torch.equal(other(student, teacher, KDBatch(step=1, seed=2)), expected)


@pytest.mark.parametrize('options, message', [
    (dict(grid=(0, 2)), 'grid'), (dict(grid=(2, 2, 2)), 'grid'), (dict(tau=0), 'tau'), (dict(keys=50), 'memory'),
    (dict(channels_per_step=41), 'memory'), (dict(mse_weight=-1), 'mse_weight'), (dict(max_block=0), 'max_block')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='CIRKDChannelLoss', **dict(SMALL, **options)))
