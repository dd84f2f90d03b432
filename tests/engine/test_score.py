"""Teachers scored before the first step."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import InstanceData
from pairs import kd_mm, message, segmentation_pair
from stock import (
    cityscapes_data,
    detector,
    distill_hook,
    hook,
    make_runner,
    same,
    segmentor,
    teacher_of,
    train,
    weights,
    wide,
    with_evaluation,
)

from kd_mm.engine import score as module
from kd_mm.engine.hook import DistillHook
from kd_mm.engine.score import Scores, primary
from kd_mm.engine.trial import Trial, Wish, annotations_of
from kd_mm.hosts.models import build_model
from kd_mm.lab.commands.evaluate import evaluate

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
    distiller, scores, nothing = distill_hook(runner).distiller, Scores(), SimpleNamespace(val_loop=Loop)
    assert scores.measure(distiller, nothing) == {}
    assert 'finds NOTHING in the validation data' in said[-1]
    distiller.teacher.classes = ['other']
    assert scores.measure(distiller, nothing) == {} and 'its classes are not those of the data' in said[-1]


def scored(cfg, name, **options):
    """A training: its hook, and the lines of its log that hold an evaluation."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(Path(cfg.work_dir).with_name(name))
    runner, _ = train(cfg, [hook(teacher_of(cfg, decode_head=dict(channels=24)), LOSS, **options)])
    log = next(Path(runner.work_dir).glob('*/vis_data/scalars.json')).read_text()
    return distill_hook(runner), [line for line in map(json.loads, log.splitlines()) if 'mIoU' in line]


def test_on_a_few_images_both_are_scored_as_if_there_were_no_others(seg):
    """The same numbers as with a validation set of these images."""
    some, lines = scored(seg, 'some', score_teacher=dict(images=3, seed=5))
    chosen = some.scores.trial(None).loader.dataset.indices
    assert len(set(chosen)) == 3 and chosen != [0, 1, 2]
    seg.val_dataloader.dataset.indices = list(chosen)
    few, expected = scored(seg, 'few', score_teacher=True)
    assert some.scores.found == few.scores.found and len(lines) == len(expected) == 2
    for line, other in zip(lines, expected):
        assert line['teacher_mIoU'] == other['teacher_mIoU'] and line['student_mIoU'] == other['mIoU']
        assert 'student_mIoU' not in other
    assert any(line['student_mIoU'] != line['mIoU'] for line in lines)
    more, _ = scored(seg, 'more', score_teacher=100)  # there are 3
    assert not more.scores.trial(None).partial and more.scores.found == few.scores.found


def test_a_resumed_training_takes_the_score_of_its_checkpoint(seg, monkeypatch):
    seg.default_hooks.checkpoint.interval = 1
    first, _ = scored(seg, 'first', score_teacher=3)
    seg.load_from, seg.resume = str(Path(seg.work_dir).with_name('first') / 'iter_1.pth'), True
    times = []
    monkeypatch.setattr(module.Trial, 'run', lambda self, model, run=module.Trial.run: times.append(model) or run(
        self, model))
    again, lines = scored(seg, 'again', score_teacher=3)
    assert again.scores.found == first.scores.found and lines[-1]['teacher_mIoU'] == lines[0]['teacher_mIoU']
    assert not any(model is again.distiller.teacher.model for model in times) and len(times) == 1
    other, _ = scored(seg, 'other', score_teacher=2)  # of other images
    assert any(model is other.distiller.teacher.model for model in times)


def test_detections_on_a_few_images(coco_root, tmp_path):
    """COCO's evaluation takes an image without a result for one in which nothing was found: it must not know it."""
    cfg = with_evaluation(detector(coco_root, tmp_path / 'work'), coco_root)
    cfg.model.test_cfg.score_thr = 0.0
    cfg.val_dataloader.dataset.indices = [1, 4, 6]
    content = json.loads((coco_root / 'annotations.json').read_text())
    kept = [image['id'] for image in content['images']]
    kept = [kept[index] for index in (1, 4)]
    content['images'] = [image for image in content['images'] if image['id'] in kept]
    content['annotations'] = [entry for entry in content['annotations'] if entry['image_id'] in kept]
    (tmp_path / 'two.json').write_text(json.dumps(content))
    runner = make_runner(cfg)
    alone = copy.deepcopy(cfg)
    alone.val_dataloader.dataset.update(ann_file=str(tmp_path / 'two.json'), indices=None)
    alone.val_evaluator.ann_file = str(tmp_path / 'two.json')
    other = make_runner(alone)
    model = build_model(cfg, 'mmdet').eval()

    class Finder:
        """Finds every object."""

        @staticmethod
        def val_step(batch):
            data = model.data_preprocessor(batch, False)
            for sample in data['data_samples']:
                truth = sample.gt_instances
                sample.pred_instances = InstanceData(
                    bboxes=truth.bboxes / truth.bboxes.new_tensor(sample.scale_factor).repeat(2), labels=truth.labels,
                    scores=torch.ones(len(truth)))
            return data['data_samples']

    found = Trial(runner, Wish(2)).run(Finder)
    assert found == Trial(other, Wish()).run(Finder) and found['coco/bbox_mAP'] == 1
    assert Trial(runner, Wish()).run(Finder)['coco/bbox_mAP'] < 1  # 3 of 8 images have a result


