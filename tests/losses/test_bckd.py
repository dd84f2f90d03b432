"""BCKD: values worked out by hand."""

import math

import pytest
import torch

from kd_mm.registry import build
from kd_mm.types.dense import Assignment, DenseView

LOGIT = math.log(3)  # sigmoid: 3/4
BOX = torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
OTHER = torch.tensor([0.0, 0.0, 2.0, 4.0], dtype=torch.float64)  # IoU and GIoU with BOX 1/2
BCE = math.log(2)  # of logit 0, whatever the target
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)


def views(weights=((1.0, 1.0, 0.0), ), positives=2.0, classes=2):
    """One level of three priors; all logits 0 against a teacher whose first class has 3/4."""
    weights = torch.tensor(weights, dtype=torch.float64)
    host = Assignment((torch.zeros(weights.shape, dtype=torch.long), ), (weights, ), classes,
                      num_pos=torch.tensor(positives))
    logits = torch.zeros(*weights.shape, classes).double()
    theirs = logits.clone()
    theirs[..., 0] = LOGIT
    shape = (*weights.shape, 4)
    return (DenseView([logits.requires_grad_()], [BOX.expand(shape).clone().requires_grad_()], assignment=host),
            DenseView([theirs], [OTHER.expand(shape)]))


@pytest.mark.parametrize('options, expected', [
    # two priors count; |d| is 1/4 for the first class and 0 for the second; GIoU loss 1/2
    ({}, (2 * 0.25 * BCE + 4 * 2 * 0.25 * 0.5) / 2),
    (dict(box_weight=0), 0.25 * BCE),
    (dict(class_weight=0, box_weight=1), 0.25 * 0.5),
    (dict(box_weight=0, beta=2), 0.25**2 * BCE),
    (dict(box_weight=0, beta=0), BCE * 2),
    (dict(box_weight=0, beta=0, divergence='kl'), KL),
])
def test_closed_form(options, expected):
    assert build(dict(type='BCKDLoss', **options))(*views()).item() == pytest.approx(expected, rel=1e-12)


def test_the_number_of_positives_divides():
    loss = build(dict(type='BCKDLoss'))
    assert loss(*views(positives=8.0)).item() == pytest.approx(loss(*views()).item() / 4)


def test_nothing_ignored_counts():
    loss = build(dict(type='BCKDLoss'))(*views(weights=((0.0, 0.0, 0.0), )))
    assert loss.item() == 0


def test_equal_views_have_no_gradient():
    student, _ = views()
    build(dict(type='BCKDLoss'))(student, student).backward()
    assert student.logits[0].grad.abs().sum() == 0 and student.boxes[0].grad.abs().sum() == 0


def test_gradients():
    """Scores hear the class term alone, boxes the box term, the teacher nothing."""
    student, teacher = views()
    for rows in (*teacher.logits, *teacher.boxes):
        rows.requires_grad_()
    build(dict(type='BCKDLoss', class_weight=0))(student, teacher).backward()
    assert student.logits[0].grad is None or student.logits[0].grad.abs().sum() == 0
    assert student.boxes[0].grad[0, 2].abs().sum() == 0 and student.boxes[0].grad[0, 0].abs().sum() > 0
    assert all(rows.grad is None for rows in (*teacher.logits, *teacher.boxes))


def test_levels():
    one, two = views(), views(weights=((1.0, 1.0, 1.0), ))
    student = DenseView([one[0].logits[0], two[0].logits[0]], [one[0].boxes[0], two[0].boxes[0]], assignment=Assignment(
        one[0].assignment.labels * 2, (one[0].assignment.weights[0], two[0].assignment.weights[0]), 2,
        num_pos=torch.tensor(2.0)))
    teacher = DenseView(one[1].logits * 2, one[1].boxes * 2)
    levels = build(dict(type='BCKDLoss')).per_level(student, teacher)
    assert levels[1].item() == pytest.approx(1.5 * levels[0].item())


def test_half_range_is_finite():
    student, teacher = views()
    wide = DenseView([student.logits[0] + 6e4], student.boxes, assignment=student.assignment)
    assert torch.isfinite(build(dict(type='BCKDLoss'))(wide, teacher))


@pytest.mark.parametrize('options, message', [
    (dict(beta=0.5), 'beta'), (dict(class_weight=-1), 'negative'), (dict(class_weight=0, box_weight=0), 'one above 0'),
    (dict(divergence='js'), 'divergence')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='BCKDLoss', **options))


def test_views_that_do_not_fit():
    loss, (student, teacher) = build(dict(type='BCKDLoss')), views()
    softmax = [DenseView(view.logits, view.boxes, assignment=view.assignment, sigmoid=False)
               for view in (student, teacher)]
    with pytest.raises(ValueError, match='softmax classes'):
        loss(*softmax)
    with pytest.raises(ValueError, match='predicts no boxes'):
        loss(student, DenseView(teacher.logits))
    with pytest.raises(ValueError, match='the classes must be the same'):
        loss(student, DenseView([torch.zeros(1, 3, 5)], teacher.boxes))
    with pytest.raises(ValueError, match='same number of anchors'):
        loss(student, DenseView([torch.zeros(1, 9, 2)], teacher.boxes))
    with pytest.raises(ValueError, match='1 levels of head and 2 of'):
        loss(student, DenseView(teacher.logits * 2, teacher.boxes * 2))
    with pytest.raises(ValueError, match='takes no region'):
        loss(student, teacher, None, torch.nn.Identity())
    assert build(dict(type='BCKDLoss', box_weight=0))(student, DenseView(teacher.logits)) > 0
