import math

import pytest
import torch

from kd_mm.ops.divergences import sigmoid_divergence, sigmoid_divergence_sum
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

#: teacher sure at 3/4, student at 1/2
LOGIT = math.log(3)
ENTROPY = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
KL = math.log(2) - ENTROPY


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='SigmoidKDLoss', **options))(student, teacher, batch, region).item()


def logits():
    teacher = torch.full((2, 6, 3, 4), LOGIT, dtype=torch.float64)
    return torch.zeros_like(teacher), teacher


@pytest.mark.parametrize('options, expected', [
    ({}, 6 * KL),
    (dict(reduction='batch_mean'), 72 * KL),
    (dict(reduction='sum'), 144 * KL),
    (dict(reduction='teacher_score'), 6 * KL),
    (dict(divergence='cross_entropy'), 6 * math.log(2)),
    (dict(beta=1, divergence='cross_entropy'), 6 * math.log(2) / 4),
    (dict(beta=2), 6 * KL / 16),
])
def test_closed_form(options, expected):
    assert value(*logits(), **options) == pytest.approx(expected, rel=1e-12)


def test_temperature():
    student, teacher = logits()
    assert value(student, 2 * teacher, tau=2.0) == pytest.approx(4 * 6 * KL, rel=1e-12)


def test_gradient_is_the_difference_of_the_scores():
    student, teacher = torch.zeros(1, 1, 1, 1).double().requires_grad_(), torch.full((1, 1, 1, 1), LOGIT).double()
    build(dict(type='SigmoidKDLoss'))(student, teacher).backward()
    assert student.grad.item() == pytest.approx(0.5 - 0.75, rel=1e-7)


@pytest.mark.parametrize('options', [
    dict(), dict(tau=2.0), dict(tau=0.5), dict(beta=1.5), dict(divergence='cross_entropy')], ids=str)
def test_divergence_equals_the_plain_way(options):
    """Values and gradients of both sides, against the definition by probabilities; second gradients too."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(3, 5, generator=generator).double().requires_grad_() for _ in range(2))
    tau, beta = options.get('tau', 1.0), options.get('beta', 0.0)
    p, q = (student / tau).sigmoid(), (teacher / tau).sigmoid()
    plain = -q * p.log() - (1 - q) * (1 - p).log()
    if 'divergence' not in options:
        plain = plain + q * q.log() + (1 - q) * (1 - q).log()
    if beta:
        plain = plain * (q - p).abs() ** beta
    found = sigmoid_divergence(student, teacher, **options)
    assert torch.allclose(found, plain, rtol=1e-9, atol=1e-14)
    upstream = torch.randn(3, 5, generator=generator).double()
    for one, other in zip(*(torch.autograd.grad(value, (student, teacher), upstream, create_graph=True)
                            for value in (found, plain))):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda own: sigmoid_divergence(own, teacher.detach(), **options), (student, ))


def test_sum_in_blocks_is_the_sum(monkeypatch):
    monkeypatch.setattr('kd_mm.ops.blocks.BLOCK', 10)
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(7, 5, generator=generator).double().requires_grad_() for _ in range(2))
    weights = torch.rand(7, 1, generator=generator).double()
    options = dict(tau=2.0, beta=1.0, divergence='cross_entropy')
    plain = (sigmoid_divergence(own, theirs.detach(), **options) * weights).sum()
    found = sigmoid_divergence_sum(own, theirs.detach(), weights, **options)
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(value, own)[0] for value in (found, plain)), rtol=1e-12)


def test_teacher_score_weighs_the_cells():
    teacher = torch.stack([torch.tensor([LOGIT, 0.0]), torch.tensor([-30.0, -LOGIT])]).double().view(1, 2, 1, 2)
    # Cell 0 scores 3/4 (channel 0), cell 1 scores 1/2; only cell 1 differs, by channel 1 (1/4 against 1/2).
    student = teacher.clone()
    student[0, 1, 0, 1] = 0.0
    expected = 0.5 / (0.75 + 0.5) * KL
    assert value(student, teacher, reduction='teacher_score') == pytest.approx(expected, rel=1e-6)


def test_ignored_pixels_are_left_out():
    student, teacher = logits()
    teacher[0, 0, 0, 0] = 50.0
    seg_map = torch.zeros(2, 3, 4, dtype=torch.long)
    seg_map[0, 0, 0] = 255
    assert value(student, teacher, KDBatch(seg_map=seg_map)) == pytest.approx(6 * KL, rel=1e-12)
    assert value(student, teacher, KDBatch(seg_map=seg_map), mask_ignored=False) > 6.01 * KL


def test_rows():
    student, teacher = torch.zeros(5, 4).double(), torch.full((5, 4), LOGIT).double()
    assert value(student, teacher) == pytest.approx(4 * KL, rel=1e-7)
    assert value(student[:0], teacher[:0]) == 0.0


def test_gradient_at_equality_is_finite():
    teacher = torch.randn(2, 3, 4, 4)
    for beta in (0, 1, 1.5, 2):
        student = teacher.clone().requires_grad_()
        build(dict(type='SigmoidKDLoss', beta=beta))(student, teacher).backward()
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('options, message', [
    (dict(beta=0.5), 'beta=0.5 must be 0 or at least 1'), (dict(reduction='mean'), 'cell_mean'), (dict(tau=-1), 'tau')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        value(*logits(), **options)


def test_kl_is_not_negative_in_float32():
    """The difference of two large entropies would be: a nearly equal student, many confident scores."""
    generator = torch.Generator().manual_seed(0)
    teacher = 8 * torch.randn(4, 80, 16, 16, generator=generator)
    student = teacher + 1e-4 * torch.randn(4, 80, 16, 16, generator=generator)
    value = build(dict(type='SigmoidKDLoss'))(student, teacher)
    exact = build(dict(type='SigmoidKDLoss'))(student.double(), teacher.double())
    assert value > 0 and torch.isclose(value.double(), exact, rtol=0.2)
