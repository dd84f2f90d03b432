"""Every numeric, boolean or choice argument of every registered class refuses what is none, and says which it is."""

import math
import re
from collections.abc import Collection
from inspect import signature
from typing import Any, Optional, Sequence, Tuple, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import nn

from kd_mm.ops import checks
from kd_mm.ops.schedules import Weight
from kd_mm.registry import MODELS, build, choices
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.plain import PlainTeacher

#: Arguments without which a class cannot be made.
COMPANY = {
    'CIRKDMemoryLoss': dict(num_classes=19),
    'FineGrainedRegion': dict(strides=[8]),
    'KTAADLoss': dict(autoencoder='random'),
    'MasKDLoss': dict(tokens='random'),
    'PredictionGapRegion': dict(logits_at='bbox_head'),
    'ProductSchedule': dict(schedules=[dict(type='LinearWarmup')]),
    'SequentialAdapter': dict(adapters=[dict(type='ConvAdapter')]),
    'TeacherScoreRegion': dict(logits_at='bbox_head'),
    'WindowSchedule': dict(windows=[(0, 10)]),
}
#: Arguments that mean something only with another one.
PARTNERS = {('CWDLoss', 'student_channels'): dict(divisor='student')}
#: What is right although it is negative.
ACCEPTED = {
    ('ChenBoxLoss', 'margin', -1): 'the student may be asked to be better than the teacher',
    ('CosineSchedule', 'end', -1): 'counts back from the end of training',
    ('GradientShareSchedule', 'final', -1): 'counts back from the end of training',
}
NAN, INF = math.nan, math.inf


def leaves(annotation):
    """The plain types of an annotation: (Optional[Sequence[int]]) -> {None, int}."""
    inner = [part for part in get_args(annotation) if part is not Ellipsis]
    return set().union(*map(leaves, inner)) if inner else {annotation}


def bad_values(parameter):
    """Values that an argument of this signature has to refuse; none where it is no number, truth value or choice."""
    plain, default = leaves(parameter.annotation), parameter.default
    kinds = [get_origin(part) for part in (parameter.annotation, *get_args(parameter.annotation))]
    sequence = any(isinstance(kind, type) and issubclass(kind, Collection) for kind in kinds)
    if plain & {int, float} or isinstance(default, (int, float)) and not isinstance(default, bool):
        bad = ['abc', '4', True, NAN, INF, -INF, -1, [], {}, object()]
        bad += [[one] for one in ('abc', '4', True, NAN, INF, -1)] if sequence else [[1.0, 2.0, 3.0]]
        if plain & {int} and not plain & {float}:
            bad += [[0.5]] if sequence else [0.5]
    elif bool in plain or isinstance(default, bool):
        bad = ['abc', '4', 'no', 'False', NAN, INF, -1, 0.5, 2, [], {}, object()]
    elif parameter.annotation in (str, Sequence[str]):
        bad = ['abc', 4, True, NAN, [], {}, ['abc'], [4]]
    else:
        return []
    return bad + ([] if type(None) in plain or default is None else [None])


def faults(cls, company=None):
    """What a class takes though it must not, or refuses without naming itself and the argument."""
    company, found = dict(company or {}), []
    cls(**company)  # it can be made at all; if not, it needs an entry of COMPANY
    for name, parameter in signature(cls).parameters.items():
        # Any is the type of loss_weight, which is a number, a list or a schedule.
        bad = bad_values(parameter.replace(annotation=Sequence[float]) if name == 'loss_weight' else parameter)
        if name == 'loss_weight':
            assert parameter.annotation is Any and bad
        for value in bad:
            if (cls.__name__, name, value if isinstance(value, int) else None) in ACCEPTED:
                continue
            arguments = {**company, **PARTNERS.get((cls.__name__, name), {}), name: value}
            try:
                cls(**arguments)
            except ValueError as error:
                if not re.match(rf'{cls.__name__}: (.*, )?{name}(\[\d+\])*=', str(error)):
                    found.append(f'{name}={value!r}: "{error}" does not say `{cls.__name__}: {name}=...`')
            except Exception as error:
                found.append(f'{name}={value!r}: {type(error).__name__}: {error}')
            else:
                found.append(f'{name}={value!r} is taken')
    return found


