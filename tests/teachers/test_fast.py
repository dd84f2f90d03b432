"""The form in which a teacher runs: what is taken by itself, what is checked, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from chains import Chain, settle, teach
from ranks import run as run_ranks
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import fast
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.fast import distance
from kd_mm.teachers.speed import TOLERANCE, Speed, speed_of
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Call, Recorded

CPU = torch.device('cpu')


@pytest.mark.parametrize('speed, message', [
    ('fast', "teacher: speed='fast' is not one of 'auto', 'exact', 'tune'"), (2, 'speed=2 must be'),
    (dict(fold='yes'), "speed: fold='yes' must be True or False, not text"),
    (dict(folds=True), "speed has no 'folds'; it takes fold"), (dict(precision='int8'), "precision='int8' is not one"),
    (dict(chunk=0), 'chunk=0 must be a whole number from 1')])
def test_bad_speeds_are_named(speed, message):
    with pytest.raises(ValueError) as error:
        speed_of('teacher', speed, CPU)
    assert message in str(error.value)


def test_exact_is_the_hosts_forward():
    model = settle(Chain())
    _, far, found = teach(model, 'exact', paths=('act', 'bn'))
    with torch.no_grad():
        images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
        assert far == 0 and torch.equal(found['bn'][0], model(images))


def test_auto_is_checked_once_for_each_tap(monkeypatch):
    model = settle(Chain())
    passes, said = [], []
    monkeypatch.setattr(fast.Fast, '_say', lambda self, text, level=20: said.append(text))
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    teacher, far, found = teach(model, 'auto', paths=('act', ), runs=1)
    dry = len(passes) - 2  # the first step runs both forms
    assert 0 < far < 1e-5 and found['act'][0].is_contiguous() and teacher.runs == 2
    images, batch = torch.randn(2, 3, 16, 20), KDBatch(input_shape=(16, 20))
    first, late = Tap(model, 'act', 'teacher'), Tap(model, 'b', 'teacher')
    teacher.run(images, (), [first], batch)
    assert len(passes) == dry + 3
    teacher.run(images, (), [first, late], batch)  # a tap that comes later is checked when it comes
    assert len(passes) == dry + 5 and teacher.fast.checked == {'act', 'b'}
    teacher.run(images, (), [first, late], batch)
    assert len(passes) == dry + 6
    assert len(said) == 1 and said[0].startswith('runs with ')  # the same form is said once


def lines_of(monkeypatch, speed, model=None, **options):
    said = []
    monkeypatch.setattr(fast.Fast, '_say', lambda self, text, level=20: said.append(text))
    teacher, _, _ = teach(settle(Chain()) if model is None else model, speed, paths=('act', ), **options)
    return teacher, said


@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
def test_how_far_a_precision_is_from_the_exact_forward_is_said(monkeypatch, precision):
    """Beside how far the form itself is: it said 0, which is that of the form in float32."""
    teacher, said = lines_of(monkeypatch, dict(fold=True, precision=precision))
    found = re.fullmatch(r'runs with norms folded, (bf16|fp32) \(2 norms\); on this batch its taps are within (\S+) of '
                         r'the exact forward(?: in float32, and within (\S+) in bf16)?', said[0])
    assert len(said) == 1 and found, said
    assert 0 < float(found[2]) < 1e-5
    assert (1e-4 < float(found[3]) < 0.1) if precision == 'bf16' else found[3] is None


@pytest.mark.parametrize('speed, idle', [
    (dict(attention=True), 'attention'), (dict(fold=True, attention=True), 'attention'), (dict(fold=True), None),
    ('auto', None), ('exact', None), (dict(chunk=1), None)])
def test_what_is_asked_for_and_nothing_is_for_is_said(monkeypatch, speed, idle):
    monkeypatch.setattr(fast, 'namespaces', lambda model: [])  # where mmcv is loaded, its samples could be meant
    _, said = lines_of(monkeypatch, speed)
    assert [text for text in said if 'nothing is here' in text] == (
        [f'speed: {idle}: nothing is here that this is for'] if idle else [])


def test_weights_that_change_are_not_packed_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(fast.Fast, '_say', lambda self, text, level=20: said.append(text))
    teacher = EMATeacher(settle(Chain()))
    teacher.go(dict(fold=True, onednn=True, channels_last=True, pack=True))
    tap = Tap(teacher.model, 'act', 'teacher')
    for full in (True, False, False):
        teacher.run(torch.randn(2, 3, 16, 20), (), [tap], KDBatch(input_shape=(16, 20)), full=full)
        tap.read()
    assert said[0] == 'speed: pack: nothing is here that this is for' and len(said) == 2
    assert 'packed' not in said[1] and 'packed' not in teacher.fast.used.words


def test_a_form_is_named_as_it_is_used(monkeypatch):
    teacher, said = lines_of(monkeypatch, 'auto')
    assert 'attention' in teacher.fast.speed.words and 'attention' not in teacher.fast.used.words
    assert said[0].startswith(f'{teacher.fast.used.says} (')


def test_the_number_of_images_is_said_once(monkeypatch):
    _, said = lines_of(monkeypatch, dict(fold=True, chunk=1))
    assert said[0].startswith('runs with norms folded, 1 image at a time (2 norms);')
    _, said = lines_of(monkeypatch, dict(onednn=True))
    assert said[0].startswith('runs with layers by oneDNN;')
    assert Speed().says == 'runs as the host runs it' and Speed(stream=True).says == 'runs on a stream of its own'


@pytest.mark.parametrize('speed', [dict(pack=True), dict(pack=True, onednn=True), dict(pack=True, channels_last=True)])
def test_pack_needs_what_it_packs_for(speed):
    with pytest.raises(ValueError, match='pack=True keeps weights for onednn=True and channels_last=True: say both'):
        speed_of('teacher', speed, torch.device('cpu'))


class Viewing(nn.Module):
    """Fails where maps are not laid out as usual, as a `view` of a host does; or gives other numbers there."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.conv, self.norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
        self.out = nn.Identity()

    def forward(self, images):
        maps = self.norm(self.conv(images))
        if self.wrong == 'fails':
            maps = maps.view(maps.shape[0], -1)
        elif self.wrong == 'differs' and not maps.is_contiguous():
            maps = maps + 1
        elif self.wrong == 'not a number':
            maps = maps / 0
        return self.out(maps)


