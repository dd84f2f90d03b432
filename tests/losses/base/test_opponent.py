"""What adversarial losses share; in real trainings: tests/engine/test_opponents.py."""

import copy

import pytest
import torch
from torch import nn

from kd_mm.losses.base.opponent import Opponent, SpectralConv2d


def make(optimizer=None):
    torch.manual_seed(0)
    return Opponent(nn.Linear(3, 1), optimizer or dict(type='Adam', lr=0.1))


def objective(opponent, seed):
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    return lambda: opponent(inputs).square().mean()


def steps(opponent, seeds):
    for seed in seeds:
        opponent.later(objective(opponent, seed))
        opponent.learn()
    return [parameter.clone() for parameter in opponent.parameters()]


def test_frozen_but_for_its_own_step():
    opponent = make()
    assert not any(parameter.requires_grad for parameter in opponent.parameters())
    inputs = torch.randn(2, 3, requires_grad=True)
    opponent(inputs).sum().backward()
    assert inputs.grad is not None and all(parameter.grad is None for parameter in opponent.parameters())
    seen = []
    opponent.later(lambda: seen.append([p.requires_grad for p in opponent.parameters()]) or opponent(inputs).sum())
    opponent.learn()
    assert seen == [[True, True]]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in opponent.parameters())


def test_it_is_frozen_again_after_an_error():
    opponent = make()

    def fail():
        raise KeyError('no')

    opponent.later(fail)
    with pytest.raises(KeyError):
        opponent.learn()
    assert not any(parameter.requires_grad for parameter in opponent.parameters())
    assert opponent.learn() is None


def test_the_last_one_noted_counts_once():
    opponent = make(dict(type='SGD', lr=1.0))
    opponent.later(objective(opponent, 1))
    opponent.later(objective(opponent, 2))
    value = opponent.learn()
    assert value == objective(make(), 2)() and not value.requires_grad
    assert opponent.learn() is None
    opponent.later(objective(opponent, 3))
    opponent.forget()
    assert opponent.learn() is None


def test_the_step_is_that_of_torch():
    opponent, other = make(dict(type='SGD', lr=0.1, momentum=0.9)), nn.Linear(3, 1)
    other.load_state_dict(opponent.network.state_dict())
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for seed in (1, 2):
        plain.zero_grad()
        objective(other, seed)().backward()
        plain.step()
    assert all(torch.equal(own, wanted) for own, wanted in zip(steps(opponent, (1, 2)), other.parameters()))


def test_rate_is_a_fraction_of_the_first_one():
    half, full = make(dict(type='SGD', lr=0.1)), make(dict(type='SGD', lr=0.05))
    half.later(objective(half, 1))
    half.learn(rate=0.5)
    half.later(objective(half, 2))
    half.learn(rate=0.5)
    for own, wanted in zip(half.parameters(), steps(full, (1, 2))):
        assert torch.allclose(own, wanted, rtol=1e-6)


def test_a_restored_one_goes_on_as_it_would_have():
    whole = steps(make(), range(6))
    first = make()
    steps(first, range(3))
    state, extra = copy.deepcopy(first.state_dict()), copy.deepcopy(first.state())
    second = make()
    second.load_state_dict(state)
    second.load(extra)
    assert all(torch.equal(own, wanted) for own, wanted in zip(steps(second, range(3, 6)), whole))
    third = make()
    third.load_state_dict(state)  # without the moments of Adam
    assert not all(torch.equal(own, wanted) for own, wanted in zip(steps(third, range(3, 6)), whole))


def test_no_gradient_mode_and_autocast_of_the_caller_do_not_matter():
    plain = steps(make(), (1, ))
    opponent = make()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        found = steps(opponent, (1, ))
    assert all(torch.equal(own, wanted) for own, wanted in zip(found, plain))


@pytest.mark.parametrize('optimizer, match', [
    (None, 'no config'), (dict(lr=0.1), 'no config'), (dict(type='Nothing', lr=0.1), 'Nothing'),
    (dict(type='SGD', lr=0.1, speed=3), 'speed'), (dict(type='SGD', lr=-1), '-1')])
def test_bad_optimizers(optimizer, match):
    with pytest.raises(ValueError, match=match):
        Opponent(nn.Linear(1, 1), optimizer)


# ------------------------------------------------------------------------------------------------ spectral norm


def test_spectral_norm_by_hand():
    """The weight diag(3, 1) and u = (1, 1) / sqrt 2: v ~ (3, 1), u' ~ (9, 1), W v ~ (9, 1), sigma = 82 / sqrt(820)."""
    layer = SpectralConv2d(2, 2, 1, bias=False).double()
    layer.conv.weight.data = torch.diag(torch.tensor([3., 1.]).double()).view(2, 2, 1, 1)
    layer.u = torch.ones(2).double() / 2**0.5
    sigma = 82 / (10 * 82)**0.5
    out = layer(torch.ones(1, 2, 1, 1).double()).flatten()
    assert torch.allclose(out, torch.tensor([3 / sigma, 1 / sigma]).double())
    assert torch.allclose(layer.u, torch.tensor([9., 1.]).double() / 82**0.5)


def test_power_iteration_stands_still_while_frozen():
    layer = SpectralConv2d(2, 3, 1).requires_grad_(False)
    before = layer.u.clone()
    images = torch.randn(1, 2, 4, 4)
    assert torch.equal(layer(images), layer(images)) and torch.equal(layer.u, before)
    layer.requires_grad_(True)
    layer(images)
    assert not torch.equal(layer.u, before)
    assert set(layer.state_dict()) == {'u', 'conv.weight', 'conv.bias'}


def test_gradient_goes_through_the_norm_with_fixed_vectors():
    """``W / (u'^T W v)`` with constant vectors: checked against differences with u' and v of the first call."""
    layer = SpectralConv2d(2, 2, 1, bias=False).double()
    images, weight, u = torch.randn(1, 2, 3, 3).double(), layer.conv.weight, layer.u.clone()
    layer(images).square().sum().backward()
    v = nn.functional.normalize(weight.detach().flatten(1).t() @ u, dim=0)
    left = nn.functional.normalize(weight.detach().flatten(1) @ v, dim=0)

    def value(matrix):
        return nn.functional.conv2d(images, matrix / (left @ matrix.flatten(1) @ v)).square().sum()

    copied = weight.detach().clone().requires_grad_()
    value(copied).backward()
    assert torch.allclose(weight.grad, copied.grad)
    assert not torch.allclose(weight.grad, torch.zeros_like(weight.grad))