@pytest.mark.parametrize('name', choices(object))
def test_every_argument_is_checked(name):
    cls = MODELS.module_dict[name]
    assert not faults(cls, COMPANY.get(name)), '\n'.join(faults(cls, COMPANY.get(name)))


@pytest.mark.parametrize('name, argument, value', list(ACCEPTED))
def test_what_is_accepted_is_needed(name, argument, value):
    build(dict(COMPANY.get(name, {}), type=name, **{argument: value}))


def test_the_tables_name_what_there_is():
    for name, argument in [key[:2] for key in (*ACCEPTED, *PARTNERS)] + [
            (name, argument) for name, given in COMPANY.items() for argument in given]:
        assert argument in signature(MODELS.module_dict[name]).parameters


class Careless:
    """A class as somebody may register it, without a check."""

    def __init__(self, tau: float = 1.0, heads: int = 2, align: bool = True, mode: str = 'a',
                 grid: Tuple[int, int] = (1, 2), limit: Optional[int] = None, scale=1.0, loss_weight: Any = 1.0,
                 at: Any = None):
        self.tau = float(tau)


def test_the_sweep_finds_a_class_without_checks():
    found = faults(Careless)
    assert "tau='abc': \"could not convert string to float: 'abc'\" does not say `Careless: tau=...`" in found
    taken = ('tau=-1', "heads='4'", "align='no'", "mode='abc'", 'grid=[0.5]', 'limit=True', 'scale=nan', 'heads=None',
             'loss_weight=[]')
    assert {f'{argument} is taken' for argument in taken} <= set(found)
    assert any(fault.startswith('tau=[]: TypeError') for fault in found)
    assert not any(fault.startswith(('at=', 'limit=None')) for fault in found)


def test_numbers_of_other_kinds_are_numbers():
    for value in (4, np.float32(4), np.int64(4)):
        loss = build(dict(type='CWDLoss', tau=value, loss_weight=value))
        assert type(loss.tau) is float and loss.tau == 4.0 and loss.weight.numbers == [4.0]
    for value in (8.0, np.int32(8), np.float64(8)):
        heads = build(dict(type='ICDLoss', heads=value)).heads
        assert type(heads) is int and heads == 8
    assert build(dict(type='ConvAdapter', bias=np.bool_(False))).bias is False
    assert build(dict(type='ConvAdapter', always=1)).always is True
    assert type(build(dict(type='ConvAdapter', kernel_size=3.0)).kernel_size) is int
    assert build(dict(type='ReviewKDLoss', pools=np.array([4, 2]))).pools == [4, 2]


@pytest.mark.parametrize('check, value, message', [
    (checks.positive, '4', "X: y='4' must be a finite number above 0, not text"),
    (checks.positive, True, 'X: y=True must be a finite number above 0, not a truth value'),
    (checks.positive, 0, 'X: y=0 must be above 0'),
    (checks.positive, 10**400, 'must be a finite number above 0'),
    (checks.from_zero, -1, 'X: y=-1 must be from 0'),
    (checks.number, NAN, 'X: y=nan must be a finite number'),
    (checks.whole, 2.5, 'X: y=2.5 must be a whole number from 1'),
    (checks.whole, 0, 'X: y=0 must be a whole number from 1'),
    (checks.boolean, 'no', "X: y='no' must be True or False, not text"),
    (checks.pair, (4, ), 'must be a height and a width'),
    (checks.pair, (4, 0), r'X: y\[1\]=0 must be a whole number from 1'),
    (checks.class_indices, [], r'X: y=\[\] must be a list that is not empty')])