@pytest.mark.parametrize('wrong', ['fails', 'differs'])
def test_a_layout_that_only_a_later_batch_takes_is_checked_there(wrong, monkeypatch):
    monkeypatch.setattr(fast, 'LARGE', 2 * 20 * 24)
    teacher = Teacher(settle(Viewing(wrong)), nn.Conv2d(3, 3, 1))
    teacher.go('auto')
    tap = Tap(teacher.model, 'out', 'teacher')
    for height, width in ((16, 20), (16, 20), (20, 24), (20, 24)):
        images, batch = torch.randn(2, 3, height, width), KDBatch(input_shape=(height, width))
        teacher.run(images, (), [tap], batch, full=not teacher.fast._watched)
        if not teacher.fast.checked:
            tap.read()
            teacher.run(images, (), [tap], batch)
        with torch.no_grad():
            torch.testing.assert_close(tap.read()[0], teacher.model(images))
        assert teacher.fast.speed.channels_last == (height == 16)


def test_a_norm_over_one_cell_is_no_difference():
    """It gives 0 but for rounding, which is large beside itself."""
    exact = Recorded([torch.tensor([2.0, -3.0]), torch.tensor([2e-7, 0.0])])
    assert distance(Recorded([torch.tensor([2.0, -3.0]), torch.tensor([-2e-7, 0.0])]), exact) < TOLERANCE
    assert distance(Recorded([torch.tensor([2.0, -3.0]), torch.tensor([1e-3, 0.0])]), exact) > TOLERANCE
    assert distance(Recorded([torch.tensor([2.001, -3.0]), exact[1]]), exact) > TOLERANCE


def test_what_differs_is_seen_wherever_it_is():
    exact = Recorded([torch.ones(2)])
    assert distance(Recorded([torch.tensor([1.0, float('nan')])]), exact) == float('inf')
    assert distance(Recorded([torch.ones(3)]), exact) == float('inf')
    call = Recorded([])
    call.calls = (Call((), {}, dict(scores=[torch.ones(2)])), )
    other = Recorded([])
    other.calls = (Call((), {}, dict(scores=[torch.zeros(2)])), )
    assert distance(call, call) == 0 and distance(call, other) > 1


