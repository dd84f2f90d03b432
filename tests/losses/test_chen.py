import math

import pytest
import torch
from tensors import draw

from kd_mm.losses.chen import bounded_squares, weighted_cross_entropy
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(kind, student, teacher, batch=None, **options):
    return build(dict(type=kind, loss_weight=1.0, **options))(student, teacher, batch).item()


#: Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), the background last.
TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 1.0]]).double().log(), torch.tensor([[1.0, 1.0, 2.0]]).double().log()
LOG = math.log(2)


def test_cross_entropy_by_hand():
    # 1/2 log 4 + 1/4 log 4 + 1.5 * 1/4 log 2
    expected = (1 + 0.5 + 1.5 * 0.25) * LOG
    assert weighted_cross_entropy(STUDENT, TEACHER).item() == pytest.approx(expected)
    assert value('ChenClassLoss', STUDENT, TEACHER) == pytest.approx(expected)
    plain = (1 + 0.5 + 0.25) * LOG
    assert value('ChenClassLoss', STUDENT, TEACHER, background_weight=1.0) == pytest.approx(plain)
    rows = torch.cat([STUDENT, TEACHER]), torch.cat([TEACHER, TEACHER])
    entropy = (0.5 + 0.5 + 1.5 * 0.5) * LOG
    assert value('ChenClassLoss', *rows) == pytest.approx((expected + entropy) / 2)
    assert value('ChenClassLoss', 3 * STUDENT, 3 * TEACHER, tau=3.0) == pytest.approx(9 * expected)


def test_without_a_weight_it_is_the_cross_entropy_of_softmax_kd():
    student, teacher = draw(7, 5), draw(7, 5, seed=1)
    kd = build(dict(type='SoftmaxKDLoss', divergence='cross_entropy'))(student, teacher)
    assert value('ChenClassLoss', student, teacher, background_weight=1.0) == pytest.approx(kd.item())


def test_a_weight_draws_to_the_background():
    """The minimum is at scores in proportion to w p_t, as the docstring warns."""
    teacher = draw(1, 4)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.5]).double()
    student = (teacher.softmax(dim=1) * weights).log().requires_grad_()
    weighted_cross_entropy(student, teacher).sum().backward()
    assert student.grad.abs().max() < 1e-12


def test_the_bound_by_hand():
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 4)
    # squared errors of the student 4, 1, 1, 0.25 and of the teacher 1, 4, 1, 0
    student = target + torch.tensor([[2.0], [1.0], [1.0], [0.5]]) * torch.tensor([0.0, 1.0, 0.0, 0.0])
    teacher = target + torch.tensor([[1.0], [2.0], [1.0], [0.0]]) * torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert bounded_squares(student, teacher, target).tolist() == [4, 0, 0, 0.25]
    assert bounded_squares(student, teacher, target, 0.5).tolist() == [4, 0, 1, 0.25]
    assert bounded_squares(student, teacher, target, 4.0).tolist() == [4, 1, 1, 0.25]
    assert bounded_squares(student, teacher, target, -0.5).tolist() == [4, 0, 0, 0]
    batch = KDBatch(row_targets=target, row_totals=[10])
    assert value('ChenBoxLoss', student, teacher, batch) == pytest.approx(0.425)
    assert value('ChenBoxLoss', student, teacher, batch, divisor='positive') == pytest.approx(4.25 / 4)
    assert value('ChenBoxLoss', student, teacher, KDBatch(row_targets=target)) == pytest.approx(4.25 / 4)
    assert value('ChenBoxLoss', student, teacher, batch, margin=0.5) == pytest.approx(0.525)


def test_nothing_is_learned_from_the_box_of_the_teacher():
    student, target = draw(5, 4).requires_grad_(), draw(5, 4, seed=1)
    teacher = (target + 1e-3).requires_grad_()
    loss = build(dict(type='ChenBoxLoss', loss_weight=1.0))
    loss(student, teacher, KDBatch(row_targets=target)).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student.detach() - target) / 5)


def test_levels_have_rows_of_their_own():
    first, second = torch.zeros(2, 4), torch.zeros(3, 4)
    batch = KDBatch(row_targets=[first + 1, second + 2], row_totals=[4, 6])
    right = (first + 1, second + 2)
    loss = build(dict(type='ChenBoxLoss', loss_weight=[1.0, 10.0]))
    assert loss((first, second), right, batch).item() == pytest.approx(2 * 4 / 4 + 10 * 3 * 16 / 6)


@pytest.mark.parametrize('kind, columns', [('ChenClassLoss', 3), ('ChenBoxLoss', 4)])
def test_no_rows_is_zero_and_connected(kind, columns):
    student = torch.zeros(0, columns, requires_grad=True)
    total = build(dict(type=kind))(student, torch.zeros(0, columns), KDBatch(row_targets=torch.zeros(0, 4)))
    total.backward()
    assert total.item() == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize('kind, columns', [('ChenClassLoss', 6), ('ChenBoxLoss', 4)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(kind, columns, dtype):
    student = (1.5e4 * draw(8, columns)).to(dtype).requires_grad_()
    teacher = (1.5e4 * draw(8, columns, seed=1)).to(dtype)
    total = build(dict(type=kind))(student, teacher, KDBatch(row_targets=torch.zeros(8, 4)))
    assert total.dtype == torch.float32 and torch.isfinite(total)
    total.backward(torch.tensor(1e-12))
    assert torch.isfinite(student.grad).all()


def test_float64_stays_float64():
    for kind, columns in (('ChenClassLoss', 6), ('ChenBoxLoss', 4)):
        loss = build(dict(type=kind))
        assert loss(draw(8, columns), draw(8, columns, seed=1), KDBatch(row_targets=torch.zeros(8, 4))).dtype \
            == torch.float64


@pytest.mark.parametrize('kind, options, message', [
    ('ChenClassLoss', dict(background_weight=0), 'background_weight'),
    ('ChenClassLoss', dict(background_weight=float('nan')), 'background_weight'),
    ('ChenClassLoss', dict(tau=-1), 'tau'),
    ('ChenBoxLoss', dict(margin=float('inf')), 'margin'),
    ('ChenBoxLoss', dict(divisor='all'), "'sampled', 'positive'")])
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type=kind, **options))


def test_bad_inputs():
    for kind in ('ChenClassLoss', 'ChenBoxLoss'):
        with pytest.raises(ValueError, match=f'{kind}, level 0: .*rows of proposals are needed'):
            build(dict(type=kind))(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    rows = torch.zeros(2, 4)
    with pytest.raises(ValueError, match='needs the target of every box'):
        build(dict(type='ChenBoxLoss'))(rows, rows)
    with pytest.raises(ValueError, match=r'row_targets of shape \(3, 4\) for box deltas \(2, 4\)'):
        build(dict(type='ChenBoxLoss'))(rows, rows, KDBatch(row_targets=torch.zeros(3, 4)))
