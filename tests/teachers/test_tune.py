"""``speed='tune'``: the forms in turn, the fastest is kept, the table is said once."""

import pytest
import torch
from chains import Chain, settle
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers import fast
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.speed import Speed
from kd_mm.teachers.tune import ROUNDS, Tuning, candidates
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Recorded

BATCH = KDBatch(input_shape=(16, 20))


class Clock:
    """Time passes only in passes of a teacher, and depends on its form."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.tried, self.seconds = 0.0, [], seconds
        monkeypatch.setattr(fast.time, 'perf_counter', lambda: self.now)

    def watch(self, teacher):
        own = teacher.fast._run

        def run(form, images, samples, taps):
            own(form, images, samples, taps)
            self.tried.append((form.fold, form.channels_last))
            self.now += self.seconds(form) * images.numel()

        teacher.fast._run = run
        self.said = []
        teacher.fast._say = lambda text, level=20: self.said.append(text)


def tuned(speed='tune'):
    teacher = Teacher(settle(Chain()), nn.Conv2d(3, 3, 1))
    teacher.go(speed)
    tap = Tap(teacher.model, 'act', 'teacher')
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], BATCH, full=True)
    tap.read()
    return teacher, tap


def step(teacher, tap, count=2):
    images = torch.randn(count, 3, 16, 20)
    teacher.run(images, (), [tap], BATCH)
    with torch.no_grad():
        torch.testing.assert_close(tap.read()[0], teacher.model.act(teacher.model.an(teacher.model.a(images))))


@pytest.mark.parametrize('best', [(False, False), (True, False), (True, True)])
def test_the_fastest_is_kept(monkeypatch, best):
    clock = Clock(monkeypatch, lambda form: 1.0 if (form.fold, form.channels_last) == best else 2.0)
    teacher, tap = tuned()
    clock.watch(teacher)
    for number in range(ROUNDS * 5 + 3):
        step(teacher, tap, count=1 + number % 3)  # batches of other sizes are compared fairly
    assert teacher.fast.tuning is None and (teacher.fast.speed.fold, teacher.fast.speed.channels_last) == best
    tried = clock.tried[2:]  # the first step compares
    assert all(tried[:ROUNDS * 5].count(form) >= ROUNDS for form in (best, (False, True), (True, True)))
    assert tried[-2:] == [best] * 2 or teacher.fast.speed.exact
    tables = [text for text in clock.said if 'from now on' in text]
    assert len(tables) == 1 and tables[0].count('<-') == 1
    head, *rows = tables[0].splitlines()[1:]
    assert head.startswith('milliseconds for a million numbers') and len(rows) == 5
    kept, = (row for row in rows if row.endswith(' <-'))
    assert ('channels last' in kept, 'norms folded' in kept) == best[::-1] and kept.split()[0] == '1000000000.000'
    assert 'attention' not in tables[0]  # the model has none
    # A resume says what was chosen, and where nothing was, it goes on trying.
    again, _ = tuned()
    clock.watch(again)
    again.fast.load(teacher.fast.state())
    assert clock.said == [f'{teacher.fast.speed.says}, as the training that goes on has chosen']
    assert again.fast.tuning is None and again.fast.speed == teacher.fast.speed
    again.fast.load(teacher.fast.state())
    assert len(clock.said) == 1


def test_a_form_that_fails_is_left_out(monkeypatch):
    teacher, tap = tuned()
    step(teacher, tap)
    own = teacher.fast._folded

    def folded(form, images, samples, taps, kept):
        if form.channels_last:
            raise RuntimeError('view size is not compatible')
        own(form, images, samples, taps, kept)

    teacher.fast._folded = folded
    for _ in range(ROUNDS * 5):
        step(teacher, tap)
    assert teacher.fast.tuning is None and not teacher.fast.speed.channels_last


def test_what_does_not_hold_is_not_tried():
    chosen = tuned()[0].fast.asked
    assert len(candidates(chosen)) == 5
    assert all(not form.fold for form in candidates(fast.dataclasses.replace(chosen, fold=False)))


def test_a_resume_goes_on_or_knows_the_choice(monkeypatch):
    clock = Clock(monkeypatch, lambda form: 1.0 if form.fold else 2.0)
    teacher, tap = tuned()
    clock.watch(teacher)
    for _ in range(6):
        step(teacher, tap)
    other, other_tap = tuned()
    other.fast.load(teacher.fast.state())
    assert isinstance(other.fast.tuning, Tuning) and other.fast.tuning.times == teacher.fast.tuning.times
    clock.watch(other)
    for _ in range(ROUNDS * 5 - 5):
        step(other, other_tap)
    assert other.fast.tuning is None and other.fast.speed.fold
    third, _ = tuned()
    third.fast.load(other.fast.state())
    assert third.fast.tuning is None and third.fast.speed == other.fast.speed
    auto, _ = tuned('auto')
    auto.fast.load(other.fast.state())  # it was not asked for
    assert not auto.fast.speed.tune


def test_a_form_that_fails_later_keeps_its_turns(monkeypatch):
    """On this rank alone, perhaps: all ranks choose in the same step, and none the form that failed on one."""
    clock = Clock(monkeypatch, lambda form: 1.0 if form.fold else 2.0)
    teacher, tap = tuned()
    step(teacher, tap)  # the first batch, on which all forms hold
    clock.watch(teacher)
    own = teacher.fast._run

    def run(form, images, samples, taps):
        if form.fold and not form.channels_last:
            raise RuntimeError('not at this size')
        own(form, images, samples, taps)

    teacher.fast._run = run
    tuning = teacher.fast.tuning
    for _ in range(ROUNDS * len(tuning.forms)):
        assert teacher.fast.tuning is tuning
        step(teacher, tap)
    assert teacher.fast.tuning is None and teacher.fast.speed.fold and teacher.fast.speed.channels_last
    assert sum('not at this size' in text for text in clock.said) == 1


def test_times_are_compared_by_size_and_without_the_first():
    exact, other = Speed(), Speed(fold=True)
    tuning = Tuning([exact, other])
    for number in range(ROUNDS):
        size = 1 + number  # a form is not slower for having seen larger batches
        tuning.note(0, 1.0 * size, size)
        tuning.note(1, (1e6 if number == 0 else 0.9) * (10 * size), 10 * size)
    assert tuning.done and tuning.result(torch.device('cpu'))[0] == other
    quick = Tuning([exact, other])
    for number in range(ROUNDS):
        quick.note(0, 1.0, 1)
        quick.note(1, 1e6 if number == 0 else 0.9, 1)
    assert quick.result(torch.device('cpu'))[0] == other
    slow = Tuning([exact, other])  # the first times would decide
    for seconds in (0.0, 1.0, 1.0, 3.0):
        slow.note(0, seconds, 1)
    for seconds in (9.0, 0.9, 0.9, 3.0):
        slow.note(1, seconds, 1)
    assert slow.result(torch.device('cpu'))[0] == other


def test_a_resume_tries_the_forms_that_it_had():
    """What did not hold on the first batch is not tried after a resume either."""
    first = Tuning([Speed(), Speed(onednn=True)])
    first.note(0, 1.0, 1)
    second = Tuning([Speed(), Speed(fold=True), Speed(channels_last=True)])
    second.load(first.state())
    assert second.forms == first.forms and second.times == first.times


def test_a_form_that_does_not_hold_on_the_first_batch_is_not_tried():
    teacher, tap = tuned()
    own = teacher.fast._run

    def run(form, images, samples, taps):
        own(form, images, samples, taps)
        if form.channels_last and teacher.fast.tuning is not None and not teacher.fast.checked:
            tap.put(Recorded([tap.peek()[0] + 1]))

    teacher.fast._run = run
    step(teacher, tap)
    assert teacher.fast.tuning is not None and not any(form.channels_last for form in teacher.fast.tuning.forms)