def test_two_passes_prove_what_both_show():
    model = settle(Chain())
    teacher = Teacher(model, nn.Conv2d(3, 3, 1))
    teacher.go('auto')
    tap, late = Tap(model, 'act', 'teacher'), Tap(model, 'b', 'teacher')
    images, batch = torch.randn(2, 3, 16, 20), KDBatch(input_shape=(16, 20))
    for twist, taps, names, dry in (('', [tap, late], ['a'], {'act', 'b'}), ('conv twice', [tap], [], {'act'}),
                                    ('', [tap], [], {'act'})):
        model.twist = twist
        teacher.run(images, (), taps, batch, full=True)
        for one in taps:
            one.read()
        assert [name for name in teacher.fast.folding.names if name == 'a'] == names and teacher.fast._dry == dry


def test_calls_are_given_in_the_hosts_layout():
    """Heads run again on what was recorded."""
    model = settle(Chain())
    teacher = Teacher(model, nn.Conv2d(3, 3, 1))
    teacher.go(dict(channels_last=True))
    tap, batch = Tap(model, 'b', 'teacher', structured=True), KDBatch(input_shape=(16, 20))
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch, full=True)
    tap.read()
    for _ in range(2):
        teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch)
        call, = tap.read().calls
    assert call.args[0].is_contiguous() and call.output.is_contiguous()


def test_one_image_says_nothing_of_parts():
    teacher = Teacher(settle(Chain()), nn.Conv2d(3, 3, 1))
    teacher.go(dict(chunk=1))
    tap = Tap(teacher.model, 'act', 'teacher')
    teacher.run(torch.randn(1, 3, 16, 20), (), [tap], KDBatch(input_shape=(16, 20)), full=True)
    tap.read()
    teacher.run(torch.randn(3, 3, 16, 20), (), [tap], KDBatch(input_shape=(16, 20)))
    assert tap.read()[0].shape[0] == 3 and 'one image' in teacher.fast.refusal


@pytest.mark.parametrize('wrong', ['fails', 'differs'])
def test_what_does_not_hold_is_dropped(wrong, monkeypatch):
    monkeypatch.setattr(fast, 'LARGE', 0)
    said = []
    fast_say = fast.Fast._say
    teacher = Teacher(settle(Viewing(wrong)), nn.Conv2d(3, 3, 1))
    teacher.go('auto')
    teacher.fast._say = lambda text, level=20: said.append((level, text)) or fast_say(teacher.fast, text, level)
    tap, images, batch = Tap(teacher.model, 'out', 'teacher'), torch.randn(2, 3, 16, 20), KDBatch(input_shape=(16, 20))
    teacher.run(images, (), [tap], batch, full=True)
    tap.read()
    for _ in range(2):
        teacher.run(images, (), [tap], batch)
        found = tap.read()[0]
    with torch.no_grad():
        torch.testing.assert_close(found, teacher.model(images))
    assert not teacher.fast.speed.channels_last and teacher.fast.speed.fold
    assert [level for level, _ in said] == [20, 20], said
    assert said[0][1].startswith('runs with norms folded, by oneDNN (1 norm)'), said
    assert re.search(r'left out\. norms folded, by oneDNN, weights packed, channels last: '
                     r'(it differs by|its forward fails)', said[1][1]), said
    # What is asked for by name is not taken back: a failure is an error, a difference is said.
    teacher.go(dict(channels_last=True))
    teacher.run(images, (), [tap], batch, full=True)
    tap.read()
    if wrong == 'fails':
        with pytest.raises(RuntimeError, match='view'):
            teacher.run(images, (), [tap], batch)
    else:
        teacher.run(images, (), [tap], batch)
        assert teacher.fast.speed.channels_last


def test_small_batches_keep_the_hosts_layout():
    model, seen = settle(Chain()), []
    model.an.register_forward_pre_hook(lambda module, given: seen.append(given[0].is_contiguous()))
    for size, kept in ((32, True), (300, False)):
        teach(model, 'auto', paths=('act', ), images=torch.randn(2, 3, size, size))
        assert seen[-1] == kept
    _, _, found = teach(model, dict(channels_last=True), paths=('act', ))
    assert not seen[-1] and found['act'][0].is_contiguous()  # what is read is laid out as the host's


