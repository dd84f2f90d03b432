"""Teachers scored before the first step."""

import json
from pathlib import Path

import pytest
import torch
from pairs import kd_mm, message, segmentation_pair
from stock import cityscapes_data, detector, distill_hook, hook, same, segmentor, teacher_of, train, weights, wide

from kd_mm.engine import score as module
from kd_mm.engine.score import Scores

LOSS = dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg'))


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path / 'work', steps=2)
    data = cityscapes_data(cityscapes_root)['val_dataloader']
    loader = dict(data, sampler=dict(type='DefaultSampler', shuffle=False))
    loader['dataset'] = dict(loader['dataset'], type='CityscapesDataset')
    cfg.val_dataloader, cfg.val_cfg = loader, dict(type='ValLoop')
    cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg.train_cfg.val_interval = 1
    return cfg


def test_the_score_stands_in_the_log_beside_the_students_and_changes_nothing(seg):
    found = []
    for name, asked in (('with', True), ('without', False)):
        seg.work_dir = str(Path(seg.work_dir).with_name(name))
        runner, record = train(seg, [hook(teacher_of(seg, decode_head=dict(channels=24)), LOSS, score_teacher=asked)])
        found.append((runner, record, torch.get_rng_state()))
    (runner, record, state), (plain, plain_record, plain_state) = found
    assert same(weights(runner), weights(plain)) and record.losses == plain_record.losses
    assert torch.equal(state, plain_state)
    lines = [json.loads(line) for line in next(Path(runner.work_dir).glob('*/vis_data/scalars.json')).read_text(
    ).splitlines()]
    scored = [line for line in lines if 'mIoU' in line]
    assert len(scored) == 2 and all(line['teacher_mIoU'] == scored[0]['teacher_mIoU'] for line in scored)
    theirs = distill_hook(runner).scores.found['teacher']['mIoU']
    assert scored[0]['teacher_mIoU'] == pytest.approx(theirs) and 0 <= theirs <= 100
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert 'AS GOOD AS' not in log or max(line['mIoU'] for line in scored) >= theirs


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(module, 'print_log', lambda text, *_, **__: found.append(text))
    return found


def test_a_poor_teacher_is_said_once(said):
    scores = Scores()
    scores.found = dict(big=dict(mIoU=11.7, aAcc=50.0))
    for own in (9.0, 15.4, 16.0):
        scores.compare(dict(mIoU=own))
    scores.compare(None)
    assert len(said) == 1 and 'the student (mIoU 15.4) is AS GOOD AS' in said[0] and '(11.7)' in said[0]


def test_a_teacher_that_finds_nothing_and_classes_that_differ(seg, said):
    class Loop:
        class dataloader(list):
            dataset = ()

        dataloader = dataloader()

        class evaluator:
            @staticmethod
            def evaluate(count):
                return {}

    runner, _ = train(seg, [hook(teacher_of(seg), LOSS)])
    distiller, scores = distill_hook(runner).distiller, Scores()
    assert scores.measure(distiller, Loop) == {}
    assert 'finds NOTHING in the validation data' in said[-1]
    distiller.teacher.classes = ['other']
    assert scores.measure(distiller, Loop) == {} and 'its classes are not those of the data' in said[-1]


def test_without_a_validation_there_is_nothing_to_score(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'work')
    losses = dict(loss_f=dict(type='FitNetLoss', at='neck'))
    with pytest.raises(ValueError, match='score_teacher=True evaluates the teacher in the validation of the config'):
        train(cfg, [hook(wide(cfg), losses, score_teacher=True)])


def test_the_flag_of_train(cityscapes_root, tmp_path):
    pair = segmentation_pair(tmp_path / 'pair', cityscapes_root, steps=2)
    result = kd_mm('train', pair.student, '--score-teacher', '--work-dir', tmp_path / 'work')
    assert result.exit_code and 'has no kd_mm.DistillHook' in message(result)
