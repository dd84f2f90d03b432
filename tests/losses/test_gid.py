import pytest
import torch

from kd_mm.losses.gid import normalised_distances, select_instances
from kd_mm.registry import build
from kd_mm.types import KDBatch

#: three boxes of two columns each, apart from one another
BATCH = KDBatch(input_shape=(16, 48), boxes=[
    torch.tensor([[0.0, 0.0, 16.0, 16.0], [16.0, 0.0, 32.0, 16.0], [32.0, 0.0, 48.0, 16.0]])])


def maps(*values):
    return torch.tensor(values).double().repeat_interleave(2).expand(1, 1, 2, 6).contiguous()


def test_closed_form():
    # One sampled point in the middle of each box: values 0, 1, 3 and 0, 2, 3, distances divided by their mean of 2.
    loss = build(dict(type='GIDLoss', size=1, feature=2.0, relation=3.0))
    student, teacher = maps(0.0, 2.0, 3.0), maps(0.0, 1.0, 3.0)
    terms = loss.terms(0, student, teacher, BATCH)
    assert terms['feature'].item() == pytest.approx(1 / 3)
    # d is (1, .5, 1.5) against (.5, 1, 1.5): two gaps of 1/2, each twice in the matrix, half of its square.
    assert terms['relation'].item() == pytest.approx(4 * 0.125 / 6)
    assert loss(student, teacher, BATCH).item() == pytest.approx(2 / 3 + 3 / 12)


def test_the_relation_is_free_of_scale_and_shift():
    student = maps(0.0, 1.0, 3.0)
    loss = build(dict(type='GIDLoss', size=1))
    assert loss.terms(0, 5 * student + 7, student, BATCH)['relation'].item() == pytest.approx(0, abs=1e-12)


def test_two_boxes_have_no_relation():
    batch = KDBatch(input_shape=(16, 48), boxes=[BATCH.boxes[0][:2]])
    terms = build(dict(type='GIDLoss', size=1)).terms(0, maps(0.0, 2.0, 3.0), maps(0.0, 1.0, 3.0), batch)
    assert terms['relation'].item() == 0 and terms['feature'].item() == pytest.approx(0.5)


def test_equal_rows_have_a_finite_gradient():
    rows = torch.ones(4, 3, requires_grad=True)
    normalised_distances(rows).sum().backward()
    assert rows.grad.isfinite().all()


def test_instances_are_where_the_predictions_differ():
    ours = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.2, 0.2], [0.5, 0.5]])
    theirs = torch.tensor([[0.1, 0.2], [0.2, 0.9], [0.7, 0.1], [0.5, 0.4]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [21.0, 0.0, 31.0, 10.0],
                          [50.0, 0.0, 60.0, 9.0]])
    # Gaps .7, .6, .5, 0: the first is the student's, the third overlaps the second.
    found = select_instances(ours, theirs, boxes, boxes + 0.5)
    assert found.tolist() == [boxes[0].tolist(), (boxes[1] + 0.5).tolist(), boxes[3].tolist()]
    assert len(select_instances(ours, theirs, boxes, boxes, count=1)) == 1
    given = KDBatch(input_shape=(16, 64), instances=[found])
    assert build(dict(type='GIDLoss'))(torch.ones(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), given) > 0


@pytest.mark.parametrize('options', [dict(feature=-1), dict(relation=-1), dict(size=0), dict(assign='one'),
                                     dict(scale=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='GIDLoss', **options))
