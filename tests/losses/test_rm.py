"""Rank mimicking: values worked out by hand."""

import math

import pytest
import torch

from kd_mm.losses.rm import grouped_log_softmax
from kd_mm.registry import build
from kd_mm.types.dense import Assignment, DenseView

LOGIT = math.log(3)
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)


def views(background=2):
    """Two levels, two images. Image 0: object 0 (class 1) has a prior in each level, object 1 (class 0) two in the
    second; image 1: object 0 has one prior, its rank is certain."""
    labels = (torch.tensor([[1, 2], [2, 0]]), torch.tensor([[1, 0, 0], [2, 2, 2]]))
    objects = (torch.tensor([[0, -1], [-1, 0]]), torch.tensor([[0, 1, 1], [-1, -1, -1]]))
    host = Assignment(labels, tuple(torch.ones(level.shape) for level in labels), background, objects)
    own = [torch.zeros(*level.shape, 2).double().requires_grad_() for level in labels]
    theirs = [torch.zeros(*level.shape, 2).double() for level in labels]
    theirs[1][0, 0, 1] = LOGIT  # object 0: (1/4, 3/4)
    theirs[1][0, 1, 1] = 50.0  # of another class: nobody looks
    theirs[0][0, 1] = 50.0  # a background prior
    return DenseView(own, assignment=host), DenseView(theirs)


@pytest.mark.parametrize('options, expected', [
    ({}, 4 * KL / 3),  # three objects, two of them without difference
    (dict(loss_weight=1.0), KL / 3)])
def test_closed_form(options, expected):
    assert build(dict(type='RMLoss', **options))(*views()).item() == pytest.approx(expected, rel=1e-9)


def test_temperature():
    student, teacher = views()
    teacher.logits[1][0, 0, 1] = 2 * LOGIT
    assert build(dict(type='RMLoss', tau=2.0, loss_weight=1.0))(student, teacher).item() == pytest.approx(4 * KL / 3)


def test_probabilities():
    q = math.exp(0.25) / (1 + math.exp(0.25))  # scores 3/4 and 1/2
    expected = (q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))) / 3
    loss = build(dict(type='RMLoss', scores='probability', loss_weight=1.0))
    assert loss(*views()).item() == pytest.approx(expected, rel=1e-9)


def test_only_the_order_counts():
    """A student that is as unsure by the same amount everywhere has nothing to learn."""
    student, teacher = views()
    shifted = DenseView([level - 7 for level in teacher.logits], assignment=student.assignment)
    assert build(dict(type='RMLoss'))(shifted, teacher).abs() < 1e-12


def test_gradient():
    student, teacher = views()
    teacher.logits[1].requires_grad_()
    build(dict(type='RMLoss'))(student, teacher).backward()
    first, second = (level.grad for level in student.logits)
    assert first[0, 0, 1] > 0 > second[0, 0, 1] and second[0, 1:].abs().sum() < 1e-12 and teacher.logits[1].grad is None
    assert first[0, 1].abs().sum() == 0 and first[1].abs().sum() == 0


def test_no_objects():
    student, teacher = views()
    labels = tuple(torch.full_like(level, 2) for level in student.assignment.labels)
    empty = DenseView(student.logits, assignment=Assignment(
        labels, student.assignment.weights, 2, tuple(torch.full_like(level, -1) for level in labels)))
    loss = build(dict(type='RMLoss'))(empty, teacher)
    loss.backward()
    assert loss.item() == 0 and student.logits[0].grad.abs().sum() == 0


def test_one_weight_for_all_levels():
    assert len(build(dict(type='RMLoss')).per_level(*views())) == 1


def test_grouped_softmax():
    draw = torch.Generator().manual_seed(0)
    values, groups = 30 * torch.randn(50, generator=draw).double(), torch.randint(0, 7, (50, ), generator=draw)
    found = grouped_log_softmax(values, groups, 9)
    for group in range(7):
        torch.testing.assert_close(found[groups == group], values[groups == group].log_softmax(dim=0))
    assert grouped_log_softmax(values[:0], groups[:0], 3).shape == (0, )


def test_large_logits_are_finite():
    student, teacher = views()
    wide = DenseView([level * 6e4 for level in teacher.logits], assignment=student.assignment)
    assert torch.isfinite(build(dict(type='RMLoss'))(wide, teacher))


@pytest.mark.parametrize('options, message', [(dict(scores='rank'), 'scores'), (dict(tau=0), 'tau')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='RMLoss', **options))


def test_a_head_that_does_not_tell():
    student, teacher = views()
    student.assignment.objects = None
    with pytest.raises(ValueError, match='does not tell which object'):
        build(dict(type='RMLoss'))(student, teacher)
