import pytest
import torch
from torch import nn

from kd_mm.losses.ft import factor_gap, relative_error
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'FTLoss': dict(skip=dict(
    test_zero_for_equal_inputs='translator and paraphraser are two networks',
    test_outside_of_the_region_nothing_counts='their convolutions reach over the border'))}


def prepared(student, teacher, **options):
    torch.manual_seed(0)
    loss = build(dict(type='FTLoss', **options))
    loss.prepare((student, ), (teacher, ))
    return loss


def maps():
    return torch.randn(2, 4, 6, 6).double().requires_grad_(), torch.randn(2, 6, 6, 6).double()


def test_gap_by_hand():
    student, teacher = torch.zeros(2, 1, 1, 2).double(), torch.zeros(2, 1, 1, 2).double()
    student[:, 0, 0, 0] = teacher[0, 0, 0, 1] = teacher[1, 0, 0, 0] = 7.0
    # Image 0: unit vectors (1, 0) and (0, 1); image 1: equal.
    assert factor_gap(student, teacher, 1).item() == pytest.approx(2 / 4)
    assert factor_gap(student, teacher, 2).item() == pytest.approx(2**0.5 / 2)


@pytest.mark.parametrize('p', [1, 2])
def test_gap_in_a_region_is_that_of_its_cells(p):
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    part = factor_gap(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4], p)
    assert torch.isclose(factor_gap(student, teacher, p, mask), part, rtol=1e-12)
    mask[0] = 0
    part = factor_gap(student[1:, :, 1:3, :4], teacher[1:, :, 1:3, :4], p)
    assert torch.isclose(factor_gap(student, teacher, p, mask), part, rtol=1e-12)


def test_rebuilding_error_by_hand():
    target = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    assert relative_error(2 * target, target).item() == 1.0
    assert relative_error(torch.zeros_like(target) + 1.0, target).item() == pytest.approx(1 / 5)
    assert relative_error(torch.zeros_like(target) + 1.0, target, torch.tensor([0.0, 1.0])).item() == 0.25
    assert relative_error(target, 0 * target, torch.zeros(2)).item() == 0.0


def test_equal_factors_leave_the_rebuilding_error():
    student, teacher = maps()
    loss = prepared(teacher, teacher, translator_norm=False)
    loss.translators[0] = loss.paraphrasers[0]
    rebuilt = loss.decoders[0](loss.paraphrasers[0](teacher))
    assert loss(teacher, teacher).item() == pytest.approx(relative_error(rebuilt, teacher).item(), rel=1e-9)


def test_shapes_of_the_parts():
    loss = prepared(*maps(), factor_ratio=0.75)
    sizes = [[(m.in_channels, m.out_channels) for m in part if hasattr(m, 'in_channels')]
             for part in (loss.translators[0], loss.paraphrasers[0], loss.decoders[0])]
    assert sizes == [[(4, 4), (4, 4), (4, 4)], [(6, 6), (6, 4), (4, 4)], [(4, 4), (4, 6), (6, 6)]]
    assert [sum(isinstance(m, nn.BatchNorm2d) for m in part)
            for part in (loss.translators[0], loss.paraphrasers[0])] == [3, 0]
    assert isinstance(loss.decoders[0][-1], nn.Identity)
    assert len(prepared(*maps(), reconstruction_weight=0).decoders) == 0


def test_who_is_trained_when():
    student, teacher = maps()
    loss = prepared(student, teacher, pretrain_steps=5)

    def norms(step):
        loss.zero_grad()
        student.grad = None
        loss(student, teacher, KDBatch(step=step)).backward()
        parts = loss.translators, loss.paraphrasers, loss.decoders
        return [student.grad.norm() > 0, *(sum(p.grad.norm() for p in part.parameters()) > 0 for part in parts)]

    assert norms(4) == [False, False, True, True]
    assert norms(5) == [True, True, True, True]


def test_the_factor_term_never_trains_the_paraphraser():
    student, teacher = maps()
    loss = prepared(student, teacher, reconstruction_weight=0)
    loss(student, teacher).backward()
    assert all(parameter.grad is None for parameter in loss.paraphrasers.parameters())
    found = []
    for weight in (1.0, 2.0):
        both = prepared(student, teacher, reconstruction_weight=weight)
        both(student, teacher).backward()
        found.append(both.paraphrasers[0][0].weight.grad)
    assert torch.allclose(2 * found[0], found[1], rtol=1e-9)


def test_rebuilding_is_learnt():
    teacher = torch.randn(2, 2, 6, 6) @ torch.randn(6, 6)
    teacher = torch.cat([teacher, -teacher, 2 * teacher], dim=1)  # six channels, two of them independent
    loss = prepared(teacher, teacher, pretrain_steps=1000)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        total = loss(teacher, teacher)
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.3 * values[0]


@pytest.mark.parametrize('options', [
    dict(factor_ratio=0), dict(p=3), dict(reconstruction_weight=-1), dict(pretrain_steps=-1), dict(pretrain_steps=1.5),
    dict(pretrain_steps=5, reconstruction_weight=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='FTLoss', **options))
