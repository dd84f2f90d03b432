"""Layers by the processor's library: residual sums, activations, linear layers, attention; each equal to the host's."""

import pytest
import torch
from chains import settle, teach
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import kernels
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.late import Late
from kd_mm.types.batch import KDBatch

FORM = dict(fold=True, attention=True, onednn=True, channels_last=True)


class Operations(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split('::')[1] + ('_into' if func._overloadname == 'binary' else ''))
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """Two residual blocks of a host, the first with a shortcut of its own; ``twist`` is what might be different."""

    def __init__(self, twist=''):
        super().__init__()
        self.twist = twist
        for name in 'abcd':
            setattr(self, name, nn.Conv2d(3 if name in 'as' else 8, 8, 3, padding=1, bias=name == 'b'))
            setattr(self, f'{name}n', nn.BatchNorm2d(8))
        self.s, self.sn, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.first, self.end = nn.Identity(), nn.Identity()

    def block(self, x, one, two):
        out = first = one[1](one[0](x))
        if self.twist != 'left out':
            out = first = self.relu(out)
        out = two[1](two[0](out))
        if self.twist == 'written over':
            first.mul_(0)
        if self.twist == 'looked at':
            out = out.relu()
        identity = x if two[0] is self.d else self.sn(self.s(x))
        if self.twist == 'own input':
            identity = first
        if self.twist == 'float':
            identity = identity.float()
        if self.twist == 'broadcast':
            identity = identity[:1]
        if self.twist == 'one of two':
            identity = identity.mul_(1) + out
        out += identity
        if self.twist == 'sum kept' and two[0] is self.d:
            return self.relu(out + 0) + out
        return out + 0 if self.twist == 'no relu' else self.relu(out)

    def forward(self, images):
        first = self.first(self.block(images, (self.a, self.an), (self.b, self.bn)))
        second = self.block(first, (self.c, self.cn), (self.d, self.dn))
        if self.twist == 'used later':
            second = second * first
        if self.twist == 'kept':
            self.kept = first
        return self.end(second)


@pytest.mark.parametrize('twist', ['', 'used later', 'kept', 'looked at', 'broadcast', 'sum kept', 'no relu',
                                   'one of two'])
def test_a_sum_is_written_over_what_nobody_wants_any_more(twist):
    model = settle(Block(twist))
    images = torch.randn(2, 3, 32, 24)
    given = images.clone()
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=images)
    assert far < 1e-5 and torch.equal(images, given), twist
    summed = {folded.pair.name for folded in teacher.fast.folding.pairs if folded.pair.summed}
    expected = {'': {'b', 'd'}, 'sum kept': {'b', 'd'}, 'no relu': {'b', 'd'}, 'used later': {'b'}, 'kept': {'b'}}
    assert summed == expected.get(twist, set()) and not teacher.fast.dropped
    tap = Tap(model, 'end', 'teacher')
    with Operations() as operations:
        teacher.run(images, (), [tap], KDBatch(input_shape=(32, 24)))
    assert operations.names.count('_convolution_pointwise__into') == len(summed)
    if twist == '':
        assert not {'relu_', 'clamp_min_', 'add_', 'native_batch_norm'} & set(operations.names)
    if twist == 'kept':
        with torch.no_grad():
            torch.testing.assert_close(model.kept, model.relu(
                model.bn(model.b(model.relu(model.an(model.a(images))))) + model.sn(model.s(images))))


@pytest.mark.parametrize('twist, dropped', [('own input', set()), ('written over', {'b', 'd'})])
def test_a_convolution_that_waits_for_its_sum_sees_its_input_as_it_was(twist, dropped):
    """It would read what the sum writes over, or what something else wrote in the meantime."""
    model = settle(Block(twist))
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=torch.randn(2, 3, 32, 24))
    assert far < 1e-5 and teacher.fast.dropped == dropped


def test_a_sum_with_a_shortcut_in_float32_under_lower_precision():
    """The watched pass ran in float32, where both parts are of one dtype."""
    model = settle(Block('float'))
    teacher, far, found = teach(model, dict(FORM, precision='bf16'), paths=('end', ), images=torch.randn(2, 3, 32, 24))
    assert any(folded.pair.summed for folded in teacher.fast.folding.pairs)
    assert 0 < far < 0.05 and not teacher.fast.dropped


def test_a_sum_that_is_broadcast_later_is_none():
    """The watched pass had one image, for which it is none."""
    model = settle(Block('broadcast'))
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=torch.randn(1, 3, 32, 24))
    assert far < 1e-5 and any(folded.pair.summed for folded in teacher.fast.folding.pairs)
    images, tap = torch.randn(2, 3, 32, 24), Tap(model, 'end', 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=(32, 24)))
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model(images))


