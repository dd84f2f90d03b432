"""Re-parametrised blocks in their two forms; those of MMYOLO are in known/test_mmyolo.py."""

import copy

import pytest
import torch
from torch import nn

from kd_mm.hosts import deployed
from kd_mm.hosts.weights import load_weights


class Block(nn.Module):
    """Two branches, or one."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.deploy = False

    def forward(self, x):
        return self.one(x) if self.deploy else self.wide(x) + self.narrow(x)

    def switch_to_deploy(self):
        self.one = nn.Conv2d(2, 2, 3, padding=1)
        self.one.weight.data = self.wide.weight.data + nn.functional.pad(self.narrow.weight.data, [1] * 4)
        self.one.bias.data = self.wide.bias.data + self.narrow.bias.data
        del self.wide, self.narrow
        self.deploy = True


class Stage(nn.Sequential):
    """Merges what is inside of it, as mmpretrain's backbones do."""

    deploy = False

    def switch_to_deploy(self):
        for block in self:
            block.switch_to_deploy()
        self.deploy = True


class Other(nn.Module):
    """A method of this name that wants settings, as MMPose has it."""

    def switch_to_deploy(self, test_cfg):
        raise AssertionError('nobody asked for it')


def model(seed, whole=False):
    torch.manual_seed(seed)
    stage = (Stage if whole else nn.Sequential)(Block(), Block())
    return nn.ModuleDict(dict(stage=stage, other=Other(), head=nn.Conv2d(2, 1, 1))).eval()


def run(network, picture):
    return network['head'](network['stage'](picture))


@pytest.mark.parametrize('whole', [False, True])
def test_merged_it_computes_the_same(whole):
    network, picture = model(0, whole), torch.rand(1, 2, 5, 5)
    before = run(network, picture)
    assert [path for path, _ in deployed.blocks_of(network)] == [*['stage'] * whole, 'stage.0', 'stage.1']
    deployed.merge(network)
    assert torch.allclose(run(network, picture), before, atol=1e-6) and not deployed.blocks_of(network)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize('merged', [(), (0, ), (0, 1)])
def test_a_file_is_loaded_in_its_form(merged):
    trained, picture = model(1), torch.rand(1, 2, 5, 5)
    for index in merged:
        trained['stage'][index].switch_to_deploy()
    network = model(2)
    notes = load_weights(network, dict(state_dict=trained.state_dict()), 'file.pth')
    assert torch.equal(run(network, picture), run(trained, picture))
    assert [block.deploy for block in network['stage']] == [index in merged for index in range(2)]
    count = {1: '1 re-parametrised block (stage.0)', 2: '2 re-parametrised blocks (stage.0, ...)'}
    assert len(notes) == bool(merged) and (not merged or f'has the merged form of {count[len(merged)]}' in notes[0])


def test_what_fits_neither_form_is_refused_and_left_as_it_was():
    trained = model(1)
    deployed.merge(trained)
    state = trained.state_dict()
    del state['stage.0.one.bias']
    network = copy.deepcopy(model(2))
    with pytest.raises(ValueError, match='leaves 4 of .* keys unset .*stage.0.wide'):
        load_weights(network, dict(state_dict=state), 'file.pth')
    assert [block.deploy for block in network['stage']] == [False, True]
