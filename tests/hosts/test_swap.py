"""One attribute of one instance for a while: put back exactly, whatever was there."""

import pytest
import torch
from torch import nn

from kd_mm.hosts.swap import Swap, swapped


class Host(nn.Module):
    def loss(self):
        return 'class'


@pytest.mark.parametrize('before', [{}, {'loss': None}, {'loss': len}])
def test_what_was_there_is_there_again(before):
    host = Host()
    vars(host).update(before)
    state = dict(vars(host))
    swap = Swap(host, 'loss', lambda: 'other')
    swap.off()  # not on yet: nothing to undo
    for _ in range(2):
        assert swap.on().on().active and host.loss() == 'other'
        swap.off()
        swap.off()
        assert vars(host) == state and not swap.active


def test_undone_twice_it_leaves_what_came_between():
    host = Host()
    swap = Swap(host, 'loss', 1).on()
    swap.off()
    host.loss = 2
    swap.off()
    assert host.loss == 2


def test_nested_and_undone_after_an_error():
    host = Host()
    with pytest.raises(KeyError), swapped(host, 'loss', None):
        with swapped(host, 'loss', 3):
            assert host.loss == 3
        assert host.loss is None
        raise KeyError
    assert 'loss' not in vars(host) and host.loss() == 'class'


def test_a_module_as_the_value_is_no_sub_module():
    host = Host()
    host.neck = nn.Linear(1, 1)
    neck, other = host.neck, nn.Linear(2, 2)
    with swapped(host, 'neck', other):
        assert host.neck is other and [*host.modules()] == [host, neck]
    assert host.neck is neck and torch.equal(next(host.parameters()), neck.weight)
