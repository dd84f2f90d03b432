"""What is said of terms that run away, or that leave nothing of the student's own losses."""

import pytest
from mmengine.logging import HistoryBuffer
from stock import detector, hook, teacher_of, train

from kd_mm.engine.watch import Course

TERMS = dict(loss_a='a', loss_b='b')


def told_of(values, iterations=40, weight=1.0):
    """Sentences of a course whose terms have ``values(iteration)`` beside own losses of 1."""
    course, scalars, found = Course(), {}, []
    for iteration in range(iterations):
        terms = values(iteration)
        shown = {**terms, 'kd_weight_a': weight, 'kd_weight_b': weight, 'kd_task_ratio': sum(terms.values())}
        for name, value in shown.items():
            scalars.setdefault(f'train/{name}', HistoryBuffer()).update(value)
        found += list(course.after_iter(scalars, TERMS))
    return found


@pytest.mark.parametrize('weight', [1.0, 0.01])
def test_a_term_that_grows_is_told_once_and_by_name(weight):
    sentence, = told_of(lambda iteration: dict(loss_a=3.0, loss_b=2.0 ** iteration if iteration < 30 else 1e9),
                     weight=weight)
    assert sentence.startswith('loss_b has grown from 102 to 1.05e+05 in 20 iterations: this training runs away')
    assert "loss_b loss_weight='auto'" in sentence


def test_the_heaviest_term_is_named():
    sentence, = told_of(lambda iteration: dict(loss_a=3.0, loss_b=2e4))
    assert sentence.startswith("loss_b is 2e+04 times the student's own losses")


@pytest.mark.parametrize('values', [
    lambda iteration: dict(loss_a=1e-6 if iteration < 10 else 0.5, loss_b=900.0),  # small, or steady
    lambda iteration: dict(loss_a=2.0 ** -iteration, loss_b=1.0 + iteration),
    lambda iteration: dict(loss_a=-2.0 ** iteration, loss_b=0.0)], ids=['from nothing', 'slowly', 'a score'])
def test_others_are_not(values):
    assert told_of(values) == []


def test_a_weight_that_grows_is_no_term_that_does():
    course, scalars = Course(), {}
    for iteration in range(40):
        weight = 1.0 if iteration < 20 else 100.0
        for name, value in dict(loss_a=weight, kd_weight_a=weight, kd_task_ratio=weight).items():
            scalars.setdefault(f'train/{name}', HistoryBuffer()).update(value)
        assert not list(course.after_iter(scalars, dict(loss_a='a')))


@pytest.mark.parametrize('weight, told', [(1e6, 1), (1.0, 0)])
def test_the_log_of_a_training_says_it(coco_root, tmp_path, said, weight, told):
    cfg = detector(coco_root, tmp_path)
    cfg.train_cfg.max_iters = 20
    cfg.optim_wrapper.optimizer.lr = 0.0
    train(cfg, [hook(teacher_of(cfg), dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=weight)))])
    lines = [line for line in said if 'may not count beside it' in line]
    assert len(lines) == told and all(line.startswith('kd_mm: loss_pkd is ') for line in lines)
