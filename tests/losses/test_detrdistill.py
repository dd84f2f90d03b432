"""DETRDistill: values worked out by hand."""

import math

import pytest
import torch

from kd_mm.losses.detrdistill import clipped, focal_loss
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import QueryAssignment, QueryView

LOGIT = math.log(3)  # sigmoid: 3/4
CE = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # of equal scores 3/4
BOX, FAR = [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]
TALL = [0.25, 0.5, 0.5, 1.0]  # L1 0.75 to BOX, IoU and GIoU 1/2


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def view(logits, boxes, **parts):
    """One decoder layer, one image."""
    return QueryView(tensor(logits)[None, None].requires_grad_(), tensor(boxes)[None, None].requires_grad_(), **parts)


BATCH = KDBatch(img_shapes=[(80, 40)], input_shape=(96, 48))


# ---------------------------------------------------------------- matched logits


@pytest.mark.parametrize('options, expected', [
    # Queries are in another order; one box is twice as tall.
    (dict(), (2 * CE + 5 * 0.75 + 2 * 0.5) / 2),
    (dict(class_weight=0), (5 * 0.75 + 2 * 0.5) / 2),
    (dict(l1_weight=0, giou_weight=0), CE),
    (dict(l1_weight=0, giou_weight=0, divergence='kl'), 0.0),
    (dict(class_weight=0, l1_weight=0, giou_weight=1), 0.25),
])
def test_matched_logits(options, expected):
    student = view([[LOGIT], [-LOGIT]], [BOX, FAR])
    teacher = view([[-LOGIT], [LOGIT]], [FAR, TALL])
    loss = build(dict(type='DETRDistillLogitsLoss', **options))
    assert loss.match(student, teacher).tolist() == [[[1, 0]]]
    assert loss(student, teacher, BATCH).item() == pytest.approx(expected, abs=1e-9)


def test_giou_is_the_same_in_any_frame():
    loss = build(dict(type='DETRDistillLogitsLoss'))
    pair = view([[0.0]], [[0.3, 0.3, 0.2, 0.4]]), view([[0.0]], [[0.4, 0.3, 0.3, 0.2]])
    assert loss(*pair).item() == pytest.approx(loss(*pair, BATCH).item(), rel=1e-12)


@pytest.mark.parametrize('weights, expected', [
    ((1, 0, 0), [1, 0]),  # by class
    ((0, 5, 2), [0, 1]),  # by place
    ((0.1, 5, 2), [0, 1]), ((100, 5, 2), [1, 0])])
def test_match_weights(weights, expected):
    student, teacher = view([[LOGIT], [-LOGIT]], [BOX, FAR]), view([[-LOGIT], [LOGIT]], [BOX, FAR])
    loss = build(dict(type='DETRDistillLogitsLoss', match_weights=weights))
    assert loss.match(student, teacher)[0, 0].tolist() == expected


def test_boxes_of_the_teacher_end_at_the_border():
    assert clipped(tensor([0.0, 0.5, 1.0, 3.0])).tolist() == [0.25, 0.5, 0.5, 1.0]
    loss = build(dict(type='DETRDistillLogitsLoss', class_weight=0))
    assert loss(view([[0.0]], [TALL]), view([[0.0]], [[0.25, 0.5, 0.5, 4.0]]), BATCH).item() == pytest.approx(0)


def test_more_queries_than_the_teacher_has():
    """The one without partner learns nothing, and does not count."""
    student = view([[LOGIT], [0.0], [-LOGIT]], [BOX, [0.5, 0.5, 0.1, 0.1], FAR])
    teacher = view([[-LOGIT], [LOGIT]], [FAR, BOX])
    loss = build(dict(type='DETRDistillLogitsLoss'))
    value = loss(student, teacher, BATCH)
    assert value.item() == pytest.approx(CE)
    value.backward()
    assert student.logits.grad[0, 0, 1].abs().sum() == 0 and student.boxes.grad[0, 0, 1].abs().sum() == 0
    assert loss(teacher, student, BATCH).isfinite()


