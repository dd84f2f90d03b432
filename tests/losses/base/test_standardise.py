"""``standardise=True`` of every loss with a softmax: what it takes away, and which losses have none to offer it."""

import copy

import pytest
import torch
from losses.base.test_loss import food, make_batch, make_loss

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.divergences import softmax_divergence, standardise_logits
from kd_mm.registry import MODELS, accepted_arguments, build, choices

STANDARDISED = [name for name in choices(KDLoss) if 'standardise' in accepted_arguments(MODELS.module_dict[name])]
#: Losses with a softmax that is no divergence of what two models predict, and why it stays as it is.
OTHERS = dict(
    AfDCDLoss='similarities of unit vectors', CIRKDMiniBatchLoss='similarities of unit vectors',
    CIRKDMemoryLoss='similarities of unit vectors', CIRKDChannelLoss='similarities of unit vectors',
    DSDLoss='products of spatial distributions', FBKDLoss='attention', FGDLoss='attention', ICDLoss='attention',
    GIDLoss='scores that choose instances', MasKDLoss='weights of tokens',
    MiBKDLoss='the two models have different numbers of logits', PLOPPseudoLabelLoss='a cross-entropy with labels',
    QueueKLLoss='similarities of unit vectors', RelationKLLoss='similarities of unit vectors',
    RMLoss='the candidates of an object, which may be one', SKDHolisticLoss='attention', TransKDLoss='attention')
#: Where the softmax is over: the dimension of a map or row, the last of a view's rows.
SPATIAL = {'CWDLoss'}
OPTIONS = dict(
    AICSDLoss=dict(similarity=0.0), BPKDLoss=dict(body=0.0), ZeroFirstOrderLoss=dict(first=0.0),
    CrossKDLoss=dict(class_weight=0.0, quality_weight=0.0))


def loss_of(name, **options):
    return make_loss(name, standardise=True, **OPTIONS.get(name, {}), **options)


