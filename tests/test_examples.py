"""The examples of the docstrings run, and print the same on every processor."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from rounding import Rounding

import kd_mm

MODULES = sorted(info.name for info in pkgutil.walk_packages(kd_mm.__path__, 'kd_mm.'))


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_run(name):
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_do_not_depend_on_rounding(name):
    torch.manual_seed(0)
    with Rounding():
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_rounding_moves_what_is_not_exact_and_nothing_else():
    x = torch.rand(64, generator=torch.Generator().manual_seed(0))
    with Rounding():
        twice = [(x.exp(), x.softmax(dim=0), x @ x[:, None]) for _ in range(2)]
        exact = torch.ones(3, 5) @ torch.ones(5, 3), torch.arange(9.).mean(), x / 3, torch.zeros(4).softmax(dim=0)
        kept = x.clone().mul_(1).flip(0).cumsum(0)
    assert not torch.equal(twice[0][0], twice[1][0]) and not torch.equal(twice[0][1], twice[1][1])
    assert all(torch.allclose(first, second) for first, second in zip(*twice))
    assert torch.equal(exact[0], torch.full((3, 3), 5.)) and exact[1] == 4 and torch.equal(exact[2], x / 3)
    assert torch.equal(exact[3], torch.full((4, ), 0.25)) and torch.allclose(kept, x.flip(0).cumsum(0))
    assert not torch.equal(kept, x.flip(0).cumsum(0))


def test_an_example_that_prints_a_rounded_zero_is_found():
    """The gap of two unit vectors, once printed as ``tensor(0.)`` by the processor at hand and not by the next."""
    x = torch.rand(16, 48, generator=torch.Generator().manual_seed(0))
    with Rounding():
        gap = (torch.nn.functional.normalize(x) - torch.nn.functional.normalize(x)).square().sum().sqrt()
    assert 0 < gap < 1e-6
