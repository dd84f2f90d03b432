"""The frozen start that student and teacher have in common: run once where it is equal, and as ever where it is not."""

import contextlib
import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
from chains import settle
from mmengine.config import ConfigDict
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.teachers import fast
from kd_mm.teachers.shared import Shared, settled, similar
from kd_mm.teachers.speed import Speed

FORM = dict(fold=True, onednn=True, channels_last=True)
LOSSES = dict(loss_kd=dict(type='FitNetLoss'))


class Net(nn.Module):
    """A backbone with a stem and a frozen stage; returns its losses as the hosts do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.relu, self.pool = (
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.late, self.end, self.copies = nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), False

    def frozen(self):
        for module in (self.conv1, self.norm1, self.stage):
            module.requires_grad_(False)
            if module is not self.conv1:
                module.eval()
        return self

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = inputs * self.copies if self.copies else inputs
        maps = self.end(self.late(self.stage(self.pool(self.relu(self.norm1(self.conv1(inputs)))))))
        return dict(loss=maps.square().mean()) if mode == 'loss' else maps


def run(speed, change=None, steps=3, layout=torch.contiguous_format, **at):
    """Losses and gradients of some steps, and how often the student's own stage and stem ran."""
    torch.manual_seed(0)
    student = settle(Net())
    student.late.padding = (1, 1)
    teacher = copy.deepcopy(student)
    nn.init.normal_(teacher.late.weight)
    student.train()
    student.frozen()
    distiller = Distiller(student, teacher, dict(loss_kd=dict(LOSSES['loss_kd'], **at or dict(at='late'))), speed=speed)
    ran, original = [], nn.Conv2d._conv_forward

    def counted(module, *args):
        ran.extend([1] * (module in (student.conv1, student.stage[0])))
        return original(module, *args)

    distiller.train()
    if change is not None:
        change(student, teacher, distiller)
    distiller.attach()
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(2, 3, 16, 16, generator=generator).contiguous(memory_format=layout)
        del ran[:]
        with mock.patch.object(nn.Conv2d, '_conv_forward', counted):
            losses = student(inputs, (), mode='loss')
        student.zero_grad()
        sum(value for key, value in losses.items() if 'loss' in key and value.requires_grad).backward()
        found.append([losses['loss'].detach(), losses['loss_kd'].detach(), student.late.weight.grad.clone()])
    distiller.detach()
    assert not any('forward' in vars(module) for model in (student, teacher) for module in model.modules())
    return found, len(ran)


def never(student, teacher, distiller):
    for one in distiller.teachers.values():
        one.fast.shared = None


@pytest.mark.parametrize('speed', ['exact', dict(fold=True, onednn=True, channels_last=True)])
def test_the_start_runs_once_and_everything_is_equal_bit_for_bit(speed):
    found, ran = run(speed)
    expected, usual = run(speed, never)
    assert (ran, usual) == (0, 2)
    for one, other in zip(found, expected):
        for index, (own, theirs) in enumerate(zip(one, other)):
            if speed == 'exact':
                assert torch.equal(own, theirs), index
            else:  # the teacher's start is not folded where it is shared
                torch.testing.assert_close(own, theirs)
    if speed != 'exact':
        plain, _ = run('exact', never)
        for one, other in zip(found, plain):
            assert torch.equal(one[0], other[0])  # the student's own loss


def other_weight(student, teacher, distiller):
    with torch.no_grad():
        teacher.stage[0].weight[0, 0] += 1e-6


def other_buffer(student, teacher, distiller):
    with torch.no_grad():
        student.norm1.running_mean[0] += 1e-6


def trainable(student, teacher, distiller):
    student.conv1.weight.requires_grad_(True)


def training(student, teacher, distiller):
    student.stage[1].train()


def random(student, teacher, distiller):
    student.stage[3].train()


def hooked(student, teacher, distiller):
    student.conv1.register_forward_hook(lambda module, given, output: None)


def option(student, teacher, distiller):
    student.norm1.eps = 1e-4


@pytest.mark.parametrize('change, runs', [
    (other_weight, 1), (other_buffer, 1), (trainable, 2), (training, 1), (random, 1), (hooked, 2), (option, 1)])
def test_what_is_not_equal_runs_as_ever(change, runs):
    """Of stem and stage: where the stage alone differs, the stem is still shared."""
    found, ran = run('exact', change)
    expected, usual = run('exact', lambda *given: (change(*given), never(*given)))
    assert (ran, usual) == (runs, 2)
    if change is not random:
        for one, other in zip(found, expected):
            assert all(torch.equal(own, theirs) for own, theirs in zip(one, other))


def teachers_hook(student, teacher, distiller):
    teacher.stage[0].register_forward_hook(lambda module, given, output: None)