@pytest.mark.parametrize('padding', [dict(padding=1, padding_mode='reflect'), dict(padding='same')], ids=str)
@pytest.mark.parametrize('activation', [nn.ReLU(), nn.Identity()], ids=str)
def test_paddings_that_the_library_does_not_have(padding, activation):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, **padding), nn.BatchNorm2d(8), activation,
                                 nn.Identity()))
    teacher, far, _ = teach(model, FORM, paths=('4', ), images=torch.randn(2, 3, 32, 24))
    assert far < 1e-5 and teacher.fast.folding.names == ['1']


@pytest.mark.parametrize('options', [
    dict(dilation=2), dict(stride=2, padding=1), dict(groups=4, padding=(1, 0)), dict(dilation=(1, 2), padding=(1, 2))],
    ids=str)
@pytest.mark.parametrize('act', [nn.ReLU(inplace=True), nn.LeakyReLU(0.3)], ids=str)
@pytest.mark.parametrize('path', ['end', 'conv', 'norm'])
def test_options_of_a_convolution_in_a_sum(options, act, path):
    model = settle(Summed(options, act))
    teacher, far, _ = teach(model, FORM, paths=(path, ), images=torch.randn(2, 3, 32, 24))
    assert far < 1e-5 and 'side' in teacher.fast.folding.names


class Summed(nn.Module):
    """A norm after a convolution with options, and its sum with a shortcut of the same size."""

    def __init__(self, options, act, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, **options), nn.BatchNorm2d(8)
        self.side, self.side_norm = nn.Conv2d(8, 8, 3, **options), nn.BatchNorm2d(8)
        self.act, self.end = act, nn.Identity()

    def forward(self, images):
        maps = self.stem(images)
        side = self.side_norm(self.side(maps))
        out = self.norm(self.conv(maps))
        if self.in_place:
            out += side
        else:
            out = out + side
        return self.end(self.act(out))


@pytest.mark.parametrize('act', [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.3, True)], ids=str)
@pytest.mark.parametrize('paths', [('end', ), ('norm', ), ('norm', 'act', 'end')], ids=str)
def test_an_activation_after_a_sum_and_a_tap_before_it(act, paths):
    """The library has a ReLU after a sum and nothing else; what is tapped in between is that alone."""
    model = settle(Summed(dict(padding=1), act, in_place=False))
    images, batch = torch.randn(2, 3, 32, 24), KDBatch(input_shape=(32, 24))
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=images)
    assert far < 1e-5 and not teacher.fast.dropped
    assert any(folded.pair.summed and folded.pair.activation is act for folded in teacher.fast.folding.pairs)
    taps = [Tap(model, path, 'teacher') for path in paths]
    for _ in range(3):
        teacher.run(images, (), taps, batch)
        found = {tap.path: tap.read()[0] for tap in taps}
    assert not teacher.fast.dropped
    with torch.no_grad():
        norm = model.norm(model.conv(model.stem(images)))
        total = model.act(norm + model.side_norm(model.side(model.stem(images))))
    for path, value in found.items():
        torch.testing.assert_close(value, norm if path == 'norm' else total, rtol=1e-4, atol=1e-5)


class SumAgain(Summed):
    """The sum is wanted without its activation, too."""

    def forward(self, images):
        maps = self.stem(images)
        out = self.norm(self.conv(maps)) + self.side_norm(self.side(maps))
        return self.end(self.act(out) + out)


def test_a_sum_that_is_wanted_after_its_activation_has_none():
    model = settle(SumAgain(dict(padding=1), nn.ReLU()))
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=torch.randn(2, 3, 32, 24))
    summed, = (folded for folded in teacher.fast.folding.pairs if folded.pair.summed)
    assert far < 1e-5 and summed.pair.activation is None and not teacher.fast.dropped