def test_nothing_holds_nothing_is_taken():
    teacher, far, found = teach(settle(Viewing('not a number')), 'auto', paths=('out', ))
    assert not torch.isfinite(found['out'][0]).any() and teacher.fast.speed.fold


def test_precision():
    model = settle(Chain())
    _, far, found = teach(model, dict(precision='bf16', fold=True), paths=('bn', ))
    assert 1e-4 < far < 0.05 and found['bn'][0].dtype == torch.float32
    _, _, first = teach(model, dict(precision='bf16', fold=True), paths=('bn', ), runs=1)
    assert torch.equal(first['bn'][0], found['bn'][0])  # forms are compared in float32, and what is taught is not
    # Under mixed-precision training a teacher has the dtype of the training, whether it is folded or not.
    for speed in ('auto', 'exact'):
        for runs in (1, 2):
            with torch.autocast('cpu', torch.bfloat16):
                teacher, far, found = teach(model, speed, paths=('b', ), runs=runs)
            assert far < 0.05 and found['b'][0].dtype == torch.bfloat16
            assert teacher.fast.speed.fold == (speed == 'auto')
    with torch.autocast('cpu', torch.bfloat16):
        _, _, found = teach(model, dict(precision='fp32'), paths=('b', ))
    with torch.no_grad():
        images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
        expected = model.b(model.act(model.an(model.a(images))))
    assert torch.allclose(found['b'][0].float(), expected, rtol=0.01, atol=0.01)


class Noisy(Viewing):
    """Draws in evaluation, too, as the noisy queries of a head."""

    def forward(self, images):
        return super().forward(images + torch.rand_like(images))


def test_every_form_draws_the_same_numbers(monkeypatch):
    """The first one fails after it has drawn."""
    monkeypatch.setattr(fast, 'LARGE', 0)
    teacher, _, _ = teach(settle(Noisy('fails')), 'auto', paths=('out', ))
    assert not teacher.fast.speed.channels_last and teacher.fast.speed.fold


class Attending(nn.Module):

    def __init__(self, looks):
        super().__init__()
        self.looks = looks
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Identity()

    def forward(self, images):
        tokens = images.flatten(2).permute(2, 0, 1)
        if self.looks == 'keeps':
            tokens, self.weights = self.attention(tokens, tokens, tokens)
        elif self.looks == 'uses':
            result = self.attention(tokens, tokens, tokens)
            tokens = result[0] + result[1].mean()
        else:
            tokens = self.attention(tokens, tokens, tokens)[0]
        return self.out(tokens)


@pytest.mark.parametrize('looks', ['', 'keeps', 'uses'])
def test_attention_weights_that_nobody_looks_at(looks):
    model = Attending(looks)
    images = torch.randn(2, 8, 4, 4)
    teacher = Teacher(model, nn.Identity())
    teacher.go('auto')
    original = model.attention.forward
    model.attention.register_forward_hook(lambda module, args, output: None)
    tap, batch = Tap(model, 'out', 'teacher'), KDBatch(input_shape=(4, 4))
    teacher.run(images, (), [tap], batch, full=True)
    expected = tap.read()
    assert not teacher.fast.attentions  # a hook may look at them
    model.attention._forward_hooks.clear()
    teacher.go('auto')
    teacher.run(images, (), [tap], batch, full=True)
    tap.read()
    assert bool(teacher.fast.attentions) == (looks == '')
    for _ in range(2):
        teacher.run(images, (), [tap], batch)
        found = tap.read()
    assert fast.distance(found, expected) < 1e-5 and model.attention.forward == original


def test_two_passes_prove_which_weights_nobody_looks_at():
    model = Attending('uses')
    teacher, tap = Teacher(model, nn.Identity()), Tap(model, 'out', 'teacher')
    teacher.go('auto')
    for looks in ('uses', ''):
        model.looks = looks
        teacher.run(torch.randn(2, 8, 4, 4), (), [tap], KDBatch(input_shape=(4, 4)), full=True)
        tap.clear()
    assert not teacher.fast.attentions


class Unwatched(Chain):
    """Fails where somebody looks at its operations."""

    def forward(self, images):
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError('not with a mode')
        return super().forward(images)