def teachers_option(student, teacher, distiller):
    teacher.stage[2].inplace = False


@pytest.mark.parametrize('change', [teachers_hook, teachers_option])
def test_what_is_not_equal_on_the_teachers_side(change):
    assert compared(change) == 1


def test_weights_that_change_during_the_training():
    calls = []

    def change(student, teacher, distiller):
        def later(*_):
            calls.append(1)
            if len(calls) == 2:
                with torch.no_grad():
                    student.stage[0].weight.add_(1)

        student.register_forward_pre_hook(later)

    assert compared(lambda *models: (calls.clear(), change(*models))) == 1


def test_a_tap_inside_and_another_input():
    def inside(student, teacher, distiller):
        shared, = (one.fast.shared for one in distiller.teachers.values())
        lent = shared.lent
        shared.lent = lambda owners, recorded: lent([*owners, student.stage[0]], recorded)

    def copied(student, teacher, distiller):
        student.copies = True

    assert run('exact', inside)[1] == run('exact', copied)[1] == 2


def compared(change, **at):
    """How often the student's own modules ran; everything must be as without sharing."""
    found, ran = run('exact', change, **at)
    expected, _ = run('exact', lambda *given: (change(*given), never(*given)), **at)
    for one, other in zip(found, expected):
        assert all(torch.equal(own, theirs) for own, theirs in zip(one, other))
    return ran


class Scales(nn.Sequential):
    """Its options are no numbers of its own."""

    def __init__(self, factors, after):
        super().__init__(nn.Conv2d(8, 8, 1))
        self.factors, self._after = factors, after

    def forward(self, maps):
        return self._after(sum(factor * super(Scales, self).forward(maps) for factor in self.factors))


@pytest.mark.parametrize('factors, after, equal', [
    ([1, 2], torch.tanh, True), ((1, 2), torch.tanh, True), ([1, 3], torch.tanh, False), ([1], torch.tanh, False),
    ([1, 2], torch.sin, False), (torch.tensor([1, 2]), torch.tanh, False)])
def test_options_of_every_kind_are_compared(factors, after, equal):
    first = Scales([1, 2], torch.tanh)
    second = Scales(factors, after)
    second.load_state_dict(first.state_dict())
    assert similar(first, second) == equal
    assert similar(copy.deepcopy(second), second)
    first.factors = second.factors = dict(a=[1, {'b': (2, None)}])
    second.factors = ConfigDict(copy.deepcopy(first.factors))
    assert similar(first, second) == (after is torch.tanh)
    second.factors.a[1]['b'] = [3, None]
    assert not similar(first, second)


@pytest.mark.parametrize('other', [
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(inplace=True)), lambda: nn.Sequential(nn.Conv2d(3, 8, 1)),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Identity()),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1).double(), nn.ReLU(inplace=True)),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(inplace=True))])
def test_what_is_not_of_the_same_build_is_told_apart(other):
    """Another class with the same options, more or fewer modules, another dtype, a parameter less."""
    own = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True))
    assert similar(own, copy.deepcopy(own))
    assert not similar(own, other()) and not similar(other(), own)


def test_what_was_exchanged_later_is_told_apart():
    """Asked in every step: an activation of another class with the same options, a module more, one in training."""
    own, theirs = (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True)).requires_grad_(False).eval()
                   for _ in range(2))
    assert settled(own, theirs)
    for change in (lambda module: module.__setitem__(1, nn.SiLU(inplace=True).eval()),
                   lambda module: module.append(nn.Identity()), lambda module: module.append(nn.Dropout())):
        changed = copy.deepcopy(theirs)
        change(changed)
        assert not settled(own, changed) and not settled(changed, own)


def test_a_gradient_of_the_images_is_the_students_own():
    model = Net()
    student = settle(model).eval().frozen()
    distiller = Distiller(student, copy.deepcopy(student), dict(loss_kd=dict(type='FitNetLoss', at='late')))
    distiller.attach()
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    student(images, (), mode='loss')['loss'].backward()
    distiller.detach()
    assert bool(images.grad.any())


def writes(module):
    """What comes next writes over what it is given, as an activation in place does."""
    module.register_forward_pre_hook(lambda module, given: given[0].detach().mul_(2.0) is None or None)


def test_what_the_teacher_has_written_over_is_not_lent():
    assert compared(lambda student, teacher, distiller: writes(teacher.late)) == 2


def test_what_the_student_writes_over_is_not_the_teachers_record():
    places = dict(student_at='late', teacher_at='stage')
    assert compared(lambda student, teacher, distiller: writes(student.late), **places) == 0


def test_what_the_teacher_is_given_is_another_batch_later():
    assert compared(lambda student, teacher, distiller: setattr(teacher, 'copies', 3.0)) == 2


