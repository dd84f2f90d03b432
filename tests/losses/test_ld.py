"""Localization distillation: values worked out by hand, regions, options."""

import math

import pytest
import torch

from kd_mm.losses.ld import distribution_divergence, valuable_region
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import Assignment, DenseView

#: softmax of (0, LOGIT) is (1/4, 3/4); its KL from (1/2, 1/2).
LOGIT = math.log(3)
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
MAIN = dict(type='LDLoss', tau=1.0, valuable_weight=0, loss_weight=1.0)


def views(labels, distributions=None, teacher=None, score=0.5, priors=None, weights=None):
    """Two levels of the given labels (N, P), three classes; two bins unless given."""
    labels = [torch.tensor(level) for level in labels]
    host = Assignment(tuple(labels), tuple(torch.ones(level.shape) if weights is None else torch.tensor(weights)
                                           for level in labels), 3)
    logits = [torch.full((*level.shape, 3), math.log(score / (1 - score))).double() for level in labels]
    own = distributions or [torch.zeros(*level.shape, 4, 2).double() for level in labels]
    theirs = teacher or [torch.tensor([0.0, LOGIT], dtype=torch.float64).expand(*level.shape, 4, 2) for level in labels]
    return (DenseView(logits, distributions=own, assignment=host, priors=priors),
            DenseView(logits, distributions=theirs, priors=priors))


@pytest.mark.parametrize('options, expected', [
    # 3 positives, each side KL; per side of a positive
    ({}, KL),
    (dict(normalise=False), 1.5 * KL),
    (dict(normalise=False, bins='mean'), 1.5 * KL / 2),
    (dict(main_weight=2.0), 2 * KL),
])
def test_closed_form(options, expected):
    student, teacher = views([[[0, 3, 2]], [[3, 1]]])
    assert build(dict(MAIN, **options))(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_levels_and_scores():
    """A level's share is that of its weights, which are the student's highest scores."""
    student, teacher = views([[[0, 3, 2]], [[3, 1]]])
    student.logits[1][0, 1, 2] = LOGIT  # score 3/4
    first, second = build(MAIN).per_level(student, teacher)
    assert first.item() == pytest.approx(1.0 / 1.75 * KL) and second.item() == pytest.approx(0.75 / 1.75 * KL)


def test_temperature():
    student, teacher = views([[[0]]], teacher=[torch.tensor([0.0, 5 * LOGIT], dtype=torch.float64).expand(1, 1, 4, 2)])
    assert build(dict(MAIN, tau=5.0))(student, teacher).item() == pytest.approx(25 * 0.5 * KL)  # the divisor is 1


def test_divergence_of_sides():
    student, teacher = torch.zeros(2, 4, 3).double(), torch.zeros(2, 4, 3).double()
    teacher[1, 2, 0] = 2.0
    found = distribution_divergence(student, teacher, 1.0)
    assert found.shape == (2, 4) and (found > 0).nonzero().tolist() == [[1, 2]]
    torch.testing.assert_close(found, 3 * distribution_divergence(student, teacher, 1.0, 'mean'))
    assert distribution_divergence(student[:0], teacher[:0]).shape == (0, 4)


def test_no_positives_is_zero_and_connected():
    own = [torch.randn(1, 2, 4, 5, requires_grad=True)]
    student, teacher = views([[[3, 3]]], own, [torch.randn(1, 2, 4, 5)])
    loss = build(MAIN)(student, teacher)
    loss.backward()
    assert loss.item() == 0 and own[0].grad.abs().sum() == 0


def test_gradient_to_the_student_only():
    own, theirs = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(1, 2, 4, 5, requires_grad=True)
    student, teacher = views([[[0, 3]]], [own], [theirs])
    student.logits[0].requires_grad_()
    build(MAIN)(student, teacher).backward()
    assert own.grad[0, 0].abs().sum() > 0 and own.grad[0, 1].abs().sum() == 0
    assert theirs.grad is None and (student.logits[0].grad is None or student.logits[0].grad.abs().sum() == 0)


# ---------------------------------------------------------------- the valuable region

ANCHORS = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [8, 0, 16, 8], [40, 0, 48, 8]])
BOX = torch.tensor([[[0.0, 0, 9, 8], [0, 0, 0, 0]]])
REAL = torch.tensor([[True, False]])


def by_hand(anchors, box, gamma=0.25, topk=9):
    """One box, one level, with plain numbers."""
    found = []
    for a in anchors.tolist():
        w = max(min(a[2], box[2]) - max(a[0], box[0]), 0)
        h = max(min(a[3], box[3]) - max(a[1], box[1]), 0)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (box[2] - box[0]) * (box[3] - box[1]) - w * h
        far = ((a[0] + a[2] - box[0] - box[2])**2 + (a[1] + a[3] - box[1] - box[3])**2) / 4
        hull = (max(a[2], box[2]) - min(a[0], box[0]))**2 + (max(a[3], box[3]) - min(a[1], box[1]))**2
        found.append((w * h / union, w * h / union - far / hull, far))
    near = [iou for iou, _, far in sorted(found, key=lambda item: item[2])[:topk]]
    mean = sum(near) / len(near)
    threshold = mean + math.sqrt(sum((iou - mean)**2 for iou in near) / (len(near) - 1))
    return [iou if gamma * threshold <= diou < threshold else 0.0 for iou, diou, _ in found]


