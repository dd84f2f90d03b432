"""Weights that are kept as the processor's library wants them: the same numbers, never stale, of small maps alone."""

import copy

import pytest
import torch
from chains import Chain, settle, teach
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import packed
from kd_mm.teachers.ema import EMATeacher
from kd_mm.types.batch import KDBatch

FORM = dict(fold=True, onednn=True, channels_last=True)
PACKED = dict(FORM, pack=True)


def again(teacher, path='act', images=None):
    """What a tap gives in another pass, and what the host's own forward does."""
    images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0)) if images is None else images
    tap = Tap(teacher.model, path, 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=tuple(images.shape[-2:])))
    found = tap.read()[0]
    with teacher_as_host(teacher):
        teacher.run(images, (), [tap], KDBatch(input_shape=tuple(images.shape[-2:])))
    return found, tap.read()[0]


class teacher_as_host:  # noqa: N801
    """The host's own forward inside."""

    def __init__(self, teacher):
        self.fast = teacher.fast

    def __enter__(self):
        self.form = self.fast.speed
        self.fast.speed = type(self.form)()

    def __exit__(self, *_):
        self.fast.speed = self.form


class Sizes(nn.Module):
    """One convolution on maps of several sizes, pairs of other kinds, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.stemn = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.deep, self.deepn = nn.Conv2d(16, 16, 5, padding=4, dilation=2, groups=16), nn.BatchNorm2d(16)
        self.grouped, self.groupedn = nn.Conv2d(16, 16, 1, groups=4, bias=False), nn.BatchNorm2d(16)
        self.shared, self.relu, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, images):
        x = self.relu(self.stemn(self.stem(images)))
        y = self.deepn(self.deep(x))
        y = self.relu(self.groupedn(self.grouped(y)) + x)
        maps = [self.shared(y[..., :edge, :edge].contiguous(memory_format=torch.channels_last)) for edge in (8, 3, 1)]
        return self.out(torch.cat([part.flatten(2) for part in maps], 2))


@pytest.mark.parametrize('precision', [None, 'bf16'])
def test_the_numbers_are_those_of_unpacked_weights(precision):
    # under an autocast torch runs what is not folded, and all of it on a processor without bfloat16: nothing is packed
    packs = 4 if not precision else 3 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0
    images = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    model, results = settle(Sizes()), []
    for form in (FORM, PACKED):
        teacher, far, found = teach(model, dict(form, precision=precision), paths=('out', ), images=images, runs=6)
        assert far < (5e-2 if precision else 1e-5)
        results.append(found['out'][0])
        kept = teacher.fast.packing._kept
        assert len(kept) == (packs if form is PACKED else 0)
        assert all(item.packed.is_mkldnn for item in kept.values())
    assert torch.equal(*results)


def test_auto_keeps_them_where_its_maps_are_laid_out_for_it():
    images = torch.randn(4, 3, 128, 128)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                 nn.Conv2d(8, 8, 3, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Identity()))
    teacher, far, _ = teach(model, 'auto', paths=('6', ), images=images)
    assert far < 1e-5 and list(teacher.fast.packing._kept) == [model[3]]  # the first has 65536 cells
    teacher, _, _ = teach(model, 'auto', paths=('6', ), images=images[:, :, :64, :64])
    assert not teacher.fast.packing._kept  # a small batch is laid out as usual


@pytest.mark.parametrize('edge, kept', [(64, 1), (65, 0)])
def test_up_to_which_size_they_are_kept(edge, kept):
    assert packed.CELLS == 64 * 64
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Identity())
    teacher, _, _ = teach(model, PACKED, paths=('2', ), images=torch.randn(1, 3, edge, 64))
    assert len(teacher.fast.packing._kept) == kept


def test_a_pair_whose_weights_are_kept_always_pays():
    model = settle(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64),
                                 nn.Identity()))
    innermost = torch.zeros(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for form, pays in ((FORM, False), (PACKED, True)):
        teacher, _, _ = teach(model, form, paths=('3', ))
        folded, = teacher.fast.folding.pairs
        assert folded.pays(innermost) == pays and not folded.pays(torch.zeros(2, 3, 16, 16))


def test_weights_that_change_are_not_kept():
    """A mean teacher and a peer say so."""
    for fixed in (True, False):
        packing = packed.Packing(fixed)
        packing.on = True
        assert packing.takes(nn.Conv2d(3, 3, 1), 1) == fixed and not packing.takes(nn.Linear(3, 3), 1)
    teacher = EMATeacher(nn.Sequential(settle(Chain())))
    teacher.go(PACKED)
    assert not teacher.fast.packing.fixed


@pytest.mark.parametrize('change', [
    lambda m: m.a.weight.data.mul_(2), lambda m: setattr(m.a.weight, 'data', 2 * m.a.weight.data),
    lambda m: m.a.weight.data[3].add_(1), lambda m: m.a.weight.data[:, 2].zero_(),
    lambda m: (m.a.weight.data[1:, 1:].mul_(3), m.b.weight.data.mul_(2))])
def test_a_change_past_the_count_is_seen_at_once(change, monkeypatch):
    said = []
    monkeypatch.setattr(packed, 'print_log', lambda text, *_, **__: said.append(text))
    model = settle(Chain())
    teacher, _, _ = teach(model, PACKED, paths=('bn', ))
    teacher.fast.packing.look = lambda: None
    change(model)
    torch.testing.assert_close(*again(teacher, 'bn'))  # the pass in which it is found is done again
    torch.testing.assert_close(*again(teacher, 'bn'))
    assert len(said) == bool(teacher.fast.packing.fixed is False)
    assert not said or 'changed through `.data`' in said[0]


@pytest.mark.parametrize('name', ['a', 'b'])
def test_a_change_past_the_count_beside_the_middle_is_found_in_turn(name):
    model = settle(Chain())
    teacher, _, _ = teach(model, PACKED, paths=('bn', ))
    assert len(teacher.fast.packing._kept) == 2
    getattr(model, name).weight.data[:, 1, 0, 0] += 1
    for _ in range(2):  # one layer in each pass
        found = again(teacher, 'bn')
    torch.testing.assert_close(*found)
    assert not teacher.fast.packing.fixed


def test_numbers_of_a_norm_past_the_count():
    """They are read anew in every pass; weights that are packed anew in every pass would take longer than unpacked."""
    model = settle(Chain())
    teacher, _, _ = teach(model, PACKED, paths=('bn', ))
    model.an.running_mean.data.add_(1)
    model.bn.weight.data.mul_(2)
    for _ in range(2):
        found = again(teacher, 'bn')
    torch.testing.assert_close(*found)
    assert not teacher.fast.packing.fixed and not teacher.fast.packing._kept


@pytest.mark.parametrize('change', ['norms', 'all', 'read again'])
def test_a_look_after_a_counted_change_keeps_on(change):
    """The next pass packs anew; what is there until then is no change past the count."""
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Identity()))
    teacher, _, _ = teach(model, PACKED, paths=('25', ))
    assert len(teacher.fast.packing._kept) == 9
    with torch.no_grad():
        for module in model:
            if change == 'read again':
                module.load_state_dict(module.state_dict())
            elif isinstance(module, nn.BatchNorm2d) or change == 'all' and isinstance(module, nn.Conv2d):
                module.weight.mul_(1.1)
    for _ in range(3):
        torch.testing.assert_close(*again(teacher, '25'))
    assert teacher.fast.packing.fixed and len(teacher.fast.packing._kept) == 9
    assert all(folded.fixed for folded in teacher.fast.folding.pairs)


def test_what_no_one_can_use_is_let_go():
    model = settle(Chain())
    teacher, _, _ = teach(model, PACKED, paths=('bn', ))
    packing = teacher.fast.packing
    model.double()
    for _ in range(2):
        packing.look()
    assert not packing._kept and packing.fixed


def test_weights_whose_changes_torch_does_not_count():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Identity())
    assert model[0].weight.is_inference()
    teacher, far, _ = teach(model, dict(onednn=True, channels_last=True, pack=True), paths=('2', ))
    assert far < 1e-5 and not teacher.fast.packing._kept


def test_a_copy_packs_anew():
    teacher, _, _ = teach(settle(Chain()), PACKED, paths=('bn', ))
    other = copy.deepcopy(teacher.fast.packing)
    assert teacher.fast.packing._kept and not other._kept and other.fixed
