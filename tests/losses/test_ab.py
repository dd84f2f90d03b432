import pytest
import torch

from kd_mm.losses.ab import boundary_gap
from kd_mm.registry import build

SWEEP = {'ABLoss': dict(skip=dict(
    test_zero_for_equal_inputs='an active cell of the teacher asks for a margin above the boundary'))}


def value(student, teacher, **options):
    return build(dict(type='ABLoss', **options))(student, teacher).item()


def test_every_case_by_hand():
    #                        active teacher: below, at, above   silent teacher: below, at, above; at the boundary
    student = torch.tensor([-0.5, 1.0, 3.0, -2.0, -1.0, 0.5, 0.5])
    teacher = torch.tensor([0.1, 9.0, 0.1, -0.1, -9.0, -0.1, 0.0])
    assert boundary_gap(student, teacher, 1.0).tolist() == [2.25, 0.0, 0.0, 0.0, 0.0, 2.25, 2.25]
    assert boundary_gap(student, teacher, 2.0).tolist() == [6.25, 1.0, 0.0, 0.0, 1.0, 6.25, 6.25]


def test_only_the_sign_of_the_teacher_counts():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert value(student, teacher) == pytest.approx(value(student, 100 * teacher))
    assert value(student, teacher) != pytest.approx(value(student, -teacher))


def test_zero_beyond_the_margin():
    teacher = torch.randn(2, 3, 4, 5)
    assert value(1.5 * teacher.sign(), teacher) == 0.0


def test_reductions():
    student, teacher = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    assert value(student, teacher, margin=2.0) == 4.0
    assert value(student, teacher, margin=2.0, reduction='batch_mean', loss_weight=0.5) == 0.5 * 4.0 * 60


def test_region_is_the_loss_of_its_cells():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5)
    mask[:, :, 1:3, :4] = 1
    inside = student[:, :, 1:3, :4], teacher[:, :, 1:3, :4]
    for reduction in ('mean', 'batch_mean'):
        loss = build(dict(type='ABLoss', reduction=reduction))
        found = loss.per_level(student, teacher, None, lambda features, batch: (mask, ))[0]
        assert found.item() == pytest.approx(loss(*inside).item(), rel=1e-12)


@pytest.mark.parametrize('options', [dict(margin=0), dict(margin=-1.0), dict(reduction='sum')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='ABLoss', **options))
