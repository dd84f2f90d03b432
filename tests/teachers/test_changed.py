"""A teacher that somebody changes after its fast form was found: no tap is stale, and no module of it trains."""

import copy

import pytest
import torch
from chains import Chain, settle
from torch import nn
from torch.nn.utils import parametrizations

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import base
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.shared import Shared
from kd_mm.types.batch import KDBatch

FORM = dict(fold=True, attention=True, onednn=True, channels_last=True)
BATCH = KDBatch(input_shape=(16, 20))


class Net(nn.Module):
    """Pairs, a convolution alone, an attention and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.Dropout(0.5))
        self.alone, self.attention = nn.Conv2d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)
        self.rows, self.end = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Identity()

    def forward(self, images):
        maps = self.alone(self.body(self.stem(images)))
        rows = maps.flatten(2).transpose(1, 2)
        rows = self.rows(self.attention(rows, rows, rows)[0])
        return self.end(rows.transpose(1, 2).unflatten(2, maps.shape[-2:]).contiguous())


def taught(model, speed, path='end', runs=2):
    teacher, tap = Teacher(model, nn.Conv2d(3, 3, 1)), Tap(model, path, 'teacher')
    teacher.go(speed)
    images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    teacher.run(images, (), [tap], BATCH, full=True)
    tap.clear()
    for _ in range(runs):
        teacher.run(images, (), [tap], BATCH)
        tap.clear()
    teacher.fast.folding._look = lambda: None  # of many pairs it looks at one in each pass
    return teacher, tap, images


def changed(change, speed, runs=3):
    """What the log says; the taps of every step after a change are those of the changed model in eval mode."""
    teacher, tap, images = taught(settle(Net()), speed)
    said = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, 'print_log', lambda text, *args, **kwargs: said.append(text))
        change(teacher.model)
        expected = copy.deepcopy(teacher.model).eval()(images)
        for _ in range(runs):
            teacher.run(images, (), [tap], BATCH)
            found, = tap.read()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters()) or not said
    assert not any('forward' in vars(module) for module in teacher.model.modules())
    return teacher, said


def values(*shape):
    return nn.Parameter(torch.randn(shape))


EXCHANGES = [
    lambda m: setattr(m.stem, '0', nn.Conv2d(3, 8, 3, padding=1)),
    lambda m: setattr(m.stem, '1', settle(nn.Sequential(nn.BatchNorm2d(8)))[0]),  # in training mode
    lambda m: setattr(m.body, '2', nn.ReLU()),
    lambda m: setattr(m.body, '3', nn.Dropout(0.5)),
    lambda m: setattr(m, 'body', settle(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5)))),
    lambda m: setattr(m, 'attention', nn.MultiheadAttention(8, 4, dropout=0.5, batch_first=True)),
    lambda m: setattr(m.rows, '0', nn.Linear(8, 16)),
    lambda m: m.body.append(nn.Dropout(0.9)),
    lambda m: m.body.insert(3, nn.BatchNorm2d(8)),
    lambda m: m.body.__delitem__(2),
    lambda m: m.alone.register_module('inside', nn.Dropout(0.5))]


@pytest.mark.parametrize('speed', ['auto', 'exact', dict(FORM, chunk=1)], ids=str)
@pytest.mark.parametrize('number', range(len(EXCHANGES)))
def test_a_module_that_is_exchanged_is_frozen_and_seen(number, speed):
    teacher, said = changed(EXCHANGES[number], speed)
    assert len(said) == 1 and 'modules of it were exchanged' in said[0]
    if speed == 'auto' and number in (0, 1):
        assert 'stem.0' in teacher.fast.folding.names  # the form is found anew


def test_what_is_known_of_the_student_stays_known():
    teacher, tap, images = taught(settle(Net()), 'auto')
    teacher.fast.budget, teacher.fast.gradients, before = 3.0, 5.0, teacher.fast
    teacher.model.alone = nn.Conv2d(8, 8, 3, padding=1)
    teacher.run(images, (), [tap], BATCH)
    assert teacher.fast is not before and (teacher.fast.budget, teacher.fast.gradients) == (3.0, 5.0)


def test_a_module_that_is_tapped_is_exchanged():
    """At the end of the path there is another module now; a tap that comes later goes there as well."""
    teacher, tap, images = taught(settle(Net()), 'auto', 'body')
    teacher.model.body = settle(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5)))
    late = Tap(teacher.model, 'end', 'teacher')
    teacher.model.end = nn.Dropout(0.5)
    for taps in ([tap], [tap, late], [tap, late]):
        teacher.run(images, (), taps, BATCH)
        found = [one.read()[0] for one in taps]
        with torch.no_grad():
            expected = [teacher.model.body(teacher.model.stem(images)), teacher.model(images)]
        for own, theirs in zip(found, expected):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


def test_the_model_itself_is_another_one():
    teacher, tap, images = taught(settle(Net()), 'auto')
    teacher.model = settle(Net())
    nn.init.normal_(teacher.model.alone.weight)
    for _ in range(3):
        teacher.run(images, (), [tap], BATCH)
        with torch.no_grad():
            torch.testing.assert_close(tap.read()[0], teacher.model(images), rtol=1e-4, atol=1e-4)
    assert not teacher.model.training and teacher.fast.model is teacher.model


def test_a_look_for_other_modules_costs_next_to_nothing():
    """It compares lists of children; a walk over the modules took twenty times as long."""
    teacher, tap, images = taught(settle(Net()), 'auto')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, 'named_modules', lambda *args, **kwargs: pytest.fail('a walk over all modules'))
        teacher.check_eval()


@pytest.mark.parametrize('speed', ['auto', FORM, dict(fold=True)], ids=str)
@pytest.mark.parametrize('change', [
    lambda m: setattr(m.stem[0], 'weight', values(8, 3, 3, 3)), lambda m: setattr(m.stem[0], 'bias', values(8)),
    lambda m: setattr(m.stem[0], 'bias', None), lambda m: setattr(m.stem[1], 'weight', values(8)),
    lambda m: [setattr(m.stem[1], 'weight', values(8)) for _ in range(3)],
    lambda m: setattr(m.stem[1], 'weight', None), lambda m: setattr(m.stem[1], 'running_mean', torch.randn(8)),
    lambda m: [setattr(m.stem[1], name, None) for name in ('running_mean', 'running_var')],
    lambda m: setattr(m.attention, 'in_proj_weight', values(24, 8)),
    lambda m: setattr(m.rows[0], 'weight', values(16, 8)), lambda m: setattr(m.stem[0], 'stride', (2, 2)),
    lambda m: setattr(m.alone, 'padding', (0, 0)), lambda m: setattr(m.alone, 'dilation', (2, 2)),
    lambda m: setattr(m.alone, 'padding', 'same'), lambda m: setattr(m.stem[0], 'padding', 'same'),
    lambda m: setattr(m.alone, 'padding_mode', 'reflect'), lambda m: setattr(m.stem[0], 'padding_mode', 'reflect'),
    lambda m: setattr(m.stem[1], 'eps', 0.5), lambda m: setattr(m.body[2], 'negative_slope', 0.7),
    lambda m: setattr(m.rows[1], 'approximate', 'tanh'), lambda m: m.attention.__dict__.update(num_heads=4, head_dim=2),
    lambda m: m.body.train(), lambda m: m.body[3].train(), lambda m: m.body[1].train(),
    lambda m: m.stem[0].register_forward_hook(lambda module, given, output: output + 1),
    lambda m: m.alone.register_forward_hook(lambda module, given, output: output + 1),
    lambda m: m.body[2].register_forward_hook(lambda module, given, output: output + 1),
    lambda m: m.rows[0].register_forward_pre_hook(lambda module, given: (given[0] + 1, )),
    lambda m: m.attention.register_forward_hook(lambda module, given, output: (output[0] + 1, None)),
    lambda m: m.attention.register_forward_hook(lambda module, given, output: (output[0] * output[1].mean(), None)),
    lambda m: parametrizations.weight_norm(m.stem[0]), lambda m: doubled(m.stem[0]), lambda m: doubled(m.alone),
    lambda m: doubled(m.stem[1]), lambda m: doubled(m.body[2]), lambda m: doubled(m.rows[0])])
def test_parameters_options_and_hooks_are_read_in_every_pass(change, speed):
    changed(change, speed)


def doubled(module):
    """The same module of a class of somebody else."""
    kind = type(module)
    module.__class__ = type('Doubled', (kind, ), dict(forward=lambda self, maps: 2 * kind.forward(self, maps)))


def test_memory_that_was_another_parameters():
    """Neither its address nor its version tells it from the one that was there before."""
    model = settle(Chain())
    teacher, tap, images = taught(model, dict(fold=True), 'act')
    folded, = (folded for folded in teacher.fast.folding.pairs if folded.pair.name == 'a')
    first = model.an.weight.data_ptr()
    for _ in range(50):  # the allocator gives memory again that was given back
        model.an.weight = nn.Parameter(torch.full((8, ), 3.0), requires_grad=False)
        assert model.an.weight.data_ptr() != first
    model.an.weight.data = torch.rand(8)
    model.an.weight.data = torch.full((8, ), 5.0)
    teacher.run(images, (), [tap], BATCH)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model.act(model.an(model.a(images))))


@pytest.mark.parametrize('side', [0, 1])
def test_an_exchanged_module_is_no_common_start(side):
    """Same options, no weights: only its class tells it from what was there."""
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict(dict(stage=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)))).eval()

    models = [build().requires_grad_(False) for _ in range(2)]
    shared, images = Shared(*models), torch.randn(1, 3, 4, 4)
    with shared.looking(images):
        models[1].stage(images)
    assert shared.start()
    models[side].stage[1] = nn.SiLU(inplace=True).eval()
    assert not shared.start()
    models[side].stage[1] = nn.ReLU(inplace=True).eval()
    assert shared.start()
    models[side].stage.train()
    assert not shared.start()
    models[side].stage.eval()
    assert shared.start()
    bias, models[side].stage[0].bias = models[side].stage[0].bias, None
    assert not shared.start()
    models[side].stage[0].bias = bias
    assert shared.start()
    models[side].stage.append(nn.Identity().eval())
    assert not shared.start()