def scaled(tensor, dim):
    """Each row along ``dim`` times a factor of its own and moved."""
    draw = torch.Generator().manual_seed(5)
    shape = list(tensor.shape)
    for index in (dim if isinstance(dim, tuple) else (dim, )):
        shape[index] = 1
    factor, offset = (torch.rand(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return tensor * (0.5 + factor) + offset


def moved(view, name):
    """The view with the logits that the softmax is over at another scale."""
    view = copy.copy(view)
    if name in ('LDLoss', 'CrossKDLoss', 'GOLSDLoss'):
        view.distributions = tuple(scaled(level, -1) for level in view.distributions)
    else:
        view.logits = scaled(view.logits, -1)
    return view


def softmax_view(view):
    view = copy.copy(view)
    if hasattr(view, 'sigmoid'):
        view.sigmoid = False
    return view


# ERD chooses by the size of the teacher's logits, see test_erd.py.
@pytest.mark.parametrize('name', [name for name in STANDARDISED if name != 'ERDLoss'])
def test_scale_and_offset_of_the_teacher_do_not_count(name):
    student, teacher, batch = food(loss_of(name), make_batch())
    if issubclass(MODELS.module_dict[name], HeadLoss):
        softmax = name in ('KDDETRLoss', 'DETRDistillLogitsLoss', 'MaskQueryLoss')
        if softmax:
            student, teacher = softmax_view(student), softmax_view(teacher)
        # What the scores choose and weigh besides the divergence must not move with them.
        options = dict(KDDETRLoss=dict(weights='none', l1_weight=0.0, giou_weight=0.0),
                       DETRDistillLogitsLoss=dict(match_weights=(0.0, 1.0, 0.0), l1_weight=0.0, giou_weight=0.0),
                       MaskQueryLoss=dict(match_weights=(0.0, 1.0, 0.0), mask_weight=0.0, dice_weight=0.0))
        other, options = moved(teacher, name), options.get(name, {})
    else:
        options = {}
        dim = (2, 3) if name in SPATIAL else 1
        sides = (teacher, ) if isinstance(teacher, torch.Tensor) else teacher
        other = tuple(scaled(level, dim) for level in sides)
    loss = loss_of(name, **options)
    found, wanted = loss(student, other, batch), loss(student, teacher, batch)
    assert wanted > 0 and torch.isclose(found, wanted, rtol=1e-4)
    plain = make_loss(name, **OPTIONS.get(name, {}), **options)
    assert not torch.isclose(plain(student, other, batch), plain(student, teacher, batch), rtol=1e-3)
    assert not torch.isclose(plain(student, teacher, batch), wanted, rtol=1e-3)


def test_every_loss_with_a_softmax_can():
    """A new one takes the option, or says here why not."""
    import inspect
    import sys
    words = ('softmax_divergence(', 'log_softmax(', '.softmax(', 'softmax(', 'mean_divergence(',
             'distribution_divergence(', 'class_divergence(', 'relation_divergence(')
    found = {name for name in choices(KDLoss)
             if any(word in inspect.getsource(sys.modules[MODELS.module_dict[name].__module__]) for word in words)}
    files = {MODELS.module_dict[name].__module__ for name in [*STANDARDISED, *OTHERS]}
    lost = {name for name in found if MODELS.module_dict[name].__module__ not in files}
    assert not lost, f'{sorted(lost)}: add standardise=, or a reason to OTHERS'
    assert not set(OTHERS) & set(STANDARDISED) and set(OTHERS) <= set(choices(KDLoss))


def test_closed_form():
    # (0, 2, 4) -> (-1, 0, 1) and (1, 0, -1): KL = sum p (z_t - z_s) = 2 (e - 1/e) / (e + 1 + 1/e).
    e = torch.tensor(1.0).double().exp()
    student, teacher = torch.tensor([[0.0, 2.0, 4.0]]).double(), torch.tensor([[30.0, 20.0, 10.0]]).double()
    expected = 2 * (e - 1 / e) / (e + 1 + 1 / e)
    loss = build(dict(type='SoftmaxKDLoss', standardise=True))
    assert torch.isclose(loss(student, teacher), expected, rtol=1e-6)
    assert torch.isclose(softmax_divergence(student, teacher, standardise=True).sum(), expected, rtol=1e-6)


def test_equal_logits_have_no_gradient():
    """The authors' code divides by 1e-7 there."""
    student = torch.full((4, 5), 3.0).double().requires_grad_()
    build(dict(type='SoftmaxKDLoss', standardise=True))(student, torch.randn(4, 5).double()).backward()
    assert student.grad.abs().sum() == 0


def test_a_mask_leaves_cells_out():
    values = torch.tensor([1.0, 3.0, 100.0, 2.0]).double()
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    inside = standardise_logits(values, 0, mask)[mask > 0]
    assert torch.allclose(inside, standardise_logits(values[mask > 0], 0), rtol=1e-12)
    assert torch.equal(standardise_logits(values, 0, torch.ones(4)), standardise_logits(values, 0))


@pytest.mark.parametrize('name', ['KDDETRLoss', 'DETRDistillLogitsLoss'])
def test_independent_classes_have_nothing_to_standardise(name):
    student, teacher, batch = food(loss_of(name), make_batch())
    with pytest.raises(ValueError, match=f'{name}: standardise=True is for softmax classes'):
        loss_of(name)(student, teacher, batch)
    with pytest.raises(ValueError, match="DISTLoss: standardise=True and activation='sigmoid'"):
        build(dict(type='DISTLoss', standardise=True, activation='sigmoid'))


@pytest.mark.parametrize('name', ['LDLoss', 'GOLSDLoss', 'CrossKDLoss'])
def test_two_bins_are_refused(name):
    student, teacher, batch = food(loss_of(name), make_batch())
    for view in (student, teacher):
        view.distributions = tuple(level[..., :2] for level in view.distributions)
    with pytest.raises(ValueError, match=f'{name}: standardise=True leaves nothing but the order of 2 bins'):
        loss_of(name)(student, teacher, batch)
