"""``kd-mm distill`` on real small data: everything from two configs to a report, interrupted, and refused."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop
from pairs import detection_pair, kd_mm, message, save_weights, segmentation_pair

from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model
from kd_mm.lab.commands import distill as module
from kd_mm.lab.commands import train as training
from kd_mm.lab.data import picture_size


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detection_pair(tmp_path_factory.mktemp('det'), coco_root, steps=4)


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])


def distill(pair, work_dir, *words, **change):
    named = dict(student=pair.student, teacher=pair.teacher, weights=pair.weights)
    named.update(change)
    weights = ['--teacher-ckpt', named['weights']] if named['weights'] else []
    return kd_mm('distill', named['student'], '--teacher', named['teacher'], *weights, '--work-dir', work_dir, *words)


def test_everything_in_one_go(det, tmp_path, monkeypatch):
    work = tmp_path / 'run'
    flags = ['--', '--cfg-options', 'default_hooks.checkpoint.interval=2', 'default_hooks.logger.interval=1',
             'log_level=INFO']
    result = distill(det, work, '--baseline', '--explain', *flags)
    assert result.exit_code == 0, message(result)
    assert 'recipe mimic' in result.output and 's a step instead of' in result.output
    # what fills pages is in the log file alone; each part has its line
    assert 'System environment' not in result.output and len(result.output.splitlines()) < 300
    assert 'System environment' in next((work / 'distilled').glob('*/*.log')).read_text()
    parts = [line[3:11] for line in result.output.splitlines() if line.startswith('== ')]
    assert parts == ['checking', 'scoring ', 'training', 'training', 'exportin']
    assert 'loss_mimic' in result.output
    state = json.loads((work / 'distill.json').read_text())
    # measured at the size of the training's pictures, padded as the model does
    height, width = picture_size(training.load_config(training.parse_args([str(work / 'distilled.py')])))
    assert state['results']['cost']['shape'] == [-(-height // 32) * 32, -(-width // 32) * 32] != [256, 256]
    scores = {name: state['results'][name]['metrics']['coco/bbox_mAP'] for name in ('teacher', 'baseline', 'distilled')}
    assert all(0 <= score <= 1 for score in scores.values())
    text = (work / 'report.md').read_text()
    assert f'| student, distilled | {scores["distilled"]:.4g} |' in text and 'Cost: ' in text
    assert 'Against the student without distillation: ' in text and '| model | coco/bbox_mAP (0 to 1) |' in text
    assert f'`kd-mm report {work}`' in text and 'One seed: a difference of 0.01 or 0.02 may be chance' in text
    assert '| teacher |' in text and '| student without distillation |' in text

    # an ordinary config and a plain student
    cfg = Config.fromfile(str(work / 'distilled.py'))
    assert cfg.custom_hooks[0]['type'] == 'kd_mm.DistillHook'
    student = load_file(work / 'student.pth')
    build_model(Config.fromfile(det.student), 'mmdet').load_state_dict(student['state_dict'], strict=True)
    assert 'kd_mm' not in student and 'DistillHook' not in student['meta']['cfg']
    # the same seed, and only one of the two was taught
    logs = {name: [json.loads(line) for line in next((work / name).glob('*/vis_data/scalars.json')).read_text(
    ).splitlines() if 'loss_cls' in line] for name in ('baseline', 'distilled')}
    assert logs['baseline'][0]['loss_cls'] == logs['distilled'][0]['loss_cls']
    assert 'loss_mimic' in logs['distilled'][0] and 'loss_mimic' not in logs['baseline'][0]

    # again: nothing is done twice
    monkeypatch.setattr(training, 'train', None)
    monkeypatch.setattr(module, 'evaluate', None)
    result = distill(det, work, '--baseline', *flags)
    assert result.exit_code == 0 and 'continuing in' in result.output, message(result)
    assert (work / 'report.md').read_text() == text
    # the teacher's own log, under its own name
    assert next((work / 'teacher').glob('*/vis_data/config.py')) and [
        path.name for path in (work / 'teacher').glob('*.py')] == ['teacher.py']
    # another one is not mixed in
    result = distill(det, work, '--recipe', 'pkd', *flags)
    text = message(result)
    assert result.exit_code == 1 and re.search(r'has another distillation \(recipe: \w+ there, pkd now\)\.', text)
    result = distill(det, work, *flags, 'randomness.seed=4')
    assert '(flags after --: --cfg-options default_hooks.checkpoint.interval=2 ' in message(result)


def test_a_teacher_that_detects_nothing(det, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'evaluate', lambda *_: {})
    result = distill(det, tmp_path / 'run', '--no-cost')
    assert result.exit_code == 1 and 'nothing was detected on the validation data' in message(result)
    assert f'the teacher ({det.teacher}, {det.weights})' in message(result)
    assert not (tmp_path / 'run' / 'distilled').exists()


def test_an_interrupted_run_continues(cityscapes_root, tmp_path, monkeypatch):
    pair = segmentation_pair(tmp_path / 'pair', cityscapes_root, steps=4)
    flags = ['--no-cost', '--score-images', 3, '--', '--cfg-options', 'default_hooks.checkpoint.interval=1']
    step, seen = IterBasedTrainLoop.run_iter, []

    def interrupted(loop, data_batch):
        seen.append(loop._iter)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return step(loop, data_batch)

    with monkeypatch.context() as patch:
        patch.setattr(IterBasedTrainLoop, 'run_iter', interrupted)
        first = distill(pair, tmp_path / 'run', *flags)
    assert first.exit_code != 0 and (tmp_path / 'run' / 'distilled' / 'iter_2.pth').is_file()
    assert list(json.loads((tmp_path / 'run' / 'distill.json').read_text())['results']) == ['teacher']
    monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', lambda loop, batch: (
        seen.append(loop._iter), step(loop, batch)))
    again = distill(pair, tmp_path / 'run', *flags)
    assert again.exit_code == 0 and 'done: teacher' in again.output, message(again)
    assert seen == [0, 1, 2, 2, 3]
    assert '| student, distilled |' in (tmp_path / 'run' / 'report.md').read_text()
    assert 'Whether distillation helped is not known' in (tmp_path / 'run' / 'report.md').read_text()
    assert 'All scores are those on the first 3 validation images.' in (tmp_path / 'run' / 'report.md').read_text()
    other = distill(pair, tmp_path / 'run', '--no-cost', *flags[3:])
    assert other.exit_code == 1 and '(--score-images: 3 there, none now)' in message(other)


def test_what_is_refused_before_anything_is_written(det, tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    for work, words, change, text in (
            (file / 'run', [], {}, 'cannot be written: '),
            (tmp_path / 'run', ['--recipe', 'cwd'], {}, "'cwd' is for segmentation, and these models do detection"),
            (tmp_path / 'run', ['--recipe', 'nothing'], {}, "unknown recipe 'nothing'. Choices: auto, crosskd"),
            (tmp_path / 'run', [], dict(weights=None), 'has no published weights'),
            (tmp_path / 'run', [], dict(weights='random'), 'nothing can be learned from random weights'),
            (tmp_path / 'run', [], dict(weights=None, teacher=det.student), 'is the same model as the student'),
            (tmp_path / 'run', ['--', '--launcher', 'pytorch'], {}, 'distill trains in one process'),
            (tmp_path / 'run', ['--', '--work-dir=x'], {}, '--work-dir after -- is set by distill itself')):
        result = distill(det, work, *words, **change)
        assert result.exit_code == 1 and text in message(result), message(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']


def test_missing_data_and_foreign_checkpoints(det, tmp_path):
    result = distill(det, tmp_path / 'run', '--', '--cfg-options', 'train_dataloader.dataset.data_root=gone')
    assert result.exit_code == 1 and 'the data of this config is not there' in message(result)
    assert not list((tmp_path / 'run').rglob('*.pth'))
    (tmp_path / 'other').mkdir()
    torch.save({}, tmp_path / 'other' / 'epoch_1.pth')
    result = distill(det, tmp_path / 'other')
    assert result.exit_code == 1 and 'has checkpoints of something else' in message(result)


def test_a_poor_teacher_is_said_loudly(tmp_path):
    run = module.Run(str(tmp_path), dict(student='small.py', teacher='big.py', recipe='cwd'))
    run.results = dict(teacher=dict(metrics=dict(mIoU=11.7)), baseline=dict(metrics=dict(mIoU=15.4)),
                       distilled=dict(metrics=dict(mIoU=15.9)), student='student.pth', config='distilled.py')
    text = module.report(run)
    assert '**The teacher is no better than the student on this data:**' in text
    assert 'Against the student without distillation: +0.5. One seed: a difference of 1 or 2 may' in text
    run.results['teacher']['metrics']['mIoU'] = 20.4
    assert 'no better' not in module.report(run) and 'distillation: +0.5, 10 % of the gap' in module.report(run)


def test_what_has_failed_before_anything_was_done_does_not_keep_the_folder(det, tmp_path):
    """A wrong flag, wrong weights, a teacher that detects nothing: the corrected command runs in the same folder."""
    work, short = tmp_path / 'run', ['--no-cost', '--', '--cfg-options']
    result = distill(det, work, *short, 'train_dataloader.dataset.data_root=gone')
    assert result.exit_code == 1 and 'Download it, link it there, or: -- --cfg-options' in message(result)
    assert sorted(path.name for path in work.iterdir()) == ['baseline.py', 'distilled.py']
    result = distill(det, work, *short, 'train_cfg.max_iters=2', weights=save_other(det, tmp_path))
    assert result.exit_code == 1 and 'wrong file for this config?' in message(result)
    result = distill(det, work, *short, 'train_cfg.max_iters=2')
    assert result.exit_code == 0, message(result)
    # who has changed the config that is there has meant it
    config = work / 'distilled.py'
    config.write_text(f'{config.read_text()}# a remark\n')
    assert distill(det, work, *short, 'train_cfg.max_iters=2').exit_code == 0
    config.write_text(config.read_text().replace("'loss_weight': 1.0", "'loss_weight': 7.0"))
    result = distill(det, work, *short, 'train_cfg.max_iters=2')
    assert result.exit_code == 1 and 'distilled.py was changed since this distillation began' in message(result)
    assert "'loss_weight': 7.0" in config.read_text()
    config.unlink()
    # moved, and without the checkpoints
    (work / 'distilled' / 'iter_2.pth').unlink()
    moved = work.rename(tmp_path / 'elsewhere')
    result = distill(det, moved, *short, 'train_cfg.max_iters=2')
    assert result.exit_code == 0 and config.name in {path.name for path in moved.iterdir()}, message(result)
    (moved / 'student.pth').unlink()
    result = distill(det, moved, *short, 'train_cfg.max_iters=2')
    assert result.exit_code == 1 and 'has no checkpoint any more' in message(result)


def save_other(pair, folder):
    """Weights that have only some of the teacher's keys: those of the student."""
    return save_weights(Config.fromfile(pair.student), folder / 'other.pth')


