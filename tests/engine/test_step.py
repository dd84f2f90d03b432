"""The phases of a step: their order, what they leave alone, what is kept."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from stock import detector, hook, teacher_of, train

from kd_mm.engine import watch
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import DistillHook
from kd_mm.engine.preflight import random_data
from kd_mm.hosts.models import build_model, load_config

CWD = dict(type='CWDLoss', at='neck')


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path)


def student_of(cfg):
    model = build_model(load_config(cfg.to_dict())[0], cfg.default_scope)
    model.init_weights()
    return model


def distiller_of(runner):
    return next(item for item in runner.hooks if isinstance(item, DistillHook)).distiller


class Before(Hook):
    """Does something once the weights are loaded and the distiller is there."""

    def __init__(self, call):
        self.call = call

    def before_train(self, runner):
        self.call(runner)


def draw_everywhere(*_):
    torch.rand(7)
    np.random.rand(5)
    random.random()


def test_the_teacher_is_done_before_the_student_begins(det):
    student = student_of(det)
    kd = Distiller(student, teacher_of(det), dict(loss_kd=CWD), teacher_ckpt='random', scope='mmdet', speed='exact')
    events = []
    student.backbone.register_forward_pre_hook(lambda *_: events.append('student'))
    kd.teacher.model.backbone.register_forward_pre_hook(lambda *_: events.append('teacher'))
    student.train()
    kd.attach()
    data = random_data(student, (64, 64))
    student(**data, mode='loss')
    kd.detach()
    assert events == ['teacher', 'student']


def test_a_student_that_another_one_replaces_is_let_go(det):
    """With FSDP the distiller is built beside a plain twin, whose weights nobody needs twice."""
    twin, student = student_of(det), student_of(det)
    kd = Distiller(twin, teacher_of(det), dict(loss_kd=CWD), teacher_ckpt='random', scope='mmdet')
    kd.move(student)
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None


def test_only_what_is_tapped_of_the_teacher_is_alive_in_the_students_forward(det):
    student = student_of(det)
    kd = Distiller(student, teacher_of(det), dict(loss_kd=CWD), teacher_ckpt='random', scope='mmdet')
    seen, alive = [], []
    for name, module in kd.teacher.model.named_modules():
        if name.startswith('backbone') or name.startswith('neck.'):
            module.register_forward_hook(lambda module, args, output, name=name: seen.extend(
                (name, weakref.ref(tensor)) for tensor in (output if isinstance(output, tuple) else (output, ))))

    def look(*_):
        gc.collect()
        held = {tensor.data_ptr() for tensor in kd.current.records['teacher']['neck']}
        tensors = [(name, reference()) for name, reference in seen]
        alive.append(([name for name, tensor in tensors if tensor is not None and tensor.data_ptr() not in held],
                      len(held), len(seen)))

    student.backbone.register_forward_pre_hook(look)
    student.train()
    data = random_data(student, (64, 64))
    kd.attach()
    for _ in range(2):  # a tap copies in its first step
        student(**data, mode='loss')
    kd.detach()
    assert all(names == [] and held == 5 and count > 30 for names, held, count in alive) and len(alive) == 2
    assert not kd.current.records


def test_what_the_teacher_draws_the_student_does_not_miss(det, tmp_path):
    """The student's dropout, samplers and data see the same numbers whatever the teacher draws."""
    states = []

    def run(name, draws):
        det.work_dir = str(tmp_path / name)
        found = []

        def prepare(runner):
            model = distiller_of(runner).teacher.model
            if draws:
                model.backbone.register_forward_pre_hook(draw_everywhere)
            runner.model.backbone.register_forward_pre_hook(lambda *_: found.append(
                (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()[1])))

        runner, _ = train(det, [hook(teacher_of(det), dict(loss_kd=CWD)), Before(prepare)])
        states.append(found)
        return runner.model.state_dict()

    quiet, drawing = run('quiet', False), run('drawing', True)
    assert all(torch.equal(value, drawing[key]) for key, value in quiet.items())
    for one, two in zip(*states):
        assert torch.equal(one[0], two[0]) and (one[1] == two[1]).all() and one[2] == two[2]
    assert len(states[0]) == 2


def test_a_step_can_be_looked_into(det):
    student = student_of(det)
    losses = dict(loss_kd=CWD, loss_off=dict(CWD, loss_weight=0), loss_two=dict(CWD, loss_weight=[1, 2, 3, 4, 5]))
    kd = Distiller(student, teacher_of(det), losses, teacher_ckpt='random', scope='mmdet')
    student.train()
    data = random_data(student, (64, 64))
    with kd.current.open(**data) as step:
        student(**data, mode='loss')
        step.hear()
        comparisons = step.read()
        found = {comparison.term.name: step.evaluate(comparison) for comparison in comparisons}
    assert list(found) == ['loss_kd', 'loss_two']
    assert [len(comparison.student) for comparison in comparisons] == [5, 5]
    two = found['loss_two']
    assert two.weights == [1, 2, 3, 4, 5] and len(two.levels) == 5
    assert torch.isclose(two.total, sum(weight * level for weight, level in zip(two.weights, two.levels)))
    assert not step.records and step.batch is None and not student._forward_hooks


def test_a_term_that_teaches_nothing_stops_with_its_name(det, monkeypatch):
    """Nothing in its value tells: 2 a level, in every step."""
    assert watch.PATIENCE == 100
    monkeypatch.setattr(watch, 'PATIENCE', 6)
    det.train_cfg.max_iters = 7
    losses = dict(loss_kd=CWD, loss_same=dict(type='FitNetLoss', at='neck'))

    def share(runner):
        distiller = distiller_of(runner)
        distiller.terms['loss_same'].loss.level_loss = lambda level, student, *_: (student * 0).sum() + 2.0

    message = 'loss_same: in 6 steps its gradient .*exactly 0 .*value now is 10'
    with pytest.raises(RuntimeError, match=message):
        train(det, [hook(teacher_of(det), losses), Before(share)])


def test_a_tensor_is_not_compared_with_itself(det):
    with pytest.raises(ValueError, match=r"loss_kd compares the output of \['neck'\] with itself"):
        Distiller(student_of(det), 'self', dict(loss_kd=CWD), scope='mmdet')
