"""Which norms are folded, and that everything else is recognised and left alone."""

import pytest
import torch
from chains import Chain, settle, teach
from torch import nn
from torch.nn.utils import parametrizations

from kd_mm.hosts.taps import Tap
from kd_mm.types.batch import KDBatch


def normed(teacher):
    return [folded.pair.name for folded in teacher.fast.folding.pairs if folded.pair.norm is not None]


@pytest.mark.parametrize('act', [nn.ReLU(inplace=True), nn.ReLU(), nn.SiLU(inplace=True), nn.LeakyReLU(0.1), nn.GELU(),
                                 nn.GELU('tanh'), nn.ELU()])
def test_pairs_are_found_and_folded(act):
    model = settle(Chain(act=act))
    teacher, far, _ = teach(model, paths=('b', ))
    assert teacher.fast.folding.names == ['a']  # the tap sits between b and its norm
    fused = type(act) is not nn.ELU
    assert (teacher.fast.folding.pairs[0].pair.activation is act) == fused
    assert 0 < far < 1e-5
    assert not any('forward' in vars(module) for module in model.modules())


@pytest.mark.parametrize('twist, expected', [
    ('', ['a', 'b']), ('used twice', []), ('changed before', ['b']),
    ('changed and let go', ['b']), ('conv twice', ['b']), ('norm twice', ['b']),
    ('kept', ['b']), ('norm first', ['b']), ('view', ['b'])])
def test_what_is_not_proven_is_left_alone(twist, expected):
    model = settle(Chain(twist))
    teacher, far, _ = teach(model, paths=('b', 'act'))
    assert normed(teacher) == [name for name in expected if name != 'b'], twist  # b is tapped
    assert far < 1e-5
    assert ('a' in normed(teacher)) == (twist == '')
    free, _, _ = teach(model, paths=('act', ))
    assert normed(free) == expected


@pytest.mark.parametrize('change', [
    lambda m: m.a.register_forward_hook(lambda module, given, output: output + 1),
    lambda m: m.an.register_forward_pre_hook(lambda module, given: (given[0] + 1, )),
    lambda m: parametrizations.weight_norm(m.a),
    lambda m: setattr(m, 'an', nn.GroupNorm(2, 8)),
    lambda m: setattr(m, 'an', nn.BatchNorm2d(8, track_running_stats=False)),
    lambda m: setattr(m, 'a', nn.ConvTranspose2d(3, 8, 3, padding=1)),
    lambda m: setattr(m, 'a', type('Deformable', (nn.Conv2d, ), dict(
        forward=lambda self, x: nn.Conv2d.forward(self, x) * 2))(3, 8, 3, padding=1))])
def test_what_is_no_plain_pair_is_left_alone(change):
    model = settle(Chain())
    change(model)
    teacher, far, _ = teach(model, paths=('act', ))
    assert teacher.fast.folding.names == ['b'] and far < 1e-5


def test_a_norm_of_another_dtype_is_left_alone():
    """Legal on a CPU: what it takes is bfloat16, its own numbers are float32. The other pair is folded all the same."""
    class Mixed(Chain):

        def forward(self, images):
            maps = self.act(self.an(self.a(images.bfloat16())))
            return self.bn(self.b(maps.float()))

    model = settle(Mixed())
    model.a.bfloat16()
    images = torch.randn(2, 3, 16, 20)
    for speed in ('auto', dict(fold=True)):
        teacher, _, found = teach(model, speed, paths=('act', ), images=images)
        with torch.no_grad():
            torch.testing.assert_close(found['act'][0], model.act(model.an(model.a(images.bfloat16()))), rtol=0, atol=0)
        assert teacher.fast.speed.fold and 'b' in normed(teacher)


def test_sync_norms_and_shared_weights_are_affine_too():
    model = Chain()
    model.an = nn.SyncBatchNorm(8)
    model.bn = nn.BatchNorm2d(8, affine=False)
    teacher, far, _ = teach(settle(model), paths=('act', ))
    assert teacher.fast.folding.names == ['a', 'b'] and far < 1e-5