def test_messages(check, value, message):
    with pytest.raises(ValueError, match=message):
        check('X', 'y', value)


def test_bounds_are_included_and_said():
    assert checks.number('X', 'y', 1, 0, 1) == 1.0 and checks.positive('X', 'y', 1, 1) == 1.0
    for call, message in ((lambda: checks.number('X', 'y', 1.5, 0, 1), 'y=1.5 must be within 0..1'),
                          (lambda: checks.number('X', 'y', 3, high=2), 'y=3 must be up to 2'),
                          (lambda: checks.positive('X', 'y', 2, 1), 'y=2 must be above 0 and at most 1')):
        with pytest.raises(ValueError, match=message):
            call()
    assert checks.one_of('X', 'p', 1.0, (1, 2)) == 1 and checks.one_of('X', 'p', None, ('a', None)) is None
    with pytest.raises(ValueError, match='p=True is not one of 1, 2'):
        checks.one_of('X', 'p', True, (1, 2))


def test_a_weight_says_what_it_is_the_weight_of():
    with pytest.raises(ValueError, match=r'^CWDLoss: loss_weight\[1\]=-1 must be from 0'):
        build(dict(type='CWDLoss', loss_weight=[1, -1]))
    with pytest.raises(ValueError, match='^CWDLoss: loss_weight has 2 entries, one a level, but there are 3 levels'):
        build(dict(type='CWDLoss', loss_weight=[1, 2])).weight.check(3)
    with pytest.raises(ValueError, match="^Peer: rate='2' must be a finite number from 0, not text"):
        Weight('2', 'rate', 'Peer')


@pytest.mark.parametrize('value', ['abc', '0.1', True, None, NAN, INF, -1, 0, 2, [], {}, [0.1, 0.2], [2.0],
                                   dict(levels=2.0, schedule=dict(type='LinearWarmup'))])
def test_momentum_of_the_mean_teacher(value):
    with pytest.raises(ValueError, match='^EMATeacher: momentum') as error:
        EMATeacher(nn.Conv2d(3, 3, 1), momentum=value)
    assert 'loss_weight' not in str(error.value)


def test_the_mean_teacher_takes_numbers_and_schedules():
    for value in (1, 0.5, [0.5], np.float32(0.5), dict(type='LinearWarmup', steps=10),
                  dict(levels=0.5, schedule=dict(type='LinearWarmup'))):
        EMATeacher(nn.Conv2d(3, 3, 1), momentum=value)
    with pytest.raises(ValueError, match="^EMATeacher: share='no' must be True or False, not text"):
        EMATeacher(nn.Conv2d(3, 3, 1), share='no')


@pytest.mark.parametrize('preprocess, said', [
    ('rgb', 'preprocess='), (dict(mean='abc'), 'preprocess mean='), (dict(mean=[1, 2, '3']), r'preprocess mean\[2\]='),
    (dict(std=[1, 0, 1]), r'preprocess std\[1\]='), (dict(std=4), 'preprocess std='),
    (dict(pad_value=True), 'preprocess pad_value='), (dict(size=224), 'preprocess size='),
    (dict(size=(224, '224')), r'preprocess size\[1\]='), (dict(channels=['rgb']), 'preprocess channels=')])
def test_preprocess_of_a_plain_teacher(preprocess, said):
    with pytest.raises(ValueError, match=f'^teacher net: {said}'):
        PlainTeacher(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 'net', preprocess)
    PlainTeacher(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 'net', dict(
        mean=[1, 2, 3], std=(1.0, 2.0, 3.0), pad_value=0, size=(224, 224), channels='bgr'))


def test_no_text_is_a_truth():
    with pytest.raises(ValueError, match="^CrossKDLoss: align='no' must be True or False, not text"):
        build(dict(type='CrossKDLoss', align='no'))
    assert torch.isfinite(build(dict(type='CWDLoss', tau=4))(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)))
