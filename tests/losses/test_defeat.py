import math

import pytest
import torch

from kd_mm.losses.defeat import decoupled_divergence, half_mean
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

BATCH = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8.0, 8.0, 24.0, 24.0]])])


def parts(student, teacher, batch=BATCH, mask=None, **options):
    loss = build(dict(type='DeFeatLoss', **options))
    masks = [mask] * len(student)
    return {name: term.item() for name, term in loss.terms(student, teacher, batch, masks).items()}


def test_closed_form():
    # Cells 1 and 2 of both axes are the box; squares 4 inside, 1 outside, two channels.
    student = torch.ones(1, 2, 4, 4)
    student[:, :, 1:3, 1:3] = 2
    found = parts((student, ), (torch.zeros_like(student), ))
    assert found == {'fg': pytest.approx(4 / 2), 'bg': pytest.approx(1 / 2)}
    total = build(dict(type='DeFeatLoss', fg=3.0, bg=12.0, loss_weight=2.0))(student, torch.zeros_like(student), BATCH)
    assert total.item() == pytest.approx(2 * (3 * 2 + 12 / 2))


def test_mean_over_levels_with_each_box_on_one():
    student = (torch.full((1, 2, 4, 4), 2.0), torch.full((1, 2, 2, 2), 2.0))
    teacher = tuple(torch.zeros_like(tensor) for tensor in student)
    assert parts(student, teacher) == {'fg': pytest.approx(2 / 2), 'bg': pytest.approx(2.0)}


def test_small_divisors_are_one():
    assert half_mean(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.25)).item() == 0.25
    assert half_mean(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item() == 0.0


def test_a_region_weighs_both_parts():
    student = torch.ones(1, 2, 4, 4)
    student[:, :, :2] = 3
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, :2] = 1
    found = parts((student, ), (torch.zeros_like(student), ), mask=mask)
    assert found == {'fg': pytest.approx(4.5), 'bg': pytest.approx(4.5)}


def test_any_region_may_be_the_foreground():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :4] = 1
    student = torch.ones(1, 2, 8, 8)
    student[:, :, :4] = 2
    options = dict(foreground=dict(type='SegClassRegion', classes=[1]))
    found = parts((student, ), (torch.zeros_like(student), ), KDBatch(seg_map=labels), **options)
    assert found == {'fg': pytest.approx(2.0), 'bg': pytest.approx(0.5)}
    loss = build(dict(type='DeFeatLoss', **options))
    assert not loss.needs_boxes and loss.needs_seg_map and build(dict(type='DeFeatLoss')).needs_boxes


def test_decoupled_divergence_by_hand():
    # Two foreground rows, one of them equal, and one background row; each group has its own mean.
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(3)]]).double()
    student = torch.zeros(3, 2).double()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = decoupled_divergence(student, teacher, torch.tensor([0, 0, 1]))
    assert found['fg'].item() == pytest.approx(kl / 2) and found['bg'].item() == pytest.approx(kl)
    # The last column is the background even if no row is; the authors' rule would take class 0.
    found = decoupled_divergence(student, teacher, torch.tensor([0, 0, 0]))
    assert found['bg'].item() == 0 and found['fg'].item() == pytest.approx(2 * kl / 3)
    found = decoupled_divergence(student, teacher, torch.tensor([0, 0, 1]), background=0)
    assert found['bg'].item() == pytest.approx(kl / 2)
    tau = decoupled_divergence(student, 2 * teacher, torch.tensor([0, 0, 1]), tau=2.0)
    assert tau['bg'].item() == pytest.approx(4 * kl)


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(3, 2, requires_grad=True)
    student = torch.randn(3, 2, requires_grad=True)
    sum(decoupled_divergence(student, teacher, torch.tensor([0, 0, 1])).values()).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize('options', [dict(fg=-1), dict(bg=float('nan'))])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='DeFeatLoss', **options))
    with pytest.raises(KeyError, match='unknown region type'):
        build(dict(type='DeFeatLoss', foreground=dict(type='CWDLoss')))


def test_class_term_by_hand():
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(3)]]).double()
    student = torch.zeros(3, 2).double()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    batch = KDBatch(row_labels=torch.tensor([0, 0, 1]))

    def value(**options):
        return build(dict(type='DeFeatClassLoss', **options))(student, teacher, batch).item()

    assert value() == pytest.approx(2 * kl / 2 + 2 * kl)
    assert value(fg=1.0, bg=0.0) == pytest.approx(kl / 2) and value(fg=0.0, bg=3.0) == pytest.approx(3 * kl)
    stages = KDBatch(row_labels=[torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1])])
    both = build(dict(type='DeFeatClassLoss', fg=0.0, bg=1.0, loss_weight=[1.0, 10.0]))
    assert both((student, ) * 2, (teacher, ) * 2, stages).item() == pytest.approx(kl + 10 * 2 * kl / 3)


def test_class_term_without_rows_and_in_half_precision():
    loss = build(dict(type='DeFeatClassLoss'))
    student = torch.zeros(0, 3, requires_grad=True)
    total = loss(student, torch.zeros(0, 3), KDBatch(row_labels=torch.zeros(0, dtype=torch.long)))
    total.backward()
    assert total.item() == 0 and student.grad is not None
    rows = (1.5e4 * torch.randn(4, 3)).half().requires_grad_()
    total = loss(rows, torch.randn(4, 3).half(), KDBatch(row_labels=torch.tensor([0, 1, 2, 2])))
    assert total.dtype == torch.float32 and torch.isfinite(total)


def test_class_term_needs_rows_and_labels():
    loss = build(dict(type='DeFeatClassLoss'))
    with pytest.raises(ValueError, match='rows of proposals are needed'):
        loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match='needs the target class of every row'):
        loss(torch.zeros(2, 3), torch.zeros(2, 3))
    for options in (dict(fg=-1.0), dict(fg=0.0, bg=0.0), dict(tau=0.0)):
        with pytest.raises(ValueError, match='DeFeatClassLoss'):
            build(dict(type='DeFeatClassLoss', **options))
