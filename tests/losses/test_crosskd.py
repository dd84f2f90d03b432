"""CrossKD: its losses by hand, and the cross-head pass on small towers."""

import copy
import math

import pytest
import torch
from torch import nn

from kd_mm.hosts.heads.towers import cross_head_outputs, held_features, tower_taps
from kd_mm.hosts.taps import Tap
from kd_mm.ops.functional import align_moments
from kd_mm.registry import build
from kd_mm.types.dense import Assignment, DenseView

LOGIT = math.log(3)
BCE = math.log(2)
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
BOX, OTHER = torch.tensor([0.0, 0, 2, 2]).double(), torch.tensor([0.0, 0, 2, 4]).double()


def views(kind='boxes', weights=((1.0, 1.0, 0.0), ), positives=2.0):
    """Three priors, the first positive; all logits 0 against a teacher with 3/4 for the first of two classes."""
    weights = torch.tensor(weights, dtype=torch.float64)
    labels = torch.full(weights.shape, 2)
    labels[:, 0] = 1
    host = Assignment((labels, ), (weights, ), 2, num_pos=torch.tensor(positives))
    logits = torch.zeros(*weights.shape, 2).double()
    theirs = logits.clone()
    theirs[..., 0] = LOGIT
    if kind == 'distributions':
        own = dict(distributions=[torch.zeros(*weights.shape, 4, 2).double()])
        other = dict(distributions=[torch.tensor([0.0, LOGIT], dtype=torch.float64).expand(*weights.shape, 4, 2)])
    else:
        own = dict(boxes=[BOX.expand(*weights.shape, 4)])
        other = dict(boxes=[OTHER.expand(*weights.shape, 4)])
    if kind == 'quality':
        own['quality'], other['quality'] = [torch.zeros(weights.shape).double()], [theirs[..., 0]]
    return DenseView([logits.requires_grad_()], assignment=host, **own), DenseView([theirs], **other)


@pytest.mark.parametrize('kind, options, expected', [
    # class: two priors, |d| 1/4; boxes: teacher score 3/4, GIoU loss 1/2; quality: one positive
    ('boxes', {}, (2 * 0.25 * BCE + 2 * 0.75 * 0.5) / 2),
    ('boxes', dict(class_weight=0, box_weight=3), 3 * 0.75 * 0.5),
    ('boxes', dict(box_weight=0, beta=0), 2 * BCE),
    ('quality', dict(class_weight=0, box_weight=0), BCE / 2),
    ('quality', dict(quality_weight=2, class_weight=0, box_weight=0), BCE),
    # distributions: four sides a prior, over the sum of the teacher's scores
    ('distributions', dict(class_weight=0), 4 * KL),
    ('distributions', dict(class_weight=0, box_weight=1), KL),
    ('distributions', dict(class_weight=0, box_weight=1, tau=2), None),  # softened: see below
])
def test_closed_form(kind, options, expected):
    value = build(dict(type='CrossKDLoss', **options))(*views(kind)).item()
    if expected is None:
        p = math.sqrt(3) / (1 + math.sqrt(3))
        expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert value == pytest.approx(expected, rel=1e-12)


def test_box_distributions_do_not_depend_on_positives_but_on_scores():
    loss = build(dict(type='CrossKDLoss', class_weight=0))
    assert loss(*views('distributions', positives=50.0)).item() == pytest.approx(4 * KL)
    nothing = loss(*views('distributions', weights=((0.0, 0.0, 0.0), )))
    assert nothing.item() == 0


def test_gradient_to_the_student_only():
    student, teacher = views()
    teacher.logits[0].requires_grad_()
    build(dict(type='CrossKDLoss'))(student, teacher).backward()
    grad = student.logits[0].grad
    assert grad[0, 0].abs().sum() > 0 and grad[0, 2].abs().sum() == 0 and teacher.logits[0].grad is None


@pytest.mark.parametrize('options, message', [
    (dict(index=0), 'index'), (dict(stage='raw'), 'stage'), (dict(beta=0.3), 'beta'), (dict(tau=0), 'tau'),
    (dict(class_weight=0, box_weight=0, quality_weight=0), 'one above 0'), (dict(box_weight=-1), 'negative')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='CrossKDLoss', **options))


def test_views_that_do_not_fit():
    loss, (student, teacher) = build(dict(type='CrossKDLoss')), views()
    with pytest.raises(ValueError, match='only one of'):
        loss(student, views('distributions')[1])
    with pytest.raises(ValueError, match='predicts no boxes'):
        loss(student, DenseView(teacher.logits))


# ---------------------------------------------------------------- the cross-head pass