@pytest.mark.parametrize('speed', ['auto', dict(fold=True), dict(onednn=True, channels_last=True)], ids=str)
def test_a_model_that_cannot_be_watched_runs_all_the_same(speed):
    teacher, far, _ = teach(settle(Unwatched()), speed, paths=('act', ))
    assert far < 1e-5 and not teacher.fast.folding.pairs


@pytest.mark.parametrize('speed', ['auto', dict(chunk=1), dict(precision='bf16')], ids=str)
def test_a_tap_that_stays_silent_in_the_first_pass_is_no_fault_of_the_form(speed):
    model = settle(Chain())
    model.unused = nn.Identity()
    teacher, taps = Teacher(model, nn.Conv2d(3, 3, 1)), [Tap(model, path, 'teacher') for path in ('act', 'unused')]
    teacher.go(speed)
    teacher.run(torch.randn(2, 3, 16, 20), (), taps, KDBatch(input_shape=(16, 20)), full=True)
    assert [tap.fired for tap in taps] == [True, False] and taps[0].read()[0].shape == (2, 8, 16, 20)


@pytest.mark.parametrize('speed', ['auto', dict(attention=True, onednn=True)], ids=str)
def test_a_tap_at_an_attention_that_comes_later_has_its_weights(speed):
    model = Attending('').eval()
    images, batch = torch.randn(2, 8, 4, 4), KDBatch(input_shape=(4, 4))
    teacher, _, _ = teach(model, speed, paths=('out', ), images=images)
    assert teacher.fast.attentions
    taps = [Tap(model, path, 'teacher') for path in ('attention', 'out')]
    for _ in range(2):
        teacher.run(images, (), taps, batch)
        found = {tap.path: tap.read() for tap in taps}
    tokens = images.flatten(2).permute(2, 0, 1)
    with torch.no_grad():
        expected = model.attention(tokens, tokens, tokens)
    assert len(found['attention']) == 2
    for one, other in zip(found['attention'], expected):
        torch.testing.assert_close(one.flatten(), other.flatten())


# -------------------------------------------------------------------------------------------- some images at a time


class Kinds(nn.Module):
    """Outputs with the images in front, in the middle, and without any; ``together`` mixes the images."""

    def __init__(self, together=False):
        super().__init__()
        self.together = together
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Identity()

    def forward(self, images):
        self.most = max(getattr(self, 'most', 0), images.shape[0])
        maps = self.conv(images).exp().log()
        if self.together:
            maps = maps - maps.mean()
        return self.out((maps, maps.flatten(2).permute(2, 0, 1), self.conv.weight * 1, [maps[:, 0], maps.sum((2, 3))]))


def chunked(speed, **kwargs):
    model = Kinds(**kwargs)
    teacher = Teacher(model, nn.Conv2d(3, 3, 1))
    teacher.go(speed)
    tap, batch = Tap(model, 'out', 'teacher', structured=True), KDBatch(input_shape=(16, 20))
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch, full=True)
    tap.read()
    return teacher, tap, batch


@pytest.mark.parametrize('count, size', [(5, 2), (4, 4), (3, 8), (3, 1)])
def test_parts_joined_are_the_whole(count, size):
    teacher, tap, batch = chunked(dict(chunk=size))
    images = torch.randn(count, 3, 16, 20)
    teacher.run(images, (), [tap], batch)
    tap.read()
    teacher.model.most = 0
    teacher.run(images, (), [tap], batch)
    found = tap.read()
    assert teacher.model.most == min(size, count)
    with torch.no_grad():
        expected = teacher.model(images)
    for one, other in zip(found, [*expected[:3], *expected[3]]):
        torch.testing.assert_close(one, other)
    call, = found.calls
    assert isinstance(call.output, tuple) and isinstance(call.output[3], list)
    torch.testing.assert_close(call.output[1], expected[1])
    torch.testing.assert_close(call.args[0][0] if isinstance(call.args[0], tuple) else call.args[0], expected[0])


def test_images_that_depend_on_each_other_stay_together():
    teacher, tap, batch = chunked(dict(chunk=1), together=True)
    assert 'its images depend on each other' in teacher.fast.refusal
    assert teacher.fast.parts(4) == 4


