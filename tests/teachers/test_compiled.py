"""Compiled parts of a teacher: what lies between the taps, with the host's values at the taps."""

import contextlib

import pytest
import torch
from chains import Chain, settle, teach
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import fast, fold
from kd_mm.teachers.compiled import parts_around
from kd_mm.teachers.speed import speed_of


class Deep(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = Chain()
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 3, 1), nn.ReLU(inplace=True), Chain())])
        self.head = nn.Conv2d(8, 2, 1)

    def measure(self, maps):
        return maps.sum((2, 3))

    def forward(self, images):
        maps = self.stem(images)
        for block in self.body:
            maps = block(maps)
        return self.measure(self.head(maps))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('paths, expected', [
    (['head'], ['stem', 'body.0', 'head']), (['body.0.1'], ['stem', 'body.0.0', 'body.0.1', 'body.0.2', 'head']),
    (['stem'], ['stem', 'body.0', 'head']), (['measure'], ['stem', 'body.0', 'head'])])
def test_parts_are_as_large_as_the_taps_let_them(paths, expected):
    model = Deep()
    names = {module: name for name, module in model.named_modules()}
    assert [names[part] for part in parts_around(model, [Tap(model, path) for path in paths])] == expected


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('paths', [('head', ), ('stem.act', 'body.0'), ('body.0.0', )])
def test_taps_inside_and_outside_give_what_the_host_gives(paths, fold):
    model = settle(Deep())
    speed = dict(compile='eager', fold=fold)  # traced as any backend's, and quick
    teacher, far, _ = teach(model, speed, paths=paths, runs=3)
    assert far < 1e-5
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    taps = [Tap(model, path, 'teacher') for path in paths]
    with torch.no_grad():
        teacher.fast.run(torch.randn(2, 3, 16, 20), (), taps)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before  # nothing is compiled anew
    assert not any('forward' in vars(module) for module in model.modules())


def test_a_backend_that_torch_does_not_know():
    """Before the first step, which would raise torch's own error."""
    assert speed_of('teacher', dict(compile='aot_eager'), torch.device('cpu')).compile == 'aot_eager'
    with pytest.raises(ValueError, match=r"teacher: speed: compile='a' is not one of True, False, .*'inductor'"):
        speed_of('teacher', dict(compile='a'), torch.device('cpu'))


class Growing(nn.Module):
    """Blocks of one class, each of another width."""

    def __init__(self, blocks=12):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3 + i, 4 + i, 1), nn.ReLU()) for i in range(blocks))
        self.end = nn.Identity()

    def forward(self, images):
        for block in self.blocks:
            images = block(images)
        return self.end(images)


def test_more_blocks_than_torch_compiles_of_one_function():
    """Each is compiled; its limit of eight (``recompile_limit`` by its older name) is there again afterwards."""
    config = torch._dynamo.config
    torch._dynamo.reset()
    limits, before = config.cache_size_limit, torch._dynamo.utils.counters['stats']['unique_graphs']
    model = settle(Growing())
    _, far, _ = teach(model, dict(compile='eager'), paths=('end', *(f'blocks.{i}' for i in range(12))))
    assert far < 1e-5 and torch._dynamo.utils.counters['stats']['unique_graphs'] - before >= 12 > limits
    assert config.cache_size_limit == limits


def test_nothing_is_exchanged_inside_of_a_compiled_part(monkeypatch):
    """Its graph would have another forward in it, or be made anew in every pass."""
    model, folded, direct = settle(Deep()), [], []
    monkeypatch.setattr(fold.Folded, 'on', lambda self, *_: folded.append(self.pair.name) or contextlib.nullcontext())
    monkeypatch.setattr(fast.kernels, 'direct', lambda layer, original, _: direct.append(layer) or original)
    form, maps = dict(fold=True, onednn=True, channels_last=True), [*model.stem.children(), *model.body.modules()]
    teach(model, form, paths=('measure', ))
    assert set(folded) == {'stem.a', 'stem.b', 'body.0.0', 'body.0.2.a', 'body.0.2.b'}
    assert {*direct} == {model.head, *(module for module in maps if isinstance(module, nn.Conv2d))}
    folded.clear()
    direct.clear()
    teach(model, dict(form, compile='eager'), paths=('measure', ))
    assert not folded and not direct