class Lower(Net):
    """A model that chooses its own precision."""

    dtype = None

    def forward(self, inputs, data_samples=None, mode='tensor'):
        with torch.autocast('cpu', self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return super().forward(inputs, data_samples, mode)


def test_a_student_in_another_precision_runs_its_own_start(monkeypatch):
    monkeypatch.setitem(globals(), 'Net', Lower)
    assert compared(lambda student, teacher, distiller: setattr(student, 'dtype', torch.bfloat16)) == 2
    assert compared(lambda student, teacher, distiller: [
        setattr(model, 'dtype', torch.bfloat16) for model in (student, teacher)]) == 0


class Twice(Net):
    """One module runs twice, one after the other."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        maps = self.stage(self.stage(self.pool(self.relu(self.norm1(self.conv1(inputs))))))
        maps = self.end(self.late(maps))
        return dict(loss=maps.square().mean()) if mode == 'loss' else maps


def test_a_module_that_runs_twice_is_no_common_start(monkeypatch):
    monkeypatch.setitem(globals(), 'Net', Twice)
    assert compared(lambda student, teacher, distiller: None) == 3


def test_a_start_is_shared_again_after_another_module_was_exchanged():
    assert compared(lambda student, teacher, distiller: setattr(teacher, 'end', nn.ReLU(inplace=True))) == 0


class Beside:
    """Stands for a stream of CUDA."""

    def running(self, given):
        return contextlib.nullcontext()

    def join(self, results):
        pass


@pytest.mark.parametrize('speed', ['tune', dict(chunk=1), dict(compile='eager'), dict(precision='bf16'), 'stream'],
                         ids=str)
def test_forms_in_which_each_runs_its_own_start(speed):
    asked = []

    def look(student, teacher, distiller):
        fast = distiller.teacher.fast
        if speed == 'tune':
            fast.refusal = 'kept whole'
        if speed == 'stream':
            fast.speed, fast.side = Speed(fold=True, stream=True), Beside()
        fast.shared.start = lambda: asked.append(1)

    assert run(dict(fold=True) if speed == 'stream' else speed, look)[1] == 2 and not asked


def test_the_form_is_compared_with_the_hosts_own_first():
    asked = []

    def look(student, teacher, distiller):
        start = distiller.teacher.fast.shared.start
        distiller.teacher.fast.shared.start = lambda: asked.append(1) or start()

    assert run(FORM, look, steps=3)[1] == 0 and len(asked) == 2


class Residual(Net):
    """What the teacher gives the student is the shortcut of its next block."""

    def __init__(self):
        super().__init__()
        self.middle, self.late, self.norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        maps = self.stage(self.pool(self.relu(self.norm1(self.conv1(inputs)))))
        maps = self.end(self.norm(self.late(self.middle(maps))) + maps)
        return dict(loss=maps.square().mean()) if mode == 'loss' else maps


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_sum_is_written_over_what_is_lent(layout, monkeypatch):
    monkeypatch.setitem(globals(), 'Net', Residual)
    found, ran = run(FORM, at='end', layout=layout)
    expected, _ = run('exact', never, at='end', layout=layout)
    assert ran == 0
    for one, other in zip(found, expected):
        for own, theirs in zip(one, other):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_shared_runs_as_the_host_runs_it(monkeypatch):
    """Not by another library: the student gets the result."""
    names, original, direct = [], fast.kernels.direct, fast.Fast._folded
    monkeypatch.setattr(fast.kernels, 'direct', lambda layer, *rest: names.append(layer) or original(layer, *rest))
    seen = []

    def folded(self, *args):
        names.clear()
        direct(self, *args)
        inside = self.shared.modules if self.shared is not None else set()
        seen.append((len(inside), any(id(layer) in inside for layer in names), len(names)))

    monkeypatch.setattr(fast.Fast, '_folded', folded)
    run(dict(onednn=True, channels_last=True))
    assert seen[-1][1:] == (False, 1) and seen[-1][0] >= 6, seen  # the late convolution alone
    seen.clear()
    run(dict(onednn=True, channels_last=True), never)
    assert seen[-1] == (0, False, 3), seen


def test_what_was_compared_is_held():
    """Memory that is free again may become that of another tensor, with the same address and count."""
    student = settle(Net()).eval().requires_grad_(False)
    shared = Shared(student, copy.deepcopy(student))
    shared.chain = [(own, theirs) for own, theirs in shared.candidates if own is student.stage]
    assert len(shared.chain) == 1 and shared.start()
    weight, = [student.stage[0].weight]
    gone = weakref.ref(weight)
    student.stage[0].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    del weight
    gc.collect()
    assert gone() is not None
    assert shared.start()
    gc.collect()
    assert gone() is None  # what the last comparison was of, nothing else
