import pytest
import torch

from kd_mm.losses.gid import normalised_distances, select_instances
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import DenseView

#: three boxes of two columns each, apart from one another
BATCH = KDBatch(input_shape=(16, 48), boxes=[
    torch.tensor([[0.0, 0.0, 16.0, 16.0], [16.0, 0.0, 32.0, 16.0], [32.0, 0.0, 48.0, 16.0]])])

SWEEP = {'GIDLoss': dict(skip=dict(
    test_the_batch_twice_is_what_the_reduction_says='a box and its copy are one more pair, at distance 0'))}


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
    batch = KDBatch(input_shape=(16, 48), boxes=[BATCH.targets.boxes[0][:2]])
    terms = build(dict(type='GIDLoss', size=1)).terms(0, maps(0.0, 2.0, 3.0), maps(0.0, 1.0, 3.0), batch)
    assert terms['relation'].item() == 0 and terms['feature'].item() == pytest.approx(0.5)


def test_equal_rows_have_a_finite_gradient():
    rows = torch.ones(4, 3, requires_grad=True)
    normalised_distances(rows).sum().backward()
    assert rows.grad.isfinite().all()


def test_the_batch_twice_has_pairs_of_a_box_and_its_copy():
    """They are at distance 0 on both sides: a sum 4 times as large over 2M (2M - 1) pairs instead of M (M - 1)."""
    loss = build(dict(type='GIDLoss', size=1))
    student, teacher = (torch.randn(1, 600, 2, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    boxes = BATCH.targets.boxes[0]
    once = loss.terms(0, student, teacher, BATCH)['relation'].item()
    twice = loss.terms(0, student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1),
                       KDBatch(input_shape=(16, 48), boxes=[boxes, boxes]))['relation'].item()
    assert once > 0 and twice == pytest.approx(once * 2 * (len(boxes) - 1) / (2 * len(boxes) - 1), rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_rows_are_at_distance_0_and_not_in_the_mean(dtype):
    rows = torch.randn(5, 600, generator=torch.Generator().manual_seed(0), dtype=dtype)
    twice = normalised_distances(torch.cat([rows, rows]))
    assert torch.equal(twice[:5, 5:].diagonal(), torch.zeros(5, dtype=dtype))
    torch.testing.assert_close(twice[:5, :5], normalised_distances(rows), rtol=1e-4, atol=0)


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


def views(ours, theirs, boxes, images=2, **more):
    """Two heads that say the same about every image but for the order of the priors."""
    rows = [[torch.stack([part.roll(image, 0) for image in range(images)]).split(2, dim=1)
             for part in (scores.logit(), where)] for scores, where in ((ours, boxes), (theirs, boxes + 0.5))]
    return [DenseView(logits, boxes=where, **more) for logits, where in rows]


def test_instances_of_both_heads():
    ours = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.2, 0.2], [0.5, 0.5]])
    theirs = torch.tensor([[0.1, 0.2], [0.2, 0.9], [0.7, 0.1], [0.5, 0.4]])
    boxes = torch.tensor([[-5.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [21.0, 0.0, 31.0, 10.0],
                          [50.0, 0.0, 90.0, 9.0]])
    loss = build(dict(type='GIDLoss', heads_at='bbox_head'))
    assert not loss.needs_boxes and build(dict(type='GIDLoss')).needs_boxes
    found = loss.choose_instances(*views(ours, theirs, boxes), KDBatch(input_shape=(16, 64)))
    # Cut to the input; the same in each image, whatever the order of its priors.
    expected = [[0.0, 0.0, 10.0, 10.0], [20.5, 0.5, 30.5, 10.5], [50.0, 0.0, 64.0, 9.0]]
    assert [part.tolist() for part in found] == [expected, expected]
    one = build(dict(type='GIDLoss', heads_at='bbox_head', count=1, iou=0.0))
    assert [len(part) for part in one.choose_instances(*views(ours, theirs, boxes), KDBatch(input_shape=(16, 64)))] \
        == [1, 1]


def test_instances_of_softmax_heads_leave_the_background_out():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    ours = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]]])
    theirs = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 4.0, 0.0]]])
    heads = [DenseView([logits], boxes=[boxes[None]], sigmoid=False) for logits in (ours, theirs)]
    loss = build(dict(type='GIDLoss', heads_at='rpn_head', count=1))
    assert loss.choose_instances(*heads, KDBatch(input_shape=(16, 64)))[0].tolist() == [boxes[1].tolist()]


def test_boxes_without_an_area_and_few_candidates():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [0.0, 0.0, 4.0, 4.0], [8.0, 0.0, 12.0, 4.0]])
    ours, theirs = torch.tensor([[0.9], [0.3], [0.2]]), torch.zeros(3, 1)
    assert select_instances(ours, theirs, boxes, boxes).tolist() == boxes[1:].tolist()
    assert select_instances(ours, theirs, boxes, boxes, candidates=1).tolist() == boxes[1:2].tolist()
    assert select_instances(ours[:1], theirs[:1], boxes[:1], boxes[:1]).shape == (0, 4)


def test_heads_with_other_priors():
    first, second = DenseView([torch.zeros(1, 4, 2)]), DenseView([torch.zeros(1, 6, 2)])
    with pytest.raises(ValueError, match='have other priors'):
        build(dict(type='GIDLoss', heads_at='bbox_head')).choose_instances(first, second, BATCH)


@pytest.mark.parametrize('options', [dict(feature=-1), dict(relation=-1), dict(size=0), dict(assign='one'),
                                     dict(scale=0), dict(count=0), dict(iou=2)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='GIDLoss', **options))