def test_flags_are_looked_at_before_anything_else(det, tmp_path):
    for flag, said in ((['--res', 'x.pth'], '--resume after -- is set by distill itself'),
                       (['--launch', 'pytorch'], 'distill trains in one process'),
                       (['--score-im=3'], '--score-images stand before --')):
        result = distill(det, tmp_path / 'run', '--', *flag)
        assert result.exit_code == 1 and said in message(result), message(result)
    result = distill(det, tmp_path / 'run', '--', '--ampp')
    assert result.exit_code == 2 and 'unrecognized arguments: --ampp' in message(result)
    assert 'usage: kd-mm distill STUDENT --teacher TEACHER -- ' in message(result)
    assert not list(tmp_path.iterdir())


def test_nothing_of_somebody_else_is_overwritten(det, tmp_path):
    """Configs of the names that distill gives, folders of its names, a damaged state, the teacher's own weights."""
    work = tmp_path / 'mine'
    work.mkdir()
    plain = work / 'baseline.py'
    plain.write_text(f'_base_ = {det.student!r}\n')
    for words in ((), ('--overwrite', )):
        result = distill(det, work, *words, student=plain)
        assert result.exit_code == 1 and 'baseline.py is there already, and would be overwritten' in message(result)
    assert plain.read_text() == f'_base_ = {det.student!r}\n'
    work = tmp_path / 'other'
    (work / 'teacher').mkdir(parents=True)
    weights = shutil.copy(det.weights, work / 'teacher' / 'epoch_1.pth')
    result = distill(det, work, '--overwrite', weights=weights)
    assert result.exit_code == 1 and 'has checkpoints of something else' in message(result)
    for state in ('', '[]', '{"what": 1}'):
        (work / 'distill.json').write_text(state)
        result = distill(det, work)
        assert result.exit_code == 1 and 'is not what kd-mm distill writes, or was damaged' in message(result)
        for command in ('compare', 'report'):
            assert 'or was damaged' in message(kd_mm(command, work))
    (work / 'distill.json').write_text(json.dumps(dict(what=dict(recipe='pkd'), results={})))
    result = distill(det, work, '--overwrite', weights=weights)
    assert result.exit_code == 1 and '--overwrite would remove them' in message(result)
    assert Path(weights).is_file()
