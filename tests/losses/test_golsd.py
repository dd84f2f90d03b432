"""GO-LSD: values worked out by hand."""

import math

import pytest
import torch

from kd_mm.losses.golsd import balanced_mean
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import Assignment, DenseView

KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of (3/4, 1/4) to (1/2, 1/2)
SCORE = math.log(3)  # sigmoid: 3/4


def views(matched=(True, False), weights=(1.0, 1.0), tau=1.0, scores=(9.0, SCORE), box=(0.0, 0.0, 2.0, 4.0)):
    """Two predictions in two levels; every side has KL, at temperature 1 times tau."""
    labels = [torch.tensor([[0 if m else 2]]) for m in matched]
    host = Assignment(labels, [torch.tensor([[w]]) for w in weights], 2,
                      [torch.tensor([[0 if m else -1]]) for m in matched])
    own = [torch.zeros(1, 1, 4, 2).double().requires_grad_() for _ in matched]
    theirs = [(torch.tensor([math.log(3) * tau, 0.0]).double()).expand(1, 1, 4, 2) for _ in matched]
    logits = [torch.tensor([[[score, -9.0]]]).double() for score in scores]
    boxes = [torch.tensor([[box]]).double() for _ in matched]
    return (DenseView([torch.zeros(1, 1, 2).double() for _ in matched], boxes, own, assignment=host),
            DenseView(logits, distributions=theirs)), own


BATCH = KDBatch(boxes=[torch.tensor([[0.0, 0.0, 2.0, 2.0]]).double()], input_shape=(8, 8))


@pytest.mark.parametrize('options, expected', [
    # IoU 1/2 for the matched one, score 3/4 for the other; one row of each kind: half and half
    (dict(), KL * (0.5 + 0.75) / 2),
    (dict(weights=(1.0, 0.0)), KL * 0.5),  # an ignored prior is in neither group
    (dict(matched=(True, True)), KL * 0.5),
    (dict(matched=(False, False), scores=(0.0, SCORE)), KL * (0.5 + 0.75) / 2),
    (dict(box=(0.0, 0.0, 2.0, 2.0)), KL * (1.0 + 0.75) / 2),
    (dict(weights=(0.0, 0.0)), 0.0),
])
def test_closed_form(options, expected):
    pair, own = views(**options)
    loss = build(dict(type='GOLSDLoss', tau=1.0, loss_weight=1.0))(*pair, BATCH)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(torch.isfinite(level.grad).all() for level in own)


def test_temperature():
    pair, _ = views(tau=5.0)
    assert build(dict(type='GOLSDLoss', tau=5.0, loss_weight=1.5))(*pair, BATCH).item() == pytest.approx(
        1.5 * 25 * KL * (0.5 + 0.75) / 2)


def test_balance():
    """Nine unmatched rows against one matched: weights 1 and 3."""
    values = torch.tensor([4.0] + [1.0] * 9)
    matched = torch.arange(10) == 0
    everything = torch.ones(10).bool()
    assert balanced_mean(values, matched, everything).item() == pytest.approx((4 * 1 + 1 * 3) / 4)
    assert balanced_mean(values, matched, matched).item() == 4
    assert balanced_mean(values, ~everything, ~everything).item() == 0


def test_the_weight_has_no_gradient():
    pair, _ = views()
    boxes = [box.clone().requires_grad_() for box in pair[0].boxes]
    student = DenseView(pair[0].logits, boxes, pair[0].distributions, assignment=pair[0].assignment)
    build(dict(type='GOLSDLoss'))(student, pair[1], BATCH).backward()
    assert all(box.grad is None for box in boxes)


def test_images_without_objects():
    pair, _ = views(matched=(False, False))
    empty = KDBatch(boxes=[torch.zeros(0, 4)], input_shape=(8, 8))
    loss = build(dict(type='GOLSDLoss', tau=1.0, loss_weight=1.0))(*pair, empty)
    assert loss.item() == pytest.approx(KL * (torch.tensor(9.0).sigmoid().item() + 0.75) / 2)


def test_equal_distributions():
    pair, _ = views()
    same = DenseView(pair[1].logits, distributions=pair[0].distributions)
    loss = build(dict(type='GOLSDLoss'))(pair[0], same, BATCH)
    assert loss.item() == 0 and loss.requires_grad


@pytest.mark.parametrize('tau', [0, -1])
def test_bad_options(tau):
    with pytest.raises(ValueError, match='must be above 0'):
        build(dict(type='GOLSDLoss', tau=tau))


def test_heads_that_do_not_fit():
    (student, teacher), _ = views()
    loss = build(dict(type='GOLSDLoss'))
    plain = DenseView(teacher.logits)
    with pytest.raises(ValueError, match='predicts no box distributions'):
        loss(student, plain, BATCH)
    wide = DenseView(teacher.logits, distributions=[torch.zeros(1, 1, 4, 5)] * 2)
    with pytest.raises(ValueError, match=r'\[2, 2\] bins of head and \[5, 5\] of head'):
        loss(student, wide, BATCH)
    student.assignment.objects = None
    with pytest.raises(ValueError, match='does not tell which object'):
        loss(student, teacher, BATCH)
