"""KD-DETR: values worked out by hand, and which decoder gets which points."""

import math

import pytest
import torch

from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import QueryView

LOGIT = math.log(3)  # sigmoid: 3/4
BOX, TALL = [0.25, 0.25, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]  # L1 0.75, GIoU 1/2
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # of 3/4 to 1/2
OTHER = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # of 1/4


def views():
    """Two points: the teacher is sure of the first (3/4) and not of the second (1/4)."""
    student = QueryView(torch.zeros(1, 1, 2, 1).double().requires_grad_(),
                        torch.tensor([[[BOX, BOX]]]).double().requires_grad_())
    teacher = QueryView(torch.tensor([[[[LOGIT], [-LOGIT]]]]).double().requires_grad_(),
                        torch.tensor([[[TALL, BOX]]]).double().requires_grad_())
    return student, teacher


@pytest.mark.parametrize('options, expected', [
    # weights 3/4 and 1/4 add up to 1
    (dict(), 0.75 * (KL + 5 * 0.75 + 2 * 0.5) + 0.25 * OTHER),
    (dict(weights='none'), (KL + 5 * 0.75 + 2 * 0.5 + OTHER) / 2),
    (dict(class_weight=0, giou_weight=0), 0.75 * 5 * 0.75),
    (dict(class_weight=0, l1_weight=0), 0.75 * 2 * 0.5),
    (dict(l1_weight=0, giou_weight=0, divergence='cross_entropy'), math.log(2)),
])
def test_closed_form(options, expected):
    student, teacher = views()
    batch = KDBatch(img_shapes=[(30, 50)], input_shape=(64, 64))
    loss = build(dict(type='KDDETRLoss', **options))(student, teacher, batch)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert teacher.logits.grad is None and teacher.boxes.grad is None
    assert all(part.grad is None or torch.isfinite(part.grad).all() for part in (student.logits, student.boxes))
    assert student.logits.grad is not None


def test_softmax_heads():
    """Without "no object" in the weight, with it in the divergence."""
    logits = torch.tensor([[[[math.log(2), 0.0]]]])
    pair = [QueryView(values, torch.tensor([[[BOX]]]), sigmoid=False) for values in (torch.zeros(1, 1, 1, 2), logits)]
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)  # 0.06, what is left of 0.19 and -0.14 in float32
    assert build(dict(type='KDDETRLoss'))(*pair).item() == pytest.approx(expected, rel=1e-5)
    sure = QueryView(torch.tensor([[[[99.0, 0.0], [0.0, 99.0]]]]), torch.tensor([[[BOX, TALL]]]), sigmoid=False)
    unsure = QueryView(torch.tensor([[[[99.0, 0.0], [0.0, 99.0]]]]), torch.tensor([[[BOX, BOX]]]), sigmoid=False)
    # The second point stands for nothing: its box does not count.
    assert build(dict(type='KDDETRLoss'))(unsure, sure).item() == pytest.approx(0, abs=1e-5)


def test_a_teacher_that_sees_nothing():
    student, teacher = views()
    teacher = QueryView(torch.full((1, 1, 2, 1), -1e5), teacher.boxes)
    loss = build(dict(type='KDDETRLoss'))(student, teacher)
    assert loss.item() == 0 and loss.requires_grad


class Decoder:
    """A decoder that says from which points it was started: the position is its answer."""

    def __init__(self):
        self.started = []

    def __call__(self, points):
        self.started.append(points['reference_points'])
        boxes = points['reference_points'].expand(2, -1, -1, -1)
        return QueryView(torch.zeros(*boxes.shape[:3], 3), boxes)


def decoding_views(queries=4):
    given = dict(query=torch.randn(1, queries, 8), reference_points=torch.rand(1, queries, 4))
    own, theirs = Decoder(), Decoder()
    # What the student predicts from its own queries has another number of them, and is not looked at.
    student = QueryView(torch.full((2, 1, 9, 3), 77.0), torch.rand(2, 1, 9, 4), decode=own)
    teacher = QueryView(torch.ones(2, 1, queries, 3), given['reference_points'].expand(2, -1, -1, -1), points=given,
                        decode=theirs)
    return student, teacher, own, theirs, given