class Block(nn.Module):
    with_norm, with_activation, norm_name, order = True, True, 'bn', ('conv', 'norm', 'act')

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn, self.activate = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class Head(nn.Module):
    """Two towers shared by two levels, or one of each a level."""

    def __init__(self, width=4, convs=3, nested=False):
        super().__init__()
        def tower():
            return nn.ModuleList(Block(width) for _ in range(convs))
        for name in ('cls_convs', 'reg_convs'):
            setattr(self, name, nn.ModuleList([tower(), tower()]) if nested else tower())
        self.nested = nested
        self.score, self.box = nn.Conv2d(width, 2, 1), nn.Conv2d(width, 4, 1)

    def forward(self, levels):
        result = []
        for index, x in enumerate(levels):
            first = second = x
            for conv in (self.cls_convs[index] if self.nested else self.cls_convs):
                first = conv(first)
            for conv in (self.reg_convs[index] if self.nested else self.reg_convs):
                second = conv(second)
            result.append((self.score(first), self.box(second)))
        return tuple(zip(*result))


LEVELS = [torch.randn(2, 4, 6, 5), torch.randn(2, 4, 3, 2)]


def held(head, index, stage='pre_activation'):
    places = tower_taps(head, index, stage)
    taps = [Tap(head, path) for paths in places.values() for path in paths]
    for tap in taps:
        tap.arm()
    output = head(LEVELS)
    return output, held_features(places, {tap.path: tap.read() for tap in taps})


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('index', [1, 2, 3])
@pytest.mark.parametrize('stage', ['pre_activation', 'post_activation'])
def test_a_head_through_itself_is_itself(nested, index, stage):
    torch.manual_seed(0)
    head = Head(nested=nested).eval()
    plain, features = held(head, index, stage)
    state = {name: sorted(vars(module)) for name, module in head.named_modules()}
    for align in (True, False):
        crossed = cross_head_outputs(head, LEVELS, features, features, index, align=align)
        for one, other in zip(plain, crossed):
            for first, second in zip(one, other):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert {name: sorted(vars(module)) for name, module in head.named_modules()} == state


def test_gradient_passes_through_the_teacher_and_changes_nothing_there():
    torch.manual_seed(0)
    student, teacher = Head(), Head().eval().requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    (_, own), (_, theirs) = held(student, 2), held(teacher, 2)
    output = cross_head_outputs(teacher, LEVELS, own, theirs, 2)
    sum(level.square().sum() for part in output for level in part).backward()
    reached = {name.split('.')[1] for name, parameter in student.named_parameters()
               if 'convs' in name and parameter.grad is not None and parameter.grad.abs().sum() > 1e-6}
    assert reached == {'0', '1'} and student.score.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    # A gradient, but none that could reach the teacher, and no second step spoiled by an activation in place.
    assert all((feature < 0).any() for feature in (*own['cls_convs'], *theirs['reg_convs']))


def test_what_is_left_out_does_not_run():
    head, ran = Head().eval(), []
    _, features = held(head, 3)
    for index, block in enumerate(head.cls_convs):
        block.conv.register_forward_hook(lambda *_, index=index: ran.append(index))
    cross_head_outputs(head, LEVELS, features, features, 2)
    assert ran == [2, 2]  # the last convolution alone, once a level


def test_forwards_come_back_after_an_error():
    head = Head()
    _, features = held(head, 2)
    head.score.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cross_head_outputs(head, LEVELS, features, features, 2)
    assert not any('forward' in vars(module) for module in head.cls_convs)


def test_moments():
    teacher = torch.randn(3, 2, 4, 5).double() * torch.tensor([2.0, 5.0]).view(1, 2, 1, 1) + 3
    student = torch.randn(3, 2, 4, 5).double().requires_grad_()
    found = align_moments(student, teacher.requires_grad_())
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(found, dim=(0, 2, 3)), moment(teacher, dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert teacher.grad is None and student.grad is not None
    flat = align_moments(torch.zeros(1, 2, 2, 2).double(), teacher)
    assert torch.isfinite(flat).all()


def test_places_that_are_not_there():
    with pytest.raises(ValueError, match='index=4 must be from 1'):
        tower_taps(Head(), 4)
    with pytest.raises(ValueError, match='Block|Conv2d has no towers'):
        tower_taps(nn.Conv2d(1, 1, 1), 1)
    head = Head()
    head.cls_convs[1].with_activation = False
    with pytest.raises(ValueError, match='post_activation'):
        tower_taps(head, 2)
    with pytest.raises(ValueError, match='stage'):
        tower_taps(head, 1, 'middle')
    other, narrow = held(Head(), 2)[1], {name: [level[:, :2] for level in levels]
                                        for name, levels in held(Head(), 2)[1].items()}
    with pytest.raises(ValueError, match='same feat_channels'):
        cross_head_outputs(Head(), LEVELS, narrow, other, 2)
