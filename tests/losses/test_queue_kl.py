import copy

import pytest
import torch

from kd_mm.losses.queue_kl import queue_divergence
from kd_mm.ops.functional import unit_vectors
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'QueueKLLoss': dict(options=dict(size=8), skip=dict(
    test_prepare_twice_changes_nothing='the queue is state that a step writes'))}


def loss_of(**options):
    return build(dict(dict(type='QueueKLLoss', size=4, tau=1.0, loss_weight=1.0), **options))


class Corner(RegionMask):
    """Two by two cells of the first image, nothing of the others."""

    def forward(self, features, batch):
        masks = tuple(torch.zeros_like(level[:, :1]) for level in features)
        for mask in masks:
            mask[0, :, :2, :2] = 1
        return masks


def batch(step):
    return KDBatch(step=step)


def test_closed_form():
    # Against rows e1 and e2: the teacher is at e1, the student between the two.
    teacher, student = torch.tensor([[1.0, 0.0]]).double(), unit_vectors(torch.tensor([[1.0, 1.0]]).double(), dim=1)
    e = torch.tensor(1.0).double().exp()
    near, far = e / (1 + e), 1 / (1 + e)
    expected = near * (near / 0.5).log() + far * (far / 0.5).log()
    found = queue_divergence(student, teacher, torch.eye(2).double(), 1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_queue_moves_once_a_step_and_newest_first():
    loss, teacher = loss_of(empty='zero'), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    loss(torch.ones(2, 2), teacher, batch(0))
    assert loss.queues[0].rows.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    loss(torch.ones(2, 2), teacher, batch(0))  # the same step again
    assert loss.queues[0].rows.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    loss(torch.ones(1, 2), -teacher[:1], batch(1))
    assert loss.queues[0].rows.tolist() == [[-1, 0], [1, 0], [0, 1], [0, 0]]
    loss.eval()(torch.ones(1, 2), teacher[:1], batch(2))
    assert loss.queues[0].rows[0].tolist() == [-1, 0]
    loss.train()(torch.ones(5, 2), torch.tensor([[1.0, float(index)] for index in range(5)]), batch(3))
    assert loss.queues[0].rows[0].tolist() == [1, 0] and len(loss.queues[0].rows) == 4


def test_an_image_does_not_meet_itself():
    """With the batch in the queue before the loss the first step depends on it; afterwards on older images alone."""
    student, teacher = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    loss = loss_of()
    loss.prepare((student, ), (teacher, ))
    start = loss.queues[0].rows.clone()
    expected = queue_divergence(*(unit_vectors(side, dim=1) for side in (student, teacher)), start, 1.0).mean()
    torch.testing.assert_close(loss(student, teacher, batch(0)), expected)
    torch.testing.assert_close(loss(student, teacher, batch(0)), expected)
    before = loss_of(update='before')
    assert not torch.isclose(before(student, teacher, batch(0)), expected)
    joined = torch.cat([unit_vectors(teacher, dim=1), start])[:4]
    torch.testing.assert_close(before.queues[0].rows, joined)


def test_the_start_is_the_same_everywhere_and_random():
    first, second = loss_of(), loss_of()
    for loss in (first, second):
        torch.manual_seed(int(torch.randint(0, 99, ())))
        loss.prepare((torch.zeros(1, 3), ), (torch.zeros(1, 3), ))
    assert torch.equal(first.queues[0].rows, second.queues[0].rows)
    torch.testing.assert_close(first.queues[0].rows.norm(dim=1), torch.ones(4))


def test_the_state_is_restored():
    loss, other = loss_of(), loss_of()
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    loss(student, teacher, batch(0))
    other.prepare((student, ), (teacher, ))
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert torch.equal(loss(student, teacher, batch(1)), other(student, teacher, batch(1)))


def test_maps_are_averaged_within_the_region():
    student, teacher = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    loss, plain = loss_of(), loss_of()
    found = loss(student, teacher, batch(0), Corner())
    inside = [side[:1, :, :2, :2] for side in (student, teacher)]
    torch.testing.assert_close(found, plain(*inside, batch(0)))
    torch.testing.assert_close(loss.queues[0].rows, plain.queues[0].rows)  # the image without a cell is not kept


@pytest.mark.parametrize('options, message', [
    (dict(size=1), 'size=1'), (dict(update='late'), "update='late'"), (dict(empty=None), 'empty=None')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(**options)
    with pytest.raises(ValueError, match='QueueKLLoss, level 0: .*one channel'):
        loss_of()(torch.ones(1, 1), torch.ones(1, 1))
