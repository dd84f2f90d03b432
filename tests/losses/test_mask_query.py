"""Matched-query mask distillation: values worked out by hand, and mask transformers of both hosts."""

import math

import pytest
import torch

from kd_mm.hosts.heads.mask_query import mask_query_view
from kd_mm.losses.mask_query import dice_loss, sample_masks
from kd_mm.ops.matching import hungarian
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch, StepInfo
from kd_mm.types.query import MaskQueryView

LOGIT = math.log(3)  # sigmoid: 3/4
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def view(logits, masks, size=(4, 4)):
    """One decoder layer, one image, masks that are constant."""
    return MaskQueryView(torch.tensor(logits)[None, None].double().requires_grad_(),
                         [torch.tensor(masks).double()[None, :, None, None].expand(1, -1, *size).clone()])


def test_closed_form():
    """One query: classes (1/2, 1/2) against (3/4, 1/4), mask 1/2 against 3/4, object with 3/4."""
    student, teacher = view([[0.0, 0.0]], [0.0]), view([[LOGIT, 0.0]], [LOGIT])
    points = 100
    dice = 1 - (2 * points * 0.375 + 1) / (points * 1.25 + 1)
    for options, expected in ((dict(), 2 * KL + 5 * KL + 5 * dice), (dict(mask_weight=0, dice_weight=0), 2 * KL),
                              (dict(class_weight=0, dice_weight=0, mask_weight=1), KL),
                              (dict(class_weight=0, mask_weight=0, dice_weight=1), dice)):
        loss = build(dict(type='MaskQueryLoss', points=points, **options))(student, teacher)
        assert loss.item() == pytest.approx(expected), options


def test_masks_of_queries_without_object_do_not_count():
    """The second query of the teacher is sure that it sees nothing; its mask is far from the student's."""
    student = view([[9.0, -9.0], [-9.0, 9.0]], [0.0, 50.0])
    teacher = view([[9.0, -9.0], [-9.0, 9.0]], [LOGIT, -50.0])
    loss = build(dict(type='MaskQueryLoss', class_weight=0, dice_weight=0, mask_weight=1, points=10,
                      match_weights=(1, 0, 0)))(student, teacher)
    assert loss.item() == pytest.approx(KL, rel=1e-4)


@pytest.mark.parametrize('weights, expected', [((1, 0, 0), [1, 0]), ((0, 1, 0), [0, 1]), ((0, 0, 1), [0, 1])])
def test_match(weights, expected):
    """Classes say one order, masks the other."""
    student = view([[3.0, 0.0], [0.0, 3.0]], [4.0, -4.0])
    teacher = view([[0.0, 3.0], [3.0, 0.0]], [4.0, -4.0])
    loss = build(dict(type='MaskQueryLoss', match_weights=weights, points=20))
    points = loss.draw_points(1, KDBatch())
    own, theirs = ([sample_masks(layer, points) for layer in view.masks] for view in (student, teacher))
    assert loss.match(student.logits, teacher.logits, own, theirs)[0, 0].tolist() == expected


def test_the_costs_are_the_losses():
    """The pairwise costs, written as products of matrices, are the losses of each pair (less the entropies)."""
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(1, 60, 3, 20, generator=generator).double() for _ in range(2))
    logits = torch.zeros(1, 60, 3, 4).double()
    pairs = own[..., None, :].expand(1, 60, 3, 3, 20), theirs.sigmoid()[:, :, None].expand(1, 60, 3, 3, 20)
    near = torch.nn.functional.binary_cross_entropy_with_logits(*pairs, reduction='none').mean(dim=-1)
    found = build(dict(type='MaskQueryLoss', match_weights=(0, 3, 5))).match(logits, logits, own, theirs)
    assert torch.equal(found, hungarian(3 * near + 5 * dice_loss(*pairs)))
    assert not torch.equal(found, hungarian(near)) and not torch.equal(found, hungarian(dice_loss(*pairs)))


def test_the_order_of_the_queries_means_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, masks = (torch.randn(shape, generator=generator) * 3 for shape in ((2, 1, 5, 4), (1, 5, 8, 8)))
    order = torch.tensor([3, 1, 4, 0, 2])
    views = MaskQueryView(logits, [masks] * 2), MaskQueryView(logits[:, :, order], [masks[:, order]] * 2)
    assert build(dict(type='MaskQueryLoss', dice_weight=0, points=50))(*views).item() < 1e-4


