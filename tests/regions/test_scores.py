"""Regions made of predictions, on plain tensors and in a distiller."""

import math

import pytest
import torch

from kd_mm.regions import PredictionGapRegion, TeacherScoreRegion
from kd_mm.types.batch import KDBatch


def test_teacher_score():
    logits = torch.full((1, 3, 1, 2), -9.0)
    logits[0, 1, 0, 0], logits[0, 2, 0, 1] = math.log(3), 0.0
    mask = TeacherScoreRegion('head')((torch.zeros(1, 8, 1, 2), ), KDBatch(teacher_logits=(logits, )))[0]
    assert mask.flatten().tolist() == pytest.approx([0.75, 0.5])
    wide = TeacherScoreRegion('head')((torch.zeros(1, 8, 1, 4), ), KDBatch(teacher_logits=(logits.half(), )))[0]
    assert wide.shape == (1, 1, 1, 4) and wide.dtype == torch.float32


def test_prediction_gap():
    ours, theirs = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    theirs[0, 0, 0, 0], theirs[0, 1, 0, 0] = math.log(3), -math.log(3)
    region = PredictionGapRegion(dict(student='head', teacher='other'))
    assert region.logits_at == {'student': 'head', 'teacher': 'other'}
    mask = region((torch.zeros(1, 8, 1, 2), ), KDBatch(student_logits=(ours, ), teacher_logits=(theirs, )))[0]
    assert mask.flatten().tolist() == pytest.approx([1 / 16, 0.0])


def test_errors():
    features = (torch.zeros(1, 8, 2, 2), ) * 2
    with pytest.raises(ValueError, match=r"TeacherScoreRegion: 2 feature levels.*teacher's class logits, got none"):
        TeacherScoreRegion('head')(features, KDBatch())
    with pytest.raises(ValueError, match="student's class logits"):
        PredictionGapRegion('head')(features, KDBatch(teacher_logits=features))
    with pytest.raises(ValueError, match=r'level 1: logits \(1, 8, 2, 2\).*\(1, 4, 2, 2\).*same classes'):
        PredictionGapRegion('head')(features, KDBatch(
            student_logits=features, teacher_logits=(features[0], torch.zeros(1, 4, 2, 2))))
    with pytest.raises(ValueError, match='keys `student` and `teacher`'):
        PredictionGapRegion(dict(student='head'))