@pytest.mark.parametrize('gamma, topk', [(0.25, 9), (0.0, 9), (0.25, 2), (0.6, 3)])
def test_valuable_region(gamma, topk):
    found = valuable_region((ANCHORS, ), BOX, REAL, torch.ones(1, 4, dtype=torch.bool), gamma, topk)
    assert found[0].tolist() == pytest.approx(by_hand(ANCHORS, BOX[0, 0].tolist(), gamma, topk))


@pytest.mark.parametrize('seed', range(8))
def test_valuable_region_of_many(seed):
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(40, 2, generator=draw) * 12
    anchors = torch.cat([corner, corner + 2 + torch.rand(40, 2, generator=draw) * 10], dim=1)
    box = [4.0, 5.0, 13.0, 12.0]
    found = valuable_region((anchors, ), torch.tensor([[box]]), REAL[:, :1], torch.ones(1, 40, dtype=torch.bool),
                            topk=4)
    assert 0 < (found > 0).sum() < 40 and found[0].tolist() == pytest.approx(by_hand(anchors, box, topk=4), abs=1e-6)


def test_valuable_region_of_levels_and_images():
    coarse = torch.tensor([[0.0, 0, 16, 16], [16, 0, 32, 16]])
    boxes = torch.tensor([[[0.0, 0, 9, 8], [2, 1, 15, 15]], [[6.0, 0, 14, 9], [0, 0, 0, 0]]])
    real = torch.tensor([[True, True], [True, False]])
    valid = torch.ones(2, 6, dtype=torch.bool)
    found = valuable_region((ANCHORS, coarse), boxes, real, valid, topk=2)
    alone = [valuable_region((ANCHORS, coarse), boxes[:1, index:index + 1], real[:1, :1], valid[:1], topk=2)
             for index in (0, 1)]
    torch.testing.assert_close(found[:1], torch.maximum(*alone))
    assert not torch.equal(found[0], found[1])


def test_anchors_off_the_image_count_nowhere():
    valid = torch.tensor([[True, True, True, False]])
    found = valuable_region((ANCHORS, ), BOX, REAL, valid)
    assert found[0, :3].tolist() == pytest.approx(by_hand(ANCHORS[:3], BOX[0, 0].tolist())) and found[0, 3] == 0
    assert not valuable_region((ANCHORS, ), BOX, REAL, torch.zeros(1, 4, dtype=torch.bool)).any()
    none = valuable_region((ANCHORS, ), BOX[:, :0], REAL[:, :0], valid)
    assert none.shape == (1, 4) and not none.any()


def test_both_regions_as_published():
    """A sixteenth of the weighted sides in the valuable region, a quarter in the main one."""
    batch = KDBatch(input_shape=(64, 64), boxes=[BOX[0, :1]])
    student, teacher = views([[[0, 3, 3, 3]]], priors=(ANCHORS, ))
    loss = build(dict(type='LDLoss', tau=1.0, bins='mean', normalise=False, loss_weight=0.25))
    weights = sum(by_hand(ANCHORS, BOX[0, 0].tolist()))
    expected = 0.25 * (4 * 0.5 * KL / 2 / 4 + 4 * weights * KL / 2 / 16)
    assert weights > 0 and loss.needs_boxes
    assert loss(student, teacher, batch).item() == pytest.approx(expected, rel=1e-6)
    assert not build(MAIN).needs_boxes


# ---------------------------------------------------------------- what cannot be

@pytest.mark.parametrize('options, message', [
    (dict(tau=0), 'tau'), (dict(main_weight=0, valuable_weight=0), 'one above 0'), (dict(main_weight=-1), 'negative'),
    (dict(gamma=2), 'gamma'), (dict(topk=0), 'topk'), (dict(bins='max'), 'bins')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='LDLoss', **options))


def test_views_that_do_not_fit():
    loss, (student, teacher) = build(MAIN), views([[[0]]])
    with pytest.raises(ValueError, match='no box distributions'):
        loss(student, DenseView(teacher.logits))
    with pytest.raises(ValueError, match='same reg_max'):
        loss(student, DenseView(teacher.logits, distributions=[torch.zeros(1, 1, 4, 9)]))
    with pytest.raises(ValueError, match='has no assignment'):
        loss(teacher, teacher)
    with pytest.raises(ValueError, match='give two DenseViews'):
        loss([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 3)])
    with pytest.raises(ValueError, match='has no anchors'):
        build(dict(type='LDLoss'))(student, teacher, KDBatch(boxes=[torch.zeros(0, 4)], input_shape=(8, 8)))
    # Other classes are no matter: only the student's own scores count.
    assert loss(student, DenseView([torch.zeros(1, 1, 80)], distributions=teacher.distributions)) > 0


def test_bins_that_count_from_another_place():
    host = Assignment([torch.tensor([[1, 3]])], [torch.ones(1, 2)], background=3)

    def view(measured, **more):
        return DenseView([torch.zeros(1, 2, 3)], distributions=[torch.randn(1, 2, 4, 9)], measured=measured, **more)

    loss = build(dict(type='LDLoss', valuable_weight=0))
    student = view('distances from the points at 0 of a cell', assignment=host)
    with pytest.raises(ValueError, match='the same bin means another number'):
        loss(student, view('distances from the points at 0.5 of a cell'))
    for other in (None, student.measured):
        assert loss(student, view(other)) > 0


def test_half_range_is_finite():
    own = [torch.full((1, 1, 4, 17), 6e4)]
    student, teacher = views([[[0]]], own, [torch.linspace(-6e4, 6e4, 17).expand(1, 1, 4, 17)])
    assert torch.isfinite(build(dict(type='LDLoss', valuable_weight=0))(student, teacher))
