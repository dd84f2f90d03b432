import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tensors import Given, draw

from kd_mm.losses.base.opponent import Opponent
from kd_mm.losses.skd_holistic import Discriminator, SelfAttention, discriminator_loss, generator_loss, image_mean
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch, StepInfo

SWEEP = {'SKDHolisticLoss': dict(
    options=dict(condition_on_image=False, width=2),
    skip={'test_zero_for_equal_inputs': 'the score of a discriminator has no zero'})}


def make(**options):
    torch.manual_seed(0)
    return build(dict(dict(type='SKDHolisticLoss', width=2, loss_weight=1.0), **options))


def pair(count=2, classes=3, size=(64, 64)):
    return draw(count, classes, *size, seed=1).requires_grad_(), draw(count, classes, *size, seed=2)


def batch(count=2, **fields):
    return KDBatch(images=draw(count, 3, 32, 32, seed=3), **fields)


class Linear(torch.nn.Module):
    """A judge whose scores can be worked out by hand: the sum of the maps times a parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(weight), dtype=torch.float64))

    def forward(self, maps):
        return self.weight * maps.sum(dim=(1, 2, 3), keepdim=True)


def judged(weight, student, teacher, rate=1.0, **options):
    """A loss with :class:`Linear` for its discriminator."""
    loss = make(condition_on_image=False, optimizer=dict(type='SGD', lr=rate), **options)
    loss.levels.append(Opponent(Linear(weight), loss.optimizer))
    return loss


# ------------------------------------------------------------------------------------------------ the terms, by hand


@pytest.mark.parametrize('objective, expected', [
    ('wgan-gp', -0.75 - 0.75), ('hinge', (1.5 + 0) / 2 + (0.5 + 0) / 2)])
def test_discriminator_terms(objective, expected):
    student, teacher = torch.tensor([0.5, -2.0]).view(2, 1, 1, 1), torch.tensor([0.5, 1.0]).view(2, 1, 1, 1)
    assert discriminator_loss(objective, student, teacher, torch.ones(2)).item() == pytest.approx(expected)


def test_generator_term_is_the_same_for_both():
    assert generator_loss(torch.tensor([0.5, -2.0]).view(2, 1, 1, 1), torch.ones(2)).item() == pytest.approx(0.75)


def test_images_that_are_left_out():
    values = torch.tensor([[1., 3.], [10., 20.]])
    assert image_mean(values, torch.tensor([1., 0.])).item() == 2.0
    assert image_mean(values, torch.zeros(2)).item() == 0.0


def test_the_student_climbs_and_the_discriminator_tells_apart():
    student = torch.full((2, 1, 64, 64), 0.5).double().requires_grad_()
    teacher = torch.full((2, 1, 64, 64), 1.5).double()
    loss = judged(0.01, student, teacher, penalty_weight=0.0, discriminator_weight=0.1)
    value = loss(student, teacher, KDBatch())
    assert value.item() == pytest.approx(-0.01 * 0.5 * 4096)
    value.backward()
    assert torch.allclose(student.grad, torch.full_like(student, -0.01 / 2))
    network = loss.opponents()[0].network
    assert network.weight.item() == 0.01 and network.weight.grad is None
    told = loss.opponents()[0].learn()
    assert told.item() == pytest.approx(0.1 * 0.01 * 4096 * (0.5 - 1.5))
    assert network.weight.item() == pytest.approx(0.01 + 0.1 * 4096)
    assert not network.weight.requires_grad and loss.opponents()[0].learn() is None


def test_gradient_penalty_by_hand():
    """The gradient of ``w * sum`` is w everywhere: its norm over C*H*W cells is ``|w| sqrt(C H W)``."""
    student, teacher = pair()
    loss = judged(0.1, student, teacher, penalty_weight=10.0, discriminator_weight=1.0)
    loss(student, teacher, KDBatch())
    apart = 0.1 * (student.sum() - teacher.sum()).item() / 2
    norm = 0.1 * math.sqrt(3 * 64 * 64)
    assert loss.opponents()[0].learn().item() == pytest.approx(apart + 10 * (norm - 1)**2)


def test_penalty_ignores_what_is_masked():
    student, teacher = pair()
    mask = torch.zeros(2, 1, 64, 64).double()
    mask[0, :, :4] = 1
    loss = judged(0.1, student, teacher, penalty_weight=10.0, discriminator_weight=1.0)
    loss(student, teacher, KDBatch(), Given(mask))
    apart = 0.1 * (student[0, :, :4].sum() - teacher[0, :, :4].sum()).item()
    norm = 0.1 * math.sqrt(3 * 4 * 64)
    assert loss.opponents()[0].learn().item() == pytest.approx(apart + 10 * (norm - 1)**2)


def test_interpolation_lies_between_and_follows_seed_step_and_level():
    student, teacher = pair()
    seen = []

    def look(seed):
        loss = judged(0.1, student, teacher)
        loss.gradient_penalty(lambda maps: seen.append(maps.detach()) or maps, student.detach(), teacher,
                              torch.ones(2).double(), StepInfo(seed=seed[0], step=seed[1]), seed[2])
        return seen.pop()

    before = torch.get_rng_state()
    points = look((0, 5, 0))
    share = (points - student.detach()) / (teacher - student.detach())
    assert torch.allclose(share, share[:, :1, :1, :1].expand_as(share)) and 0 < share.min() < share.max() < 1
    assert torch.equal(points, look((0, 5, 0))) and torch.equal(before, torch.get_rng_state())
    for seed in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not torch.equal(points, look(seed))


# ------------------------------------------------------------------------------------------------ the discriminator


def test_spectral_norm_reaches_the_largest_singular_value():
    network = Discriminator(3, 2).double()
    layer = network.convs[1]
    for _ in range(200):
        layer(torch.zeros(1, 2, 4, 4).double())
    largest = torch.linalg.matrix_norm(layer.conv.weight.flatten(1), 2)
    impulse = torch.zeros(1, 2, 4, 4).double()
    impulse[0, 0, 1, 1] = 1
    expected = F.conv2d(impulse, layer.conv.weight / largest, layer.conv.bias, 2, 1)
    assert torch.allclose(layer(impulse), expected, rtol=1e-6)


def test_attention_by_hand():
    """Queries and keys of zero make all cells alike: everyone adds gamma times the mean of the values."""
    layer = SelfAttention(2).double()
    features = draw(1, 2, 2, 3)
    assert torch.equal(layer(features), features)  # gamma starts at 0
    with torch.no_grad():
        layer.gamma.fill_(0.5)
        layer.query.weight.zero_()
        layer.query.bias.zero_()
        torch.nn.init.dirac_(layer.value.weight)
        layer.value.bias.zero_()
    assert torch.allclose(layer(features), features + 0.5 * features.mean(dim=(2, 3), keepdim=True))


def test_attention_rows_belong_to_queries():
    layer = SelfAttention(1).double()
    with torch.no_grad():
        for part in (layer.query, layer.key, layer.value):
            part.weight.fill_(1.0)
            part.bias.zero_()
        layer.gamma.fill_(1.0)
    x = torch.tensor([0.0, 2.0]).double().view(1, 1, 1, 2)
    # The query 0 sees both cells alike (mean 1); the query 2 weighs them by softmax(0, 4).
    second = 2 * math.exp(4) / (1 + math.exp(4))
    assert torch.allclose(layer(x).flatten(), torch.tensor([0 + 1.0, 2 + second]).double())


@pytest.mark.parametrize('size, scores', [
    ((64, 64), (1, 1)), ((64, 128), (1, 5)), ((8, 16), (1, 1)), ((20, 96), (1, 3))])
def test_small_maps_are_enlarged(size, scores):
    loss, (student, teacher) = make(condition_on_image=False), pair(size=size)
    seen = []
    loss.prepare((student, ), (teacher, ))
    loss.opponents()[0].network.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    loss(student, teacher, KDBatch()).backward()
    assert [tuple(shape) for shape in seen] == [scores]
    assert student.grad.abs().sum() > 0


def test_the_image_is_seen():
    loss, (student, teacher) = make(), pair()
    first = loss(student, teacher, batch())
    other = batch()
    other.targets.images = other.targets.images.flip(3)
    assert not torch.isclose(first, loss(student, teacher, other), rtol=1e-3)
    alone = make(condition_on_image=False)
    assert torch.equal(alone(student, teacher, batch()), alone(student, teacher, other))
    with pytest.raises(ValueError, match=r'KDBatch\(images='):
        loss(student, teacher, KDBatch())
    with pytest.raises(ValueError, match='4 channels.*condition_on_image=False'):
        loss(student, teacher, KDBatch(images=torch.zeros(2, 4, 64, 64)))


# ------------------------------------------------------------------------------------------------ pixels, precision


def test_ignored_pixels_do_not_count():
    student, teacher = pair()
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, :20] = 255
    moved = student.detach().clone()
    moved[:, :, :20] += draw(2, 3, 20, 64, seed=9)
    loss, other = make(), make(mask_ignored=False)
    for criterion, alike in ((loss, True), (other, False)):
        values = [criterion(maps, teacher, batch(seg_map=labels)) for maps in (student, moved)]
        assert torch.isclose(*values, rtol=1e-12) == alike
    value = loss(student, teacher, batch(seg_map=labels))
    value.backward()
    assert (student.grad[:, :, :20] == 0).all() and (student.grad[:, :, 20:] != 0).any()


def test_an_image_without_labels_leaves_the_others_alone():
    student, teacher = pair()
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[1] = 255
    loss = judged(0.1, student, teacher, penalty_weight=0.0, discriminator_weight=1.0)
    value = loss(student, teacher, KDBatch(seg_map=labels))
    assert value.item() == pytest.approx(-0.1 * student[0].sum().item())
    assert loss.opponents()[0].learn().item() == pytest.approx(0.1 * (student[0] - teacher[0]).sum().item())


def test_the_loss_changes_no_state_and_learning_moves_the_power_iteration():
    loss, (student, teacher) = make(), pair()
    loss.prepare((student, ), (teacher, ))
    before = copy.deepcopy(loss.state_dict())
    assert torch.equal(loss(student, teacher, batch()), loss(student, teacher, batch()))
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    loss.opponents()[0].learn()
    still = [key for key, value in loss.state_dict().items() if torch.equal(value, before[key])]
    # The attention is behind a factor that is 0 at first, and a difference of scores does not know their bias.
    assert all('attentions' in key or key.endswith('score.bias') for key in still)
    assert sum(key.endswith('.u') for key in before) == 4


def test_in_eval_nothing_is_noted():
    loss, (student, teacher) = make(), pair()
    loss.eval()(student, teacher, batch())
    assert loss.opponents()[0].learn() is None


def test_learning_in_half_precision():
    loss, (student, teacher) = make(), pair()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss(student.half(), teacher.half(), batch())
        value = loss.opponents()[0].learn()
    assert value.dtype == torch.float32 and torch.isfinite(value)


@pytest.mark.parametrize('objective', ['wgan-gp', 'hinge'])
def test_a_discriminator_learns_to_tell_constant_maps(objective):
    loss = make(objective=objective, condition_on_image=False, optimizer=dict(type='Adam', lr=0.03))
    student, teacher = pair()
    told = []
    for step in range(8):
        loss(student, teacher, KDBatch(step=step))
        told.append(loss.opponents()[0].learn().item())
    assert told[-1] < told[0]


def test_bad_options():
    for options, match in ((dict(objective='lsgan'), "objective='lsgan'"), (dict(width=0), 'width=0'),
                           (dict(width=1.5), 'width=1.5'), (dict(discriminator_weight=0), 'discriminator_weight=0'),
                           (dict(penalty_weight=-1), 'penalty_weight=-1'), (dict(optimizer=dict(lr=1)), 'no config'),
                           (dict(optimizer=dict(type='Nothing')), 'Nothing'),
                           (dict(optimizer=dict(type='SGD', lr=1, speed=2)), 'speed')):
        with pytest.raises(ValueError, match=f'SKDHolisticLoss.*{match}'):
            make(**options)
