"""``kd-mm report`` on real small models that were trained for a few steps: a detector and a segmenter."""

import json
import re
import sys

import pytest
import torch
from pairs import detection_pair, kd_mm, message, segmentation_pair

from kd_mm.lab.report import plots
from kd_mm.lab.report.examples import LEGEND, MISSED, RIGHT, TRUTH, WRONG


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])


def train(pair, work, *flags):
    result = kd_mm('distill', pair.student, '--teacher', pair.teacher, '--teacher-ckpt', pair.weights,
                   '--work-dir', work, '--no-cost', *flags, '--', '--cfg-options',
                   'default_hooks.checkpoint.interval=1')
    assert result.exit_code == 0, message(result)
    return work


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('det')
    pair = detection_pair(folder, coco_root, steps=3)
    return pair, train(pair, folder / 'run', '--baseline', '--recipe', 'mimic')


@pytest.fixture(scope='module')
def seg(cityscapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('seg')
    pair = segmentation_pair(folder, cityscapes_root, steps=3)
    return pair, train(pair, folder / 'run')


def report(*words):
    result = kd_mm('report', *words)
    assert result.exit_code == 0, message(result)
    return result


def check_page(path):
    """The page is whole and asks nobody for anything."""
    text = path.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and 'http' not in text and '@import' not in text
    assert text.count('<svg') == text.count('</svg>') and text.count('<table') == text.count('</table>')
    assert 'width=device-width' in text and 'None' not in text and 'nan' not in re.sub(r'base64,[^"]*', '', text)
    return text


def test_a_detector(det):
    pair, work = det
    result = report(work, '--examples', 2)
    found = json.loads((work / 'report.json').read_text())
    assert found['task'] == 'detection' and list(found['models']) == ['teacher', 'student', 'plain']
    assert found['images'] == found['images_in_all'] == 8 and found['classes'] == ['square', 'disc']
    assert found['losses'] == ['MimicLoss']
    # the host has measured the same
    state = json.loads((work / 'distill.json').read_text())['results']
    for role, name in (('teacher', 'teacher'), ('student', 'distilled'), ('plain', 'baseline')):
        assert found['models'][role]['ap'] == pytest.approx(state[name]['metrics']['coco/bbox_mAP'], abs=6e-4)
        assert found['models'][role]['ap50'] == pytest.approx(state[name]['metrics']['coco/bbox_mAP_50'], abs=6e-4)
    # every object is accounted for
    for row, entry in zip(found['compared']['classes'], found['models']['student']['classes']):
        assert sum(row.values()) == entry['objects']
    assert sum(entry['objects'] for entry in found['models']['student']['classes']) == 14
    # three checkpoints, five levels of the neck, four of the backbone; the last checkpoint is the student
    agreement = found['agreement']
    assert [entry['step'] for entry in agreement['history']] == [1, 2, 3]
    assert agreement['history'][-1]['cka'] == agreement['student'] != agreement['history'][0]['cka']
    assert {'@backbone 0', '@neck 4', '@logits 4'} <= set(agreement['student'])
    assert all(-1 <= value <= 1 for value in agreement['student'].values() if value is not None)
    assert [len(points) for points in agreement['logged'].values()] == [3]
    text = check_page(work / 'report.html')
    assert 'plain student' in text and 'Types of errors' in text and '<figure' in text
    # the truth judges nothing: its boxes have a colour of their own, which the key names
    truths = re.findall(r'aria-label="truth">(.*?)</svg>', text, re.DOTALL)
    drawn = {colour for truth in truths for colour in re.findall(r'stroke="(#\w+)"', truth)}
    assert truths and drawn == {TRUTH} and not drawn & {RIGHT, WRONG, MISSED}
    assert all(f'background:{colour}' in text for _, colour in LEGEND)
    assert str(work / 'report.html') in result.output.replace('\n', '')


def test_a_segmenter(seg):
    pair, work = seg
    report(work, '--examples', 2, '--out', work / 'there')
    found = json.loads((work / 'there' / 'report.json').read_text())
    assert found['task'] == 'segmentation' and list(found['models']) == ['teacher', 'student']
    state = json.loads((work / 'distill.json').read_text())['results']
    for role, name in (('teacher', 'teacher'), ('student', 'distilled')):
        metrics = state[name]['metrics']
        assert 100 * found['models'][role]['miou'] == pytest.approx(metrics['mIoU'], abs=0.006)
        assert 100 * found['models'][role]['accuracy'] == pytest.approx(metrics['aAcc'], abs=0.006)
        assert 100 * found['models'][role]['mean_accuracy'] == pytest.approx(metrics['mAcc'], abs=0.006)
    pixels = sum(entry['pixels'] for entry in found['models']['student']['classes'])
    assert sum(sum(row.values()) for row in found['compared']['classes']) == pixels == 8 * 62 * 64
    assert sum(row['pixels'] for row in found['models']['student']['distance']) == pixels
    assert sum(found['models']['student']['calibration']['count']) == pixels
    text = check_page(work / 'there' / 'report.html')
    assert 'Boundaries and interiors' in text and 'no plain student' in text


def test_models_by_their_files(det, tmp_path):
    pair, work = det
    checkpoint = work / 'distilled' / 'iter_3.pth'
    report('--student', pair.student, checkpoint, '--teacher', pair.teacher, pair.weights, '--out', tmp_path / 'a',
           '--images', 3, '--examples', 0)
    found = json.loads((tmp_path / 'a' / 'report.json').read_text())
    assert found['images'] == 3 and found['agreement']['history'] == [] and found['examples'] == []
    # a student alone
    report('--student', pair.student, checkpoint, '--out', tmp_path / 'b', '--images', 2)
    found = json.loads((tmp_path / 'b' / 'report.json').read_text())
    assert list(found['models']) == ['student'] and 'compared' not in found and found['advice'] == []
    assert 'give one with <code>--teacher CONFIG CHECKPOINT</code>' in check_page(tmp_path / 'b' / 'report.html')


def test_a_teacher_with_its_classes_in_another_order(det, tmp_path):
    """Its boxes are matched by name: the same scores as with the order of the data."""
    pair, work = det
    content = torch.load(pair.weights, weights_only=False)
    content['meta'] = dict(dataset_meta=dict(classes=('disc', 'square')))
    for key in ('bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'):
        value = content['state_dict'][key]
        content['state_dict'][key] = value.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    torch.save(content, tmp_path / 'turned.pth')
    found = []
    for name, weights in (('as', pair.weights), ('turned', tmp_path / 'turned.pth')):
        report('--student', pair.student, work / 'distilled' / 'iter_3.pth', '--teacher', pair.teacher, weights,
               '--out', tmp_path / name, '--examples', 0, '--images', 3)
        found.append(json.loads((tmp_path / name / 'report.json').read_text()))
    assert found[0]['models']['teacher']['classes'] == found[1]['models']['teacher']['classes']
    assert ['matched by name' in ' '.join(one['notes']) for one in found] == [False, True]


def test_what_is_refused(det, tmp_path, monkeypatch):
    pair, work = det
    checkpoint = str(work / 'distilled' / 'iter_3.pth')
    (tmp_path / 'empty').mkdir()
    for words, text in (
            ([], 'nothing to report on: give a WORK_DIR'),
            ([tmp_path / 'gone'], 'no such work dir'),
            ([tmp_path / 'empty'], 'has no config (*.py)'),
            ([work, '--student', pair.student, checkpoint], 'has a student already'),
            (['--student', pair.student, tmp_path / 'gone.pth'], 'no such checkpoint of the student'),
            (['--student', pair.student, checkpoint, '--plain', pair.student, 'gone.pth'],
             'no such checkpoint of the plain student'),
            (['--student', tmp_path / 'gone.py', checkpoint], 'gone.py'),
            (['--student', pair.student, checkpoint, '--split', 'test', '--cfg-options', 'test_dataloader=None'],
             'has no test_dataloader'),
            ([work, '--cfg-options', 'val_dataloader.dataset.data_root=gone'], 'the data of this config is not there')):
        result = kd_mm('report', *words, '--out', tmp_path / 'out')
        assert result.exit_code == 1 and text in message(result), (words, message(result))
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    result = kd_mm('report', work)
    assert result.exit_code == 1 and "pip install 'kd_mm[report]'" in message(result)


def test_a_run_that_has_not_finished(tmp_path):
    (tmp_path / 'distill.json').write_text('{"what": {}, "results": {}}')
    result = kd_mm('report', tmp_path)
    assert result.exit_code == 1 and 'this distillation has no student yet' in message(result)


def test_figures_leave_out_what_is_not_finite():
    assert plots.lines('x', [('a', '#888888', [])], 'x') == '' == plots.bars('x', [], {}, 'x')
    assert '−' not in plots.bars('x', ['small', 'large'], {'student wrong': [None, 0.0]}, 'x')  # no axis around nothing
    text = plots.lines('a < b', [('a', '#888888', [(1, 2.0), (2, float('nan')), (3, 1.0)])], 'x')
    assert text.count('<svg') == 1 and 'a &lt; b' in text and 'xmlns' not in text and 'currentColor' in text
    assert text == plots.lines('a < b', [('a', '#888888', [(1, 2.0), (3, 1.0)])], 'x')  # the same every time