def test_a_hook_that_comes_later_sees_the_host():
    model = settle(Chain())
    teacher, _, _ = teach(model, paths=('act', ))
    seen = []
    model.a.register_forward_hook(lambda module, given, output: seen.append(output))
    images = torch.randn(2, 3, 16, 20)
    tap = Tap(model, 'act', 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
    tap.clear()
    with torch.no_grad():
        assert torch.equal(seen[-1], model.a(images))


@pytest.mark.parametrize('speed', [dict(fold=True), dict(fold=True, onednn=True, channels_last=True)], ids=str)
@pytest.mark.parametrize('twist, factor', [('conv twice', 1), ('changed and let go', 2)])
def test_another_flow_than_watched_is_noticed(twist, factor, speed):
    """A data-dependent branch: the folded output goes elsewhere, so the pass is done again without the pair."""
    model = settle(Chain())
    teacher, far, _ = teach(model, speed, paths=('act', ))
    model.twist = twist
    images = torch.randn(2, 3, 16, 20)
    tap = Tap(model, 'act', 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
    with torch.no_grad():
        expected = model.act(model.an(factor * model.a(images)))
    torch.testing.assert_close(tap.read()[0], expected)
    assert 'a' not in teacher.fast.folding.names and teacher.fast.dropped == {'a'}


@pytest.mark.parametrize('speed', [dict(fold=True), dict(fold=True, onednn=True, channels_last=True)], ids=str)
def test_a_tap_at_the_norm_of_a_pair_sees_no_activation(speed):
    """One that comes later: with a tap that is there in the watched pass the pair is left as it is."""
    model = settle(Chain(act=nn.ReLU()))
    images, batch = torch.randn(2, 3, 16, 20), KDBatch(input_shape=(16, 20))
    teacher, _, _ = teach(model, speed, paths=('b', ), images=images)
    taps = [Tap(model, path, 'teacher') for path in ('an', 'b')]
    for _ in range(3):
        teacher.run(images, (), taps, batch)
        found = {tap.path: tap.read()[0] for tap in taps}
    with torch.no_grad():
        norm = model.an(model.a(images))
        torch.testing.assert_close(found['an'], norm)
        torch.testing.assert_close(found['b'], model.b(model.act(norm)))
    assert teacher.fast.folding.names == ['a'] and bool((norm < 0).any())


def test_weights_stay_and_changes_are_seen():
    model = settle(Chain())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher, _, found = teach(model, paths=('act', ))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.an.weight.mul_(2)
        model.an.running_mean.add_(1)
    images = torch.randn(2, 3, 16, 20)
    tap = Tap(model, 'act', 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model.act(model.an(model.a(images))))


@pytest.mark.parametrize('speed', [
    dict(fold=True, onednn=True), dict(fold=True, onednn=True, channels_last=True, pack=True)], ids=str)
@pytest.mark.parametrize('change', [
    lambda m: m.an.running_mean.add_(1), lambda m: m.an.running_var.mul_(2), lambda m: m.an.weight.mul_(2),
    lambda m: m.an.bias.add_(1), lambda m: m.a.bias.add_(1), lambda m: m.a.weight.mul_(2),
    lambda m: setattr(m.an, 'eps', 0.5), lambda m: setattr(m, 'an', settle(nn.Sequential(nn.BatchNorm2d(8)))[0].eval()),
    lambda m: setattr(m, 'a', nn.Conv2d(3, 8, 3, padding=1)), lambda m: setattr(m, 'act', nn.ELU())])
def test_every_change_is_seen_in_the_next_pass(change, speed):
    model = settle(Chain())
    teacher, _, _ = teach(model, speed, paths=('b', ))
    assert len(teacher.fast.packing._kept) == 2 * ('pack' in speed)
    teacher.fast.folding._look = teacher.fast.packing.look = lambda: None  # of many it looks at one in each pass
    with torch.no_grad():
        change(model)
    images, tap = torch.randn(2, 3, 16, 20), Tap(model, 'b', 'teacher')
    teacher.run(images, (), [tap], KDBatch(input_shape=(16, 20)))
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], model.b(model.act(model.an(model.a(images)))))


def test_changes_that_torch_does_not_count_are_seen():
    """A mean teacher of one's own writes through ``.data``, past the count of changes."""
    model = settle(Chain())
    teacher, _, _ = teach(model, paths=('act', ))
    images, batch, tap = torch.randn(2, 3, 16, 20), KDBatch(input_shape=(16, 20)), Tap(model, 'act', 'teacher')
    for turn in range(3):
        model.an.running_mean.data.add_(1)
        model.bn.weight.data.mul_(2)
        for _ in range(2 if not turn else 1):  # at most one pass for each pair, and then never again
            teacher.run(images, (), [tap], batch)
            found = tap.read()[0]
        with torch.no_grad():
            torch.testing.assert_close(found, model.act(model.an(model.a(images))))
    assert not any(folded.fixed for folded in teacher.fast.folding.pairs)


def test_no_second_copy_of_the_weights():
    model = settle(nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))]))
    model.insert(0, nn.Conv2d(3, 64, 1)).append(nn.Identity())
    teacher, _, _ = teach(model, paths=('13', ), images=torch.randn(8, 3, 40, 40))
    assert len(teacher.fast.folding.pairs) == 6
    kept = [part for folded in teacher.fast.folding.pairs for part in folded._kept[1:]]
    assert sum(tensor.numel() for tensor in kept) <= 6 * 2 * 64


def test_it_pays_where_the_output_is_larger_than_the_weights():
    model = settle(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64),
                                 nn.Identity()))
    teacher, _, _ = teach(model, paths=('3', ))
    folded, = teacher.fast.folding.pairs
    assert not folded.pays(torch.zeros(2, 3, 16, 16)) and folded.pays(torch.zeros(2, 3, 32, 16))