def test_layers_are_compared_each_with_its_own():
    """Three layers at once give what each of them gives alone."""
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(3, 2, 5, 4, generator=generator).double() * 3,
              [torch.randn(2, 5, 8, 8, generator=generator).double() * 3 for _ in range(3)]) for _ in range(2)]
    loss = build(dict(type='MaskQueryLoss', points=50))
    alone = [loss(*(MaskQueryView(logits[[layer]], [masks[layer]]) for logits, masks in parts)) for layer in range(3)]
    assert len({round(value.item(), 3) for value in alone}) == 3
    assert loss(*(MaskQueryView(*part) for part in parts)).item() == pytest.approx(sum(alone).item(), rel=1e-12)


@pytest.mark.parametrize('x, y, expected', [(0.125, 0.9, 0), (0.875, 0.1, 3), (0.5, 0.5, 1.5), (0, 0, 0)])
def test_sampling(x, y, expected):
    """x goes along the columns; a cell's value is at its centre, and the border continues it."""
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    assert sample_masks(ramp, torch.tensor([[[float(x), float(y)]]])).item() == expected


def test_more_queries_than_the_teacher_has():
    student = view([[0.0, 0.0]] * 3, [0.0, 9.0, -9.0])
    teacher = view([[LOGIT, 0.0]], [9.0])
    loss = build(dict(type='MaskQueryLoss', dice_weight=0, points=10))(student, teacher)
    assert loss.item() == pytest.approx(2 * KL, rel=1e-3)
    loss.backward()
    assert (student.logits.grad[0, 0].abs().sum(dim=1) > 0).tolist() == [False, True, False]


def test_masks_of_another_size():
    """A ramp is the same ramp at any size."""
    ramp = [torch.nn.functional.interpolate(torch.linspace(-1, 1, 64).view(1, 1, 1, 64), (size, size), mode='bilinear')
            for size in (16, 32)]
    logits = torch.zeros(1, 1, 1, 2)
    loss = build(dict(type='MaskQueryLoss', dice_weight=0, points=500))(
        MaskQueryView(logits, ramp[:1]), MaskQueryView(logits, ramp[1:]))
    assert loss.item() < 1e-3


def test_points_stay_inside_the_images():
    loss = build(dict(type='MaskQueryLoss', points=2000))
    batch = KDBatch(img_shapes=[(32, 64), (64, 16)], input_shape=(64, 64), step=2)
    points = loss.draw_points(2, batch)
    assert points[0, :, 0].max() > 0.95 and 0.45 < points[0, :, 1].max() <= 0.5 and points[1, :, 0].max() <= 0.25
    assert torch.equal(points, loss.draw_points(2, batch))
    later = KDBatch(batch.targets, StepInfo(step=3))
    assert not torch.equal(points, loss.draw_points(2, later))


def test_dice():
    target = torch.tensor([1.0, 1.0, 0.0])
    assert dice_loss(torch.tensor([0.0, 0.0, 0.0]), target).item() == pytest.approx(1 - (2 * 1 + 1) / (1.5 + 2 + 1))
    assert dice_loss(torch.full((3, ), -99.0), torch.zeros(3)).item() == 0


def test_gradient_goes_to_the_student_only():
    views, parts = [], []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        logits, masks = (torch.randn(shape, generator=generator).requires_grad_()
                         for shape in ((2, 1, 5, 4), (1, 5, 8, 8)))
        views.append(MaskQueryView(logits, [masks, masks * 2]))
        parts.append((logits, masks))
    build(dict(type='MaskQueryLoss', points=50))(*views).backward()
    assert all(part.grad.abs().sum() > 0 and torch.isfinite(part.grad).all() for part in parts[0])
    assert all(part.grad is None for part in parts[1])


@pytest.mark.parametrize('options, message', [
    (dict(points=0), 'whole number from 1'), (dict(mask_weight=-1), 'must not be negative'),
    (dict(match_weights=(1, 2)), 'three factors')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='MaskQueryLoss', **options))


def test_views_that_do_not_fit():
    loss, one = build(dict(type='MaskQueryLoss', points=4)), view([[0.0, 0.0]], [0.0])
    with pytest.raises(ValueError, match='give two MaskQueryViews'):
        loss(one, one.logits)
    with pytest.raises(ValueError, match='2 class logits of head and 3'):
        loss(one, view([[0.0, 0.0, 0.0]], [0.0]))
    with pytest.raises(ValueError, match='1 decoder layers of head and 2'):
        loss(one, MaskQueryView(torch.cat([one.logits] * 2), one.masks * 2))
    with pytest.raises(ValueError, match='does not return class logits'):
        mask_query_view(torch.nn.Identity(), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match='does not return class logits'):
        mask_query_view(torch.nn.Identity(), (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)))