@pytest.mark.parametrize('points, own_passes, their_passes', [
    ('specific', 1, 0), ('general', 1, 1), (('specific', 'general'), 2, 1)])
def test_which_decoder_runs_on_which_points(points, own_passes, their_passes):
    student, teacher, own, theirs, given = decoding_views()
    loss = build(dict(type='KDDETRLoss', points=points, general=6))
    loss(student, teacher, KDBatch(step=3, seed=1))
    assert (len(own.started), len(theirs.started)) == (own_passes, their_passes)
    if 'specific' in points:
        assert torch.equal(own.started[0], given['reference_points'])
    if 'general' in points:
        assert torch.equal(own.started[-1], theirs.started[-1]) and own.started[-1].shape == (1, 6, 4)


def test_general_points_depend_on_seed_and_step():
    def drawn(step, seed=0):
        torch.manual_seed(step)
        student, teacher, own, _, _ = decoding_views()
        build(dict(type='KDDETRLoss', points='general', general=6))(student, teacher, KDBatch(step=step, seed=seed))
        return own.started[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2)) and not torch.equal(drawn(1), drawn(1, seed=5))


def test_both_kinds_share_one_normaliser():
    student, teacher, _, _, given = decoding_views()
    shared = build(dict(type='KDDETRLoss', general=6)).shared_pass(student, teacher, KDBatch())
    assert shared[0].logits.shape == shared[1].logits.shape == (2, 1, 10, 3)
    assert torch.equal(shared[1].logits[:, :, :4], teacher.logits)


@pytest.mark.parametrize('options, message', [
    (dict(points=()), 'must be one or both of'), (dict(points=('random', )), "points='random' is not one of"),
    (dict(general=0), 'whole number from 1'), (dict(l1_weight=-1), 'must not be negative'),
    (dict(weights='teacher'), "weights='teacher' is not one of"), (dict(divergence='js'), "divergence='js'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='KDDETRLoss', **options))


def test_points_that_do_not_fit():
    student, teacher = views()
    with pytest.raises(ValueError, match='2 points of the student and 1 of the teacher'):
        build(dict(type='KDDETRLoss'))(student, QueryView(teacher.logits[:, :, :1], teacher.boxes[:, :, :1]))


def test_distributions_of_box_sides():
    """One side of one point: KL of (1/2, 1/2) from (3/4, 1/4) at tau 1; both weights of a point count."""
    def view(logits, values, **extra):
        sides = torch.zeros(1, 1, 2, 4, 2)
        sides[0, 0, 0, 0] = torch.tensor(values)
        boxes = torch.tensor([[BOX, BOX]]).expand(len(logits), 1, 2, 4)
        return QueryView(logits, boxes, distributions=sides.requires_grad_(), **extra)

    logits = torch.tensor([[[[LOGIT], [-LOGIT]]]]).expand(2, 1, 2, 1)
    student, teacher = view(logits, [0.0, 0.0]), view(logits, [LOGIT, 0.0])
    loss = build(dict(type='KDDETRLoss', distribution_weight=2.0, tau=1.0))(student, teacher)
    assert loss.item() == pytest.approx(2 * 0.75 * KL, rel=1e-5)  # the first layer has no distributions
    loss.backward()
    assert student.distributions.grad.abs().sum() > 0 and teacher.distributions.grad is None
    warm = build(dict(type='KDDETRLoss', distribution_weight=2.0))(student, teacher)
    cold = torch.tensor([LOGIT / 5, 0.0]).softmax(0)
    assert warm.item() == pytest.approx(2 * 25 * 0.75 * float((cold * (2 * cold).log()).sum()), rel=1e-4)
    with pytest.raises(ValueError, match='predicts no box distributions'):
        build(dict(type='KDDETRLoss', distribution_weight=1.0))(*views())
    teacher.distributions = torch.zeros(1, 1, 2, 4, 3)
    with pytest.raises(ValueError, match='2 bins and 3 of the teacher'):
        build(dict(type='KDDETRLoss', distribution_weight=1.0))(student, teacher)
