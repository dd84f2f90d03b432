"""Networks and parts of a user's own in a loop of their own: what is wrong is said, and not passed over in silence."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run
from torch import nn
from torch.nn import functional as F

from kd_mm.adapters.base import Adapter
from kd_mm.engine.distiller import Distiller
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS

LOSSES = dict(loss_hint=dict(type='FitNetLoss', student_at='net.0', teacher_at='0', loss_weight=1.0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1))


class WithLosses(nn.Module):
    """A network with the forward of a host's model; ``form`` is what it returns for ``mode='loss'``."""

    def __init__(self, form=dict):
        super().__init__()
        self.net, self.form = network(), form

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.net(inputs)
        if mode != 'loss':
            return outputs
        loss = F.cross_entropy(outputs, data_samples)
        return dict(loss=loss) if self.form is dict else loss


PICTURES, LABELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 8, 8).long()


def test_a_network_that_knows_no_losses_is_refused():
    student = network()
    kd = Distiller(student, network(), dict(loss_hint=dict(type='FitNetLoss', at='0')))
    with pytest.raises(ValueError, match="Sequential.forward has no argument 'mode'.*own_loop"):
        kd.attach()
    assert not student._forward_hooks and not student._forward_pre_hooks


def test_a_loss_that_is_no_dict_is_refused():
    student = WithLosses(form=float)
    kd = Distiller(student, network(), LOSSES)
    kd.attach()
    with pytest.raises(ValueError, match=r"WithLosses.forward\(mode='loss'\) returned Tensor: .*dict of losses"):
        student.train()(PICTURES, LABELS, mode='loss')
    kd.detach()


def test_a_loop_that_forgets_the_mode_is_told_once():
    student = WithLosses()
    kd = Distiller(student, network(), LOSSES)
    kd.attach()
    student.train()
    with pytest.warns(UserWarning, match="without mode='loss', and nothing is distilled"):
        student(PICTURES)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        student(PICTURES)
    kd.detach()


def test_passes_that_are_no_training_are_not_told():
    student = WithLosses()
    kd = Distiller(student, network(), LOSSES)
    kd.attach()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        student.eval()(PICTURES)
        with torch.no_grad():
            student.train()(PICTURES)
        copy.deepcopy(student).train()(PICTURES)  # carries the hooks, and is another model
        assert 'loss_hint' in student(PICTURES, LABELS, mode='loss')
        student(PICTURES)  # who knows the mode may look at outputs, too
    kd.detach()


def test_a_loop_of_several_processes_equals_one(tmp_path):
    """As docs/own_loop.md says: the wrapped student, `follow`, and extras that are equal on both ranks."""
    worker = str(Path(__file__).resolve().parents[1] / 'helpers' / 'own_loop_worker.py')
    one, = run([worker, str(tmp_path / 'one'), '1'], tmp_path / 'one', 1)
    first, second = run([worker, str(tmp_path / 'two'), '2'], tmp_path / 'two', 2)
    assert one['extras']
    for part in ('student', 'extras'):
        for key, value in one[part].items():
            assert torch.equal(first[part][key], second[part][key]), (part, key)
            torch.testing.assert_close(first[part][key], value, rtol=1e-4, atol=1e-6)


def test_extras_are_resumed():
    kinds = dict(losses=LOSSES | dict(loss_pkd=dict(type='FitNetLoss', student_at='net.0', teacher_at='1')))
    old, new = (Distiller(WithLosses(), network(), seed=seed, **kinds) for seed in (0, 1))
    state = old.trainable_modules().state_dict()
    assert state and not all(torch.equal(value, new.trainable_modules().state_dict()[key])
                             for key, value in state.items())
    new.trainable_modules().load_state_dict(state)
    assert all(torch.equal(value, new.trainable_modules().state_dict()[key]) for key, value in state.items())


class Unpacks(RegionMask):
    def forward(self, features, batch):
        return [torch.ones(count, 1, height, width) for count, height, width in (level.shape for level in features)]


class Flat(RegionMask):
    def forward(self, features, batch):
        return tuple(level[:, 0] for level in features)


class Single(Adapter):
    def prepare(self, student, teacher):
        self.width = student.shape[1]

    def forward(self, student, teacher):
        return student, teacher


class Alone(Adapter):
    def forward(self, student, teacher):
        return student


@pytest.mark.parametrize('keys, expected', [
    (dict(region=Unpacks), r'Unpacks fails: ValueError: too many values.*L tensors \(N, 1, H, W\)'),
    (dict(region=Flat), r'Flat returned \(\(2, \d+, \d+\),\); a region returns a tuple of weights \(N, 1, H, W\)'),
    (dict(adapter=Single), "Single fails: AttributeError: 'tuple' object has no attribute 'shape'.*two tuples of ten"),
    (dict(adapter=Alone), r"Alone returned \['Tensor'\].*forward returns two such tuples")])
def test_a_part_of_the_user_that_fails_is_named(keys, expected, monkeypatch):
    (key, part), = keys.items()
    monkeypatch.setitem(MODELS.module_dict, part.__name__, part)
    with pytest.raises(ValueError, match=expected):
        Distiller(WithLosses(), network(), dict(loss_hint=dict(LOSSES['loss_hint'], **{key: dict(type=part.__name__)})))
