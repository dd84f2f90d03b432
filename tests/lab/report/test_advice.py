"""The table of rules: what each sees, what it does not, and that what it names exists."""

import re

import pytest

from kd_mm.lab.report.advice import BOTH, RULES, advise
from kd_mm.lab.report.detections import KINDS, MISSED
from kd_mm.losses.base.loss import KDLoss
from kd_mm.regions.base import RegionMask
from kd_mm.registry import choices


def detection(**change):
    """A report in which nothing stands out: the student is 5 points below its teacher."""
    def model(score, **errors):
        return dict(score=score, errors=dict(cost={**dict.fromkeys([*KINDS, MISSED], 0.03), **errors}),
                    calibration=dict(ece=0.05, gap=0.05), classes=[
                        dict(name=name, objects=50, ap=score) for name in ('cat', 'dog', 'cow')])

    sizes = {name: dict(both=80, teacher=20, student=0, neither=0) for name in ('small', 'medium', 'large')}
    report = dict(task='detection', metric='COCO mAP', models=dict(teacher=model(0.40), student=model(0.35)),
                  compared=dict(sizes=sizes), agreement=dict(student={'@neck 0': 0.8, '@neck 1': 0.8}, history=[]))
    report.update(change)
    return report


def segmentation():
    def model(score, wrong):
        return dict(score=score, calibration=dict(ece=0.05, gap=-0.05),
                    sizes=dict(small=score, medium=score, large=score),
                    classes=[dict(name=name, pixels=1000, iou=score) for name in ('road', 'car', 'sky')],
                    distance=[dict(low=0, high=high, error=wrong, pixels=100) for high in (2, 4, 8, 16, None)],
                    mixed=[], confusion=[[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])

    return dict(task='segmentation', metric='mIoU', compared={}, agreement={},
                models=dict(teacher=model(0.60, 0.100), student=model(0.55, 0.105)))


def names(report):
    return [entry['name'] for entry in advise(report)]


def test_nothing_stands_out():
    assert names(detection()) == [] and names(segmentation()) == []


def test_without_a_teacher():
    report = detection()
    del report['models']['teacher'], report['compared'], report['agreement']
    assert names(report) == []


def test_a_weak_teacher_hides_what_it_could_teach():
    report = detection()
    report['models']['student']['score'] = 0.41
    report['models']['student']['errors']['cost']['missed'] = 0.2
    assert names(report) == ['weak_teacher']
    report['models']['plain'] = dict(score=0.42)
    assert names(report) == ['weak_teacher', 'no_gain']


def test_no_gain():
    report = detection()
    report['models']['plain'] = dict(score=0.349)
    assert names(report) == ['no_gain'] and 'plain student 34.9' in advise(report)[0]['seen']
    report['models']['plain'] = dict(score=0.30)
    assert names(report) == []


@pytest.mark.parametrize('kind', [*KINDS, MISSED])
def test_a_type_of_error(kind):
    report = detection()
    report['models']['student']['errors']['cost'][kind] = 0.08
    assert names(report) == [kind] and '8.0 points' in advise(report)[0]['seen']


def test_only_the_two_largest_types_are_named():
    report = detection()
    report['models']['student']['errors']['cost'].update(missed=0.06, localisation=0.08, background=0.07)
    assert names(report) == ['localisation', 'background']


def test_small_objects():
    report = detection()
    report['compared']['sizes']['small'] = dict(both=50, teacher=50, student=0, neither=0)
    assert names(report) == ['small_objects'] and '50 %' in advise(report)[0]['seen']
    report['compared']['sizes']['small'] = dict(both=3, teacher=5, student=0, neither=0)  # too few to say
    assert names(report) == []


def test_one_class():
    report = detection()
    report['models']['student']['classes'][1]['ap'] = 0.05
    assert names(report) == ['one_class'] and 'dog 35.0' in advise(report)[0]['seen']


def test_calibration_and_its_sign():
    report = detection()
    report['models']['student']['calibration'] = dict(ece=0.09, gap=-0.09)
    assert names(report) == ['uncalibrated'] and 'too low' in advise(report)[0]['seen']
    report = segmentation()
    report['models']['student']['calibration'] = dict(ece=0.09, gap=0.09)
    assert 'DISTLoss' in advise(report)[0]['suggest'] and 'too high' in advise(report)[0]['seen']


def test_a_level_that_falls_behind():
    report = detection(agreement=dict(student={'@backbone 0': 0.9, '@neck 0': 0.9, '@neck 1': 0.3, '@logits 0': 0.1}))
    assert names(report) == ['weak_level'] and '@neck 1' in advise(report)[0]['seen']


@pytest.mark.parametrize('course, expected', [
    ((0.4, 0.8, 0.7), ['falling']), ((0.5, 0.5, 0.51), ['flat']), ((0.4, 0.6, 0.7), []), ((0.9, 0.9, 0.9), []),
    ((0.8, 0.7), [])])
def test_the_course_of_the_agreement(course, expected):
    report = detection(agreement=dict(history=[dict(step=step, cka={'@neck 0': value, '@logits 0': 0.0})
                                               for step, value in enumerate(course)]))
    assert names(report) == expected


def test_edges_and_interiors():
    report = segmentation()
    for row in report['models']['student']['distance'][:2]:
        row['error'] = 0.2
    assert names(report) == ['boundaries']
    report = segmentation()
    for row in report['models']['student']['distance']:
        row['error'] = 0.15
    assert names(report) == ['interiors']


def test_classes_that_are_mixed_up():
    report = segmentation()
    report['models']['student']['mixed'] = [dict(truth='car', predicted='road', pixels=9, share=0.2)]
    assert names(report) == ['mixed_up'] and '20.0 % of car is taken for road' in advise(report)[0]['seen']
    report['models']['teacher']['confusion'][1][0] = 0.15  # the teacher cannot tell them apart either
    assert names(report) == []


def test_small_segments():
    report = segmentation()
    report['models']['student']['sizes'] = dict(small=0.4, medium=0.55, large=0.55)
    assert names(report) == ['small_segments']


def test_what_is_there_already_is_said():
    report = detection(losses=['FGDLoss'])
    report['models']['student']['errors']['cost']['missed'] = 0.08
    assert advise(report)[0]['there'] == ['FGDLoss']


def test_every_rule_names_what_exists_and_says_so_in_its_text():
    known = {*choices(KDLoss), *choices(RegionMask)}
    for rule in RULES:
        named = set(re.findall(r'\b[A-Z]\w*(?:Loss|Region)\b', rule.suggest))
        assert named == set(rule.methods) and named <= known, rule.name
        assert rule.task in (BOTH, 'detection', 'segmentation')