def test_softmax_heads():
    """Classes with "no object" are one distribution."""
    logits = [[math.log(2), 0.0]]  # 2/3, 1/3
    pair = [view(values, [BOX], sigmoid=False) for values in ([[0.0, 0.0]], logits)]
    loss = build(dict(type='DETRDistillLogitsLoss'))
    assert loss(*pair, BATCH).item() == pytest.approx(math.log(2))
    kl = build(dict(type='DETRDistillLogitsLoss', divergence='kl'))(*pair, BATCH).item()
    assert kl == pytest.approx(math.log(2) + 2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    mixed = [view([[0.0, 3.0], [3.0, 0.0]], [BOX, BOX], sigmoid=False),
             view([[3.0, 0.0], [0.0, 3.0]], [BOX, BOX], sigmoid=False)]
    assert loss.match(*mixed).tolist() == [[[1, 0]]]


def test_layers_are_matched_by_themselves():
    one, two = view([[LOGIT], [-LOGIT]], [BOX, FAR]), view([[-LOGIT], [LOGIT]], [FAR, BOX])
    both = [QueryView(torch.cat([a.logits, b.logits]), torch.cat([a.boxes, b.boxes]))
            for a, b in ((one, one), (one, two))]
    loss = build(dict(type='DETRDistillLogitsLoss', loss_weight=[1.0, 10.0]))
    assert loss.match(*both).flatten().tolist() == [0, 1, 1, 0]
    assert loss(*both, BATCH).item() == pytest.approx(11 * CE)


# ---------------------------------------------------------------- target-aware features


def feature_views(scores=(0.0, -99.0), queries=((1.0, 0.0), (0.0, 1.0)), **parts):
    """Two cells: the first is along the first axis, the second along the second; the student has zeros."""
    theirs = tensor([[[3.0, 0.0]], [[0.0, 2.0]]])[None]
    own = torch.zeros_like(theirs).requires_grad_()
    teacher = QueryView(tensor(scores)[None, None, :, None], tensor([BOX, FAR])[None, None],
                        tensor(queries)[None, None], memory=[theirs], neck=[theirs * 2])
    return QueryView(torch.zeros(1, 1, 2, 1).double(), memory=[own], neck=[own]), teacher


def truth(*boxes):
    return KDBatch(boxes=[tensor(boxes).reshape(-1, 4)], img_shapes=[(40, 40)], input_shape=(40, 40))


@pytest.mark.parametrize('boxes, options, first, second', [
    # One sure query on the object: its cosine is 1 in the first cell and 0 (the floor) in the second.
    ([[0., 0., 20., 20.]], dict(top=1), 1.0, 0.01 / 0.5),
    ([[0., 0., 20., 20.]], dict(top=1, floor=0.25), 1.0, 0.5),
    # Half the overlap halves the weight, and with it the mask before the floor.
    ([[0., 0., 20., 40.]], dict(top=1, floor=0.05), 1.0, 0.05 / 0.25),
    # The best of several boxes counts; without any the score alone does.
    ([[0., 0., 20., 40.], [0., 0., 20., 20.]], dict(top=1, floor=0.05), 1.0, 0.1),
    ([], dict(top=1, floor=0.05), 1.0, 0.1),
])
def test_features(boxes, options, first, second):
    student, teacher = feature_views()
    loss = build(dict(type='DETRDistillFeatureLoss', **options))(student, teacher, truth(*boxes))
    assert loss.item() == pytest.approx(((3 * first)**2 + (2 * second)**2) / 4)


def test_features_of_the_neck():
    student, teacher = feature_views()
    loss = build(dict(type='DETRDistillFeatureLoss', features='neck', top=1))(
        student, teacher, truth([0., 0., 20., 20.]))
    assert loss.item() == pytest.approx((36 + 16 * 0.02**2) / 4)


def test_a_query_counts_once_a_class():
    """The best (query, class) pairs, not the best queries."""
    student, teacher = feature_views()
    teacher.logits = tensor([[[[0.0, 0.0], [-9.0, -9.0]]]])
    weights, query = build(dict(type='DETRDistillFeatureLoss', top=2)).query_weights(teacher, truth([0., 0., 20., 20.]))
    assert query.tolist() == [[[0, 0]]] and weights.tolist() == [[[0.5, 0.5]]]


def test_an_image_without_objects_beside_one_with():
    """Its boxes are fillers, and the score alone counts."""
    student, teacher = feature_views()
    teacher = QueryView(torch.cat([teacher.logits] * 2, dim=1), torch.cat([teacher.boxes] * 2, dim=1),
                        torch.cat([teacher.queries] * 2, dim=1), memory=teacher.memory)
    batch = KDBatch(boxes=[tensor([[0., 0., 20., 40.]]), torch.zeros(0, 4)], img_shapes=[(40, 40)] * 2,
                    input_shape=(40, 40))
    weights, _ = build(dict(type='DETRDistillFeatureLoss', top=1)).query_weights(teacher, batch)
    assert weights.flatten().tolist() == pytest.approx([0.25, 0.5])


def test_the_length_of_a_query_means_nothing():
    short = build(dict(type='DETRDistillFeatureLoss'))(*feature_views(), truth([0., 0., 20., 20.]))
    long = build(dict(type='DETRDistillFeatureLoss'))(
        *feature_views(queries=((7.0, 0.0), (0.0, 9.0))), truth([0., 0., 20., 20.]))
    assert short.item() == pytest.approx(long.item())


def test_features_of_several_layers_and_levels_add_up():
    student, teacher = feature_views()
    one = build(dict(type='DETRDistillFeatureLoss'))(student, teacher, truth([0., 0., 20., 20.]))
    twice = QueryView(torch.cat([teacher.logits] * 2), torch.cat([teacher.boxes] * 2), torch.cat([teacher.queries] * 2),
                      memory=teacher.memory * 2)
    student.memory = student.memory * 2
    # Another number of layers than the student has: only the teacher's matter.
    loss = build(dict(type='DETRDistillFeatureLoss'))(student, twice, truth([0., 0., 20., 20.]))
    assert loss.item() == pytest.approx(4 * one.item())
    loss.backward()
    assert student.memory[0].grad.abs().sum() > 0


def test_equal_features_give_zero():
    student, teacher = feature_views()
    student.memory = teacher.memory
    assert build(dict(type='DETRDistillFeatureLoss'))(student, teacher, truth([0., 0., 20., 20.])).item() == 0


# ---------------------------------------------------------------- query prior


def test_focal_loss():
    assert focal_loss(tensor([[LOGIT, -LOGIT]]), torch.tensor([0])).item() == pytest.approx(
        0.25 * 0.25**2 * -math.log(0.75) + 0.75 * 0.25**2 * -math.log(0.75))
    assert focal_loss(tensor([[LOGIT]]), torch.tensor([1])).item() == pytest.approx(
        0.75 * 0.75**2 * -math.log(0.25))  # no object
    assert focal_loss(tensor([[0.0]]), torch.tensor([0]), alpha=1.0, gamma=0.0).item() == pytest.approx(math.log(2))


def prior_views(objects=((0, -1), ), labels=((0, 1), ), number=1.0):
    found = QueryAssignment(torch.tensor(labels)[None], torch.tensor(objects)[None], 1, torch.tensor([number]))
    return view([[0.0], [0.0]], [TALL, FAR]), view([[0.0], [0.0]], [FAR, FAR], assignment=found)


@pytest.mark.parametrize('options, expected', [
    (dict(), 2 * (0.25 + 0.75) / 4 * math.log(2) + 5 * 0.75 + 2 * 0.5),
    (dict(class_weight=0), 5 * 0.75 + 2 * 0.5),
    (dict(class_weight=1, l1_weight=0, giou_weight=0, alpha=1.0, gamma=0.0), math.log(2)),
])
def test_query_prior(options, expected):
    """The assignment is the teacher's; what the student predicts has no say in it."""
    batch = KDBatch(boxes=[tensor([[0., 0., 20., 20.]])], img_shapes=[(40, 40)], input_shape=(64, 64))
    loss = build(dict(type='DETRDistillQueryPriorLoss', **options))
    assert loss(*prior_views(), batch).item() == pytest.approx(expected)
    assert loss(*prior_views(number=4.0), batch).item() == pytest.approx(expected / 4)


def test_query_prior_without_objects():
    batch = KDBatch(boxes=[torch.zeros(0, 4)], img_shapes=[(40, 40)], input_shape=(64, 64))
    loss = build(dict(type='DETRDistillQueryPriorLoss'))(*prior_views(((-1, -1), ), ((1, 1), )), batch)
    assert loss.item() == pytest.approx(2 * 2 * 0.75 / 4 * math.log(2))


def test_query_prior_needs_an_assignment():
    student, teacher = prior_views()
    teacher.assignment = None
    batch = KDBatch(boxes=[tensor([[0., 0., 20., 20.]])], img_shapes=[(40, 40)], input_shape=(64, 64))
    with pytest.raises(ValueError, match='neither head has an assigner'):
        build(dict(type='DETRDistillQueryPriorLoss'))(student, teacher, batch)
    student, teacher = prior_views()
    with pytest.raises(ValueError, match='for predictions of'):
        build(dict(type='DETRDistillQueryPriorLoss'))(view([[0.0]], [BOX]), teacher, batch)


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize('name', ['DETRDistillLogitsLoss', 'DETRDistillFeatureLoss', 'DETRDistillQueryPriorLoss'])
def test_gradient_goes_to_the_student_only(name):
    generator = torch.Generator().manual_seed(0)

    def random_view():
        logits, boxes, queries, memory = (torch.rand(shape, generator=generator).requires_grad_() for shape in (
            (2, 2, 5, 3), (2, 2, 5, 4), (2, 2, 5, 8), (2, 8, 4, 4)))
        return QueryView(logits, boxes, queries, memory=[memory]), (logits, boxes, queries, memory)

    (student, own), (teacher, theirs) = random_view(), random_view()
    objects = torch.tensor([[[0, -1, -1, -1, 1], [-1] * 5]] * 2)
    teacher.assignment = QueryAssignment(torch.where(objects >= 0, 1, 3), objects, 3, torch.tensor([2.0, 2.0]))
    batch = KDBatch(boxes=[tensor([[0., 0., 9., 9.], [3., 3., 9., 9.]]).float(), torch.zeros(0, 4)],
                    img_shapes=[(16, 16), (12, 16)], input_shape=(16, 16))
    build(dict(type=name))(student, teacher, batch).backward()
    assert all(part.grad is None for part in theirs)
    reached = [part.grad is not None and bool(part.grad.abs().sum() > 0) for part in own]
    assert reached == ([False, False, False, True] if 'Feature' in name else [True, True, False, False])


@pytest.mark.parametrize('options, message', [
    (dict(type='DETRDistillLogitsLoss', class_weight=-1), 'must not be negative'),
    (dict(type='DETRDistillLogitsLoss', class_weight=0, l1_weight=0, giou_weight=0), 'one above 0'),
    (dict(type='DETRDistillLogitsLoss', match_weights=(1, 2)), 'three factors'),
    (dict(type='DETRDistillLogitsLoss', divergence='js'), "divergence='js' is not one of"),
    (dict(type='DETRDistillFeatureLoss', top=0), 'whole number from 1'),
    (dict(type='DETRDistillFeatureLoss', floor=0), 'floor=0 must be above 0'),
    (dict(type='DETRDistillFeatureLoss', features='backbone'), "features='backbone' is not one of"),
    (dict(type='DETRDistillQueryPriorLoss', alpha=2), 'within 0..1'),
    (dict(type='DETRDistillQueryPriorLoss', gamma=-1), 'from 0'),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(options)


def test_views_that_do_not_fit():
    loss = build(dict(type='DETRDistillLogitsLoss'))
    one = QueryView(torch.zeros(1, 2, 3, 4), torch.rand(1, 2, 3, 4))
    with pytest.raises(ValueError, match='give two QueryViews'):
        loss(torch.zeros(1), one)
    with pytest.raises(ValueError, match='2 decoder layers of head and 1 of head'):
        loss(QueryView(torch.zeros(2, 2, 3, 4), torch.rand(2, 2, 3, 4)), one)
    with pytest.raises(ValueError, match='1 images of the student and 2'):
        loss(QueryView(torch.zeros(1, 1, 3, 4), torch.rand(1, 1, 3, 4)), one)
    with pytest.raises(ValueError, match='5 class logits'):
        loss(QueryView(torch.zeros(1, 2, 3, 5), torch.rand(1, 2, 3, 4)), one)
    with pytest.raises(ValueError, match='takes no region'):
        loss(one, one, region=torch.nn.Identity())
    with pytest.raises(ValueError, match='softmax'):
        build(dict(type='DETRDistillQueryPriorLoss'))(*[QueryView(one.logits, one.boxes, sigmoid=False)] * 2)
    student, teacher = feature_views()
    teacher.queries = None
    with pytest.raises(ValueError, match="needs the teacher's queries"):
        build(dict(type='DETRDistillFeatureLoss'))(student, teacher, truth())
    with pytest.raises(ValueError, match='must have the same shapes'):
        build(dict(type='DETRDistillFeatureLoss'))(one, one, truth())


def test_half_precision_of_the_host():
    """What a view of half precision gives is lifted where it is made; the losses stay finite on large logits."""
    wild = QueryView(torch.randn(1, 2, 4, 3) * 200, torch.rand(1, 2, 4, 4))
    calm = QueryView(torch.randn(1, 2, 4, 3), torch.rand(1, 2, 4, 4) * 0.001)
    for pair in ((wild, calm), (calm, wild)):
        assert torch.isfinite(build(dict(type='DETRDistillLogitsLoss'))(*pair))
