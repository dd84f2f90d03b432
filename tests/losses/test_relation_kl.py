import pytest
import torch

from kd_mm.losses.relation_kl import grid_of, relation_gap
from kd_mm.registry import build


def written_out(student, teacher, tau, weights=None):
    """The loss with the whole matrix of pairs."""
    total, rows = 0.0, 0.0
    for image, (s, t) in enumerate(zip(student, teacher)):
        own, theirs = (side.flatten(1) / side.flatten(1).norm(dim=0) for side in (s, t))
        w = torch.ones(own.shape[1]).double() if weights is None else weights[image].flatten().double()
        log_s, log_t = ((side.t() @ side / tau + w.log()).log_softmax(dim=1) for side in (own, theirs))
        gap = (log_t.exp() * (log_t - log_s)).nan_to_num().sum(dim=1)
        total, rows = total + (gap * w).sum(), rows + w.sum()
    return total / rows


def test_closed_form():
    # Two cells: alike in the student (cosine 1), at right angles in the teacher (cosine 0), tau 1.
    student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double().view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().view(1, 2, 1, 2)
    e = torch.tensor(1.0).double().exp()
    near, far = e / (1 + e), 1 / (1 + e)
    expected = near * (near / 0.5).log() + far * (far / 0.5).log()
    assert relation_gap(student, teacher, 1.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_blocks_are_the_whole():
    student, teacher = torch.randn(2, 5, 4, 3).double(), torch.randn(2, 3, 4, 3).double()
    torch.testing.assert_close(relation_gap(student, teacher, 0.3), written_out(student, teacher, 0.3))
    weights = torch.rand(2, 1, 4, 3).double()
    torch.testing.assert_close(relation_gap(student, teacher, 0.3, weights),
                               written_out(student, teacher, 0.3, weights))


def test_channels_and_size_may_differ():
    loss = build(dict(type='RelationKLLoss'))
    student = torch.randn(2, 5, 8, 6).requires_grad_()
    loss(student, torch.randn(2, 3, 4, 3)).backward()
    assert student.grad.abs().sum() > 0


def test_large_maps_are_averaged():
    assert grid_of(64, 64, 4096) == (64, 64) and grid_of(65, 64, 4096) == (64, 63)
    assert grid_of(1, 1000, 10) == (1, 10) and grid_of(100, 100, None) == (100, 100)
    student, teacher = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 4, 8, 8).double()
    pooled = [torch.nn.functional.avg_pool2d(side, 2) for side in (student, teacher)]
    found = build(dict(type='RelationKLLoss', max_cells=16))(student, teacher)
    torch.testing.assert_close(found, relation_gap(*pooled, 0.07))


@pytest.mark.parametrize('options, message', [(dict(tau=0), 'tau=0'), (dict(max_cells=0), 'max_cells=0')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='RelationKLLoss', **options))


def test_one_channel_is_refused():
    with pytest.raises(ValueError, match='RelationKLLoss, level 0: teacher'):
        build(dict(type='RelationKLLoss'))(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))