class NormAgain(nn.Module):
    """What an activation is given is wanted without it, too."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.with_norm, self.act, self.end = norm, nn.ReLU(), nn.Identity()

    def forward(self, images):
        maps = self.conv(self.stem(images))
        maps = self.norm(maps) if self.with_norm else maps
        return self.end(self.act(maps) + maps)


@pytest.mark.parametrize('norm', [True, False])
def test_what_is_wanted_after_its_activation_has_none(norm):
    model = settle(NormAgain(norm))
    teacher, far, _ = teach(model, FORM, paths=('end', ), images=torch.randn(2, 3, 32, 24))
    found = [(folded.pair.name, folded.pair.activation) for folded in teacher.fast.folding.pairs]
    assert far < 1e-5 and found == ([('conv', None)] if norm else []) and not teacher.fast.dropped


class OneImage(nn.Sequential):

    def forward(self, images):
        return super().forward(images[0])[None]


def test_one_image_without_its_batch():
    model = OneImage(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Identity())
    assert teach(model, FORM, paths=('2', ))[1] < 1e-5


@pytest.mark.parametrize('late', [False, True])
def test_what_is_tapped_is_never_written_over(late):
    """A tap of the watched pass, and one that comes later."""
    model = settle(Block())
    images, batch = torch.randn(2, 3, 32, 24), KDBatch(input_shape=(32, 24))
    teacher, far, _ = teach(model, FORM, paths=('end', ) if late else ('first', 'end'), images=images)
    taps = [Tap(model, path, 'teacher') for path in ('first', 'end')]
    for _ in range(3):  # the first time a tap copies what it sees
        with Operations() as operations:
            teacher.run(images, (), taps, batch)
        found = {tap.path: tap.read()[0] for tap in taps}
    assert far < 1e-5 and operations.names.count('_convolution_pointwise__into') == (0 if late else 1)
    with torch.no_grad():
        first = model.relu(model.bn(model.b(model.relu(model.an(model.a(images))))) + model.sn(model.s(images)))
        torch.testing.assert_close(found['first'], first)
        torch.testing.assert_close(found['end'], model(images))


def test_a_sum_that_goes_elsewhere_is_done_again():
    model = settle(Block())
    images, batch = torch.randn(2, 3, 32, 24), KDBatch(input_shape=(32, 24))
    teacher, _, _ = teach(model, FORM, paths=('end', ), images=images)
    model.twist = 'sum kept'
    tap = Tap(model, 'end', 'teacher')
    teacher.run(images, (), [tap], batch)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model(images))
    assert teacher.fast.dropped == {'d'}
    model.twist = 'used later'  # what the other sum is written over
    teacher, _, _ = teach(settle(Block()), FORM, paths=('end', ), images=images)
    model = teacher.model
    model.twist, tap = 'used later', Tap(model, 'end', 'teacher')
    teacher.run(images, (), [tap], batch)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model(images))
    assert teacher.fast.dropped == {'d'}
    model.twist = 'looked at'  # anything else than the sum makes the convolution run
    teacher.run(images, (), [tap], batch)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model(images))


def test_an_activation_that_is_left_out_later_is_noticed():
    """One module for all of a block, as in a host: the next layer, too, waits for its activation."""
    model = settle(Block())
    images, batch = torch.randn(2, 3, 32, 24), KDBatch(input_shape=(32, 24))
    teacher, _, _ = teach(model, FORM, paths=('end', ), images=images)
    model.twist, tap = 'left out', Tap(model, 'end', 'teacher')
    teacher.run(images, (), [tap], batch)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model(images), rtol=1e-4, atol=1e-5)
    assert teacher.fast.dropped == {'a', 'c'}


def test_a_tensor_that_is_part_of_a_sum_is_gone():
    def late():
        made.append(1)
        return torch.ones(2)

    made = []
    gone = RuntimeError('gone')
    tensor = Late(torch.float32, (2, ), late, lambda other: other.add_(5), gone)
    assert (torch.zeros(2) + tensor).tolist() == [5, 5] and not made
    with pytest.raises(RuntimeError, match='gone'):
        tensor.sum()
    tensor = Late(torch.float32, (2, ), late, lambda other: None, gone)
    assert (tensor + torch.zeros(2)).tolist() == [1, 1] and tensor.mul_(3).tolist() == [3, 3] and len(made) == 1
    assert torch.cat([tensor, torch.zeros(1)]).tolist() == [3, 3, 0] and tensor.shape == (2, )
    tensor = Late(torch.float32, (2, ), late, lambda other: other.add_(5), gone)  # it is no longer what it was made as
    assert tensor.mul_(3).tolist() == [3, 3] and (tensor + torch.zeros(2)).tolist() == [3, 3]
    tensor = Late(torch.float32, (2, ), late, lambda other: other.add_(5), gone)
    assert torch.add(tensor, torch.ones(2), alpha=2).tolist() == [3, 3]


class Mixed(nn.Module):
    """As in transformers: linear layers, a depthwise convolution, activations at once after them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)
        self.act, self.other, self.relu, self.end = nn.GELU(), nn.GELU(), nn.ReLU(), nn.Identity()

    def forward(self, images):
        maps = self.act(self.two(self.one(images)))
        rows = self.other(self.up(maps.flatten(2).transpose(1, 2)))
        return self.end(self.down(self.relu(rows)))


@pytest.mark.parametrize('precision, near', [(None, 1e-5), ('bf16', 0.05)])
def test_activations_follow_layers_without_a_norm(precision, near):
    model = Mixed()
    images = torch.randn(2, 3, 16, 20)
    teacher, far, found = teach(model, dict(FORM, precision=precision), paths=('end', ), images=images)
    assert 0 < far < near and found['end'][0].dtype == torch.float32
    assert [folded.pair.name for folded in teacher.fast.folding.pairs] == ['two', 'up']
    tap = Tap(model, 'end', 'teacher')
    with Operations() as operations:
        teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
    if precision is None:
        assert operations.names.count('_linear_pointwise') == 2 and 'gelu' not in operations.names
        assert operations.names.count('_convolution_pointwise') == 2


