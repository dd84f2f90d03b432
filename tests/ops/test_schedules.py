import math

import pytest

from kd_mm.ops.schedules import Schedule, Weight
from kd_mm.registry import build


def make(**config):
    return build(config, Schedule, 'schedule')


def test_constant():
    assert [make(type='ConstantSchedule', value=0.3)(step) for step in (0, 7, 10**6)] == [0.3] * 3


def test_linear_warmup():
    warmup = make(type='LinearWarmup', steps=10, value=2.0, start=1.0, begin=5)
    assert [warmup(step) for step in (0, 5, 10, 15, 99)] == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.0])
    assert [make(type='LinearWarmup')(step) for step in (0, 250, 500)] == [0.0, 0.5, 1.0]


def test_cosine():
    cosine = make(type='CosineSchedule', begin=100, end=300)
    assert [cosine(step) for step in (0, 100, 200, 300, 999)] == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    assert cosine(150) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert make(type='CosineSchedule')(50, 100) == pytest.approx(0.55)
    assert make(type='CosineSchedule', end=-20)(80, 100) == pytest.approx(0.1)


def test_schedule_without_length_is_an_error():
    with pytest.raises(ValueError, match='length of training is not known'):
        make(type='CosineSchedule')(0)
    with pytest.raises(ValueError, match='not after begin=50'):
        make(type='CosineSchedule', begin=50, end=40)(0, 100)


def test_window():
    window = make(type='WindowSchedule', windows=[(10, 20), (30, None)], value=2.0)
    assert [window(step) for step in (0, 9, 10, 19, 20, 29, 30, 10**6)] == [0, 0, 2, 2, 0, 0, 2, 2]
    last = make(type='WindowSchedule', windows=[(0, -5)])
    assert [last(step, 100) for step in (0, 94, 95, 99)] == [1, 1, 0, 0]
    for bad in ([], [(1, )]):
        with pytest.raises(ValueError, match='windows'):
            make(type='WindowSchedule', windows=bad)


def test_product():
    product = make(type='ProductSchedule', schedules=[
        dict(type='LinearWarmup', steps=10), dict(type='WindowSchedule', windows=[(0, 20)])])
    assert [product(step) for step in (0, 5, 15, 25)] == [0.0, 0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match='schedules'):
        make(type='ProductSchedule', schedules=[])


def test_a_schedule_is_a_function_of_the_step():
    for config in (dict(type='LinearWarmup'), dict(type='CosineSchedule'), dict(type='WindowSchedule',
                                                                               windows=[(3, 8)])):
        schedule = make(**config)
        forward = [schedule(step, 40) for step in range(40)]
        assert [make(**config)(step, 40) for step in reversed(range(40))] == forward[::-1]


@pytest.mark.parametrize('value, expected', [
    (2.0, [2.0, 2.0]), (0, [0.0, 0.0]), ([1, 0.5], [1.0, 0.5]),
    (dict(type='LinearWarmup', steps=10, value=4.0), [2.0, 2.0]),
    (dict(levels=[1.0, 3.0], schedule=dict(type='LinearWarmup', steps=10)), [0.5, 1.5]),
    (dict(levels=3.0, schedule=dict(type='LinearWarmup', steps=10)), [1.5, 1.5])])
def test_weight(value, expected):
    assert Weight(value).at(5, 100, 2) == expected


def test_a_weight_knows_the_length_of_training():
    assert Weight(dict(type='CosineSchedule', value=2.0, final=1.0)).at(50, 100, 1) == pytest.approx([1.5])


def test_weight_is_zero():
    assert Weight(0).is_zero(0, 0) and Weight([0, 0.0]).is_zero(0, 0) and not Weight([0, 1]).is_zero(0, 0)
    warmup = Weight(dict(type='LinearWarmup', steps=10))
    assert warmup.is_zero(0, 100) and not warmup.is_zero(1, 100)


@pytest.mark.parametrize('value', [-1, float('nan'), float('inf'), 'much', None, True, [1, -1], dict(levels=[1])])
def test_bad_weights(value):
    with pytest.raises(ValueError, match='loss_weight'):
        Weight(value)


def test_number_of_levels():
    with pytest.raises(ValueError, match='2 entries, one a level, but there are 3 levels'):
        Weight([1, 2]).at(0, 0, 3)