def test_a_tap_that_comes_later_sees_the_batch_whole():
    """Nothing was learned of how its parts are joined."""
    teacher, tap, batch = chunked(dict(chunk=1))
    late, images = Tap(teacher.model, 'conv', 'teacher'), torch.randn(3, 3, 16, 20)
    for taps in ([tap], [tap, late], [late]):
        teacher.run(images, (), taps, batch)
        found = {one.path: one.read()[0] for one in taps}
        with torch.no_grad():
            maps = teacher.model.conv(images)
        for path, value in found.items():
            torch.testing.assert_close(value, maps if path == 'conv' else maps.exp().log())


def test_auto_takes_parts_where_the_teacher_needs_more_than_the_student():
    teacher, tap, batch = chunked('auto')
    assert teacher.fast.needed > 0 and teacher.fast.parts(8) == 8  # nothing is known of the student
    teacher.fast.budget = teacher.fast.needed * 0.4
    assert teacher.fast.parts(8) == 3 and teacher.fast.parts(1) == 1
    teacher.fast.budget = teacher.fast.needed * 2
    assert teacher.fast.parts(8) == 8
    teacher.fast.budget = 1
    assert teacher.fast.parts(8) == 1
    # the gradients are not there yet; larger images need more of that memory
    teacher.fast.gradients = 4 * teacher.fast.needed
    assert [teacher.fast.parts(8, area) for area in (0, 16 * 20, 2 * 16 * 20, 8 * 16 * 20)] == [4, 4, 2, 1]
    teacher.fast.budget = teacher.fast.needed * 0.75
    assert [teacher.fast.parts(8, area) for area in (0, 8 * 16 * 20)] == [6, 6]
    # the size of the images at hand counts
    teacher.fast.budget = 1
    for _ in range(2):  # the first compares with the whole
        teacher.model.most = 0
        teacher.run(torch.randn(8, 3, 32, 20), (), [tap], KDBatch(input_shape=(32, 20)))
        tap.clear()
    assert teacher.model.most == 2


def test_what_was_decided_is_kept_for_a_resume():
    teacher, tap, batch = chunked('auto')
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch)
    tap.read()
    teacher.fast.speed = Speed(fold=True, chosen=True)  # as if the rest had not held
    state = teacher.fast.state()
    teacher, _, _ = teach(settle(Chain()), 'auto', paths=('act', ))
    assert 'a' in teacher.fast.folding.names
    teacher.fast.load(dict(teacher.fast.state(), dropped=['a']))
    assert teacher.fast.folding.names == ['b'] and teacher.fast.state()['dropped'] == ['a']  # for the next file too
    other, tap, batch = chunked('auto')
    other.fast.load(state)
    assert other.fast.speed == Speed(fold=True, chosen=True) and other.fast.checked == {'out'}
    older, _, _ = chunked('auto')
    older.fast.load(dict(state, asked={key: value for key, value in state['asked'].items() if key != 'pack'}))
    assert older.fast.checked == {'out'}  # a file from before that field
    older.fast.load(dict(state, asked={}, checked=['in']))
    assert older.fast.checked == {'out'}
    asked, _, _ = chunked(dict(fold=True, channels_last=True))
    asked.fast.load(state)  # another form is asked for: the file has nothing to say
    assert asked.fast.speed.channels_last and not asked.fast.checked


@pytest.mark.parametrize('kind', ['plain', 'fragile', 'one'])
def test_a_larger_batch_on_one_rank_alone(kind, tmp_path):
    """What holds is decided by all ranks, and the others do not see that batch: both layouts are checked at first."""
    worker = Path(__file__).resolve().parents[1] / 'helpers' / 'ddp_layout_worker.py'
    ranks = run_ranks([str(worker), str(tmp_path / 'two'), kind], tmp_path / 'two', 2, limit=60)
    innermost = kind == 'plain'
    assert [rank['layouts'] for rank in ranks] == [
        [False, innermost, False, innermost], [False, False, innermost, False]]
    for rank in ranks:
        assert max(rank['far']) < 1e-5 and rank['checked'] == [''], rank
        assert rank['chosen'] == 'as the host runs it'  # by all ranks' times
        assert len(rank['said']) == (1 if innermost else 2), rank
    if not innermost:
        reasons = ['its forward fails' if kind == 'fragile' or number else 'it does not hold on another rank'
                   for number in range(2)]
        assert all(f'channels last: {reason}' in rank['said'][1] for rank, reason in zip(ranks, reasons)), ranks