@pytest.mark.parametrize('innermost', [False, True])
def test_convolutions_of_usual_maps_stay_torchs(innermost):
    """The library takes two to three times as long for those of one cell, and no less for the others."""
    model = Mixed()
    images, speed = torch.randn(2, 3, 16, 20), dict(FORM, channels_last=innermost)
    teacher, far, _ = teach(model, speed, paths=('end', ), images=images)
    with Operations() as operations:
        teacher.run(images, (), [Tap(model, 'end', 'teacher')], KDBatch(input_shape=(16, 20)))
    assert far < 1e-5 and operations.names.count('_linear_pointwise') == 2 and not teacher.fast.dropped
    assert operations.names.count('_convolution_pointwise') == (2 if innermost else 0)
    assert operations.names.count('gelu') == (0 if innermost else 1)


@pytest.mark.parametrize('kind', ['Block', 'Mixed'])
def test_without_the_library_torch_runs_as_ever(kind, monkeypatch):
    monkeypatch.setattr(kernels, 'available', lambda: False)
    model = settle(dict(Block=Block, Mixed=Mixed)[kind]())
    teacher, far, _ = teach(model, FORM, paths=('end', ))
    assert far < 1e-5
    tap = Tap(model, 'end', 'teacher')
    with Operations() as operations:
        teacher.run(torch.randn(2, 3, 16, 20), (), [tap], KDBatch(input_shape=(16, 20)))
    assert not any('pointwise' in name for name in operations.names) and not teacher.fast.dropped


class Attending(nn.Module):
    """``kind``: which of query, key and value are the same."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind, self.mask = kind, options.pop('mask', None)
        self.attention, self.end = nn.MultiheadAttention(8, 2, **options), nn.Identity()

    def forward(self, images):
        rows = images.flatten(2).transpose(1, 2) if self.attention.batch_first else images.flatten(2).permute(2, 0, 1)
        query, key, value = {'self': (rows, rows, rows), 'cross': (rows, 2 * rows[:1], rows[:1]),
                             'memory': (rows, *[2 * rows] * 2), 'position': (*[rows + 1] * 2, rows)}[self.kind]
        mask = None if self.mask is None else torch.ones(len(rows), len(key)).tril().bool().logical_not()
        return self.end(self.attention(query=query, key=key, value=value, attn_mask=mask)[0])


def test_attention_without_the_library_where_that_is_not_asked_for():
    model = Attending('self')
    images, tap = torch.randn(3, 8, 8, 6), Tap(model, 'end', 'teacher')
    teacher, far, _ = teach(model, dict(attention=True), paths=('end', ), images=images)
    with Operations() as operations:
        teacher.run(images, (), [tap], KDBatch(input_shape=(8, 6)))
    assert far < 1e-5 and teacher.fast.attentions and '_linear_pointwise' not in operations.names


@pytest.mark.parametrize('kind, options', [
    ('self', {}), ('cross', {}), ('memory', {}), ('position', {}), ('self', dict(batch_first=True)),
    ('self', dict(bias=False)), ('self', dict(mask=True)), ('self', dict(add_bias_kv=True)),
    ('self', dict(add_zero_attn=True))])
def test_attention_on_rows(kind, options):
    torch.manual_seed(0)
    model = Attending(kind, **options)
    for tensor in model.parameters():
        nn.init.normal_(tensor)
    images = torch.randn(3, 8, 8, 6)
    teacher = Teacher(model, nn.Identity())
    teacher.go('auto')
    tap, batch = Tap(model, 'end', 'teacher'), KDBatch(input_shape=(8, 6))
    with torch.no_grad():
        expected = model(images)
    teacher.run(images, (), [tap], batch, full=True)
    tap.read()
    teacher.run(images, (), [tap], batch)
    tap.read()
    with Operations() as operations:
        teacher.run(images, (), [tap], batch)
    torch.testing.assert_close(tap.read()[0], expected, rtol=1e-4, atol=1e-4)
    teacher.go(dict(FORM, precision='bf16'))
    teacher.run(images, (), [tap], batch, full=True)
    tap.read()
    teacher.run(images, (), [tap], batch)
    assert (tap.read()[0] - expected).norm() < 0.1 * expected.norm()
    own = not {'mask', 'add_bias_kv', 'add_zero_attn'} & set(options)
    assert ('_linear_pointwise' in operations.names) == own
    assert teacher.fast.attentions == [model.attention]