@pytest.mark.parametrize('value, said', [
    (0, 'score_teacher=0 must be'), ('all', "score_teacher='all' must be"), (dict(seed=1), 'must be dict(images=N)'),
    (dict(images=-1), 'score_teacher.images=-1'), (dict(images=2, seed='x'), 'score_teacher.seed')])
def test_wishes_that_are_none(value, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        DistillHook(score_teacher=value)


def test_what_cannot_be_judged_in_part(seg, tmp_path):
    table = tmp_path / 'table.csv'
    table.write_text('ImageID')
    with pytest.raises(ValueError, match='neither in COCO\'s form nor in CrowdHuman\'s. Use score_teacher=True'):
        annotations_of(dict(type='OwnMetric', ann_file=str(table)), [1], str(tmp_path))
    runner = make_runner(seg)
    runner.cfg.val_evaluator = None
    with pytest.raises(ValueError, match='needs val_evaluator as a config'):
        Trial(runner, Wish(2))
    runner.val_loop.evaluator.dataset_prefixes = ['a', 'b']
    with pytest.raises(ValueError, match='judges whole data sets'):
        Trial(runner, Wish(2))


@pytest.mark.parametrize('metrics, name', [
    ({'aAcc': 90.0, 'mDice': 70.0, 'mAcc': 80.0}, 'mDice'),
    ({'crowd_human/mMR': 0.9, 'crowd_human/mAP': 0.1}, 'crowd_human/mAP'),
    ({'teacher/own': 1.0}, 'teacher/own'), ({'coco/bbox_mAP_50': 0.2, 'lvis/bbox_AP': 0.1}, 'lvis/bbox_AP')])
def test_which_metric_says_it_in_a_number(metrics, name):
    assert primary(metrics)[0] == name


def test_a_lower_miss_rate_is_better(said):
    scores = Scores()
    scores.found = dict(big={'crowd_human/mMR': 0.5})
    scores.compare({'crowd_human/mMR': 0.6})
    assert not said
    scores.compare({'crowd_human/mMR': 0.4})
    assert len(said) == 1


def test_without_a_validation_there_is_nothing_to_score(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'work')
    losses = dict(loss_f=dict(type='FitNetLoss', at='neck'))
    with pytest.raises(ValueError, match='score_teacher evaluates the teacher in the validation of the config'):
        train(cfg, [hook(wide(cfg), losses, score_teacher=True)])


def test_what_train_refuses_before_anything_is_built(cityscapes_root, tmp_path):
    pair = segmentation_pair(tmp_path / 'pair', cityscapes_root, steps=2)
    result = kd_mm('train', pair.student, '--score-teacher', '--work-dir', tmp_path / 'work')
    assert result.exit_code and 'has no kd_mm.DistillHook' in message(result)
    (tmp_path / 'file').write_text('')
    result = kd_mm('train', pair.student, '--work-dir', tmp_path / 'file' / 'work')
    assert result.exit_code and 'cannot be written: ' in message(result) and '--work-dir' in message(result)
    (tmp_path / 'bare.py').write_text(f'_base_ = {pair.student!r}\ntrain_dataloader = None\n')
    result = kd_mm('train', tmp_path / 'bare.py', '--work-dir', tmp_path / 'work')
    assert result.exit_code and 'bare.py has no train_dataloader' in message(result)
    assert not (tmp_path / 'work').exists()


def test_data_with_nothing_to_find(coco_root, tmp_path, capsys):
    """COCO's average precision of nothing is -1, which is no score: neither low, nor as good as the teacher's."""
    content = json.loads((coco_root / 'annotations.json').read_text())
    (tmp_path / 'none.json').write_text(json.dumps(dict(content, annotations=[])))
    cfg = with_evaluation(detector(coco_root, tmp_path / 'work'), coco_root)
    cfg.model.test_cfg.score_thr = 0.0
    cfg.val_dataloader.dataset.ann_file = cfg.val_evaluator.ann_file = str(tmp_path / 'none.json')
    with pytest.raises(ValueError, match='the validation data have no object of the classes of this config'):
        evaluate(cfg, None, str(tmp_path / 'alone'))
    none = json.dumps(dict(content, annotations=[], images=[]))
    (tmp_path / 'empty.json').write_text(none)
    empty = copy.deepcopy(cfg)
    empty.val_dataloader.dataset.ann_file = str(tmp_path / 'empty.json')
    with pytest.raises(ValueError, match='val_dataloader.dataset: the data set has no sample'):
        evaluate(empty, None, str(tmp_path / 'alone'))
    cfg.log_level, cfg.train_cfg.val_interval = 'INFO', 2
    train(cfg, [hook(wide(cfg), dict(loss_cwd=dict(type='CWDLoss', at='neck')), score_teacher=True)])
    text = capsys.readouterr().out
    assert 'there is NOTHING to find in' in text and 'AS GOOD AS' not in text and 'finds NOTHING' not in text
