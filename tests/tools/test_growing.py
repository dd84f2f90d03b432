"""The study of classes that grow: a real run of it on drawn data, that goes on where it stopped, and its page."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from pairs import detection_pair
from stock import tool

TOOL = tool('growing')
METHODS = {
    'fine-tuning': dict(TOOL._DET, losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=0.0))),
    'ERD': dict(TOOL._DET, task_classes='new', losses=dict(
        loss_erd=dict(type='ERDLoss', at='bbox_head', box_weight=0)))}


def arguments(root, *words):
    page = root / 'page.md'
    if not page.exists():
        page.write_text(f'# Title\n\n{TOOL.BEGIN}\nold\n{TOOL.END}\n\nThe rest.\n')
    return TOOL.parse_args(['--data-root', str(root / 'data'), '--seeds', '1', '--work-dir', str(root / 'work'),
                            '--results', str(root / 'results.json'), '--page', str(page), *words])


@pytest.fixture
def task(coco_root, tmp_path):
    pair = detection_pair(tmp_path / 'pair', coco_root)
    for name in ('annotations/instances_train.json', 'annotations/instances_val.json', 'train', 'val'):
        (tmp_path / 'data' / 'drawn' / name).mkdir(parents=True)
    return TOOL.Task('drawn', 'Drawn', pair.student, 'drawn', ('disc', 'square'), False, 'COCO mAP', 2, METHODS)


def test_a_run_that_goes_on(task, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    started, train = [], TOOL.train

    def stops(cfg):
        started.append(Path(cfg.work_dir).name)
        if len(started) == 3:
            raise KeyboardInterrupt
        return train(cfg)

    monkeypatch.setattr(TOOL, 'train', stops)
    monkeypatch.setattr(TOOL, 'TASKS', (task, ))
    monkeypatch.setattr(sys, 'argv', ['growing.py'])
    words = ['--data-root', str(args.data_root), '--seeds', '1', '--work-dir', str(args.work_dir), '--results',
             str(args.results), '--page', str(args.page)]
    assert TOOL.main(words) == 130
    assert started == ['old_seed0', 'fine-tuning_seed0', 'ERD_seed0']
    assert set(json.loads(args.results.read_text())['tasks']['drawn']['seeds']['0']) == {'old', 'fine-tuning'}
    assert TOOL.main(words) == 0
    assert started[3:] == ['ERD_seed0', 'joint_seed0']  # what was finished is not trained again
    results = json.loads(args.results.read_text())
    runs = results['tasks']['drawn']['seeds']['0']
    assert set(runs['old']['classes']) == {'disc'} and 'new' not in runs['old']
    for name in ('fine-tuning', 'ERD', 'joint'):
        assert set(runs[name]['classes']) == {'disc', 'square'}
        assert runs[name]['all'] == pytest.approx((runs[name]['old'] + runs[name]['new']) / 2, abs=0.02)
    assert results['versions']['torch'] == torch.__version__.split('+')[0] and '--seeds 1' in results['command']
    text = args.page.read_text()
    assert text.startswith('# Title\n\n') and text.endswith('The rest.\n') and 'old\n<!--' not in text
    assert '| ERD | ' in text and '1 seed (0); 2 iterations each. Old: disc (' in text
    started.clear()
    changed = copy.deepcopy(METHODS)
    changed['ERD']['losses']['loss_erd']['tau'] = 5.0
    monkeypatch.setattr(task, 'methods', changed)
    assert TOOL.main(words) == 0 and started == ['ERD_seed0']  # other settings, another training


def test_two_processes_with_a_task_each_keep_the_results_of_both(tmp_path):
    path = tmp_path / 'results.json'
    first, second = (dict(command='python', tasks={key: dict(seeds={})}) for key in ('camvid', 'bccd'))
    TOOL.save(path, first, 'camvid')
    TOOL.save(path, second, 'bccd')
    first['tasks']['camvid']['seeds']['0'] = dict(old=1)
    TOOL.save(path, first, 'camvid')
    assert json.loads(path.read_text())['tasks'] == dict(bccd=dict(seeds={}), camvid=dict(seeds={'0': dict(old=1)}))
    assert list(json.loads(path.read_text())['tasks']) == ['bccd', 'camvid']  # in the order of the page


def test_the_page_is_what_the_results_say(tmp_path):
    results, page = TOOL.load(TOOL.RESULTS), tmp_path / 'page.md'
    assert {'command', 'versions', 'machine'} <= set(results)
    page.write_text(TOOL.PAGE.read_text())
    TOOL.write_page(results, page)
    assert page.read_text() == TOOL.PAGE.read_text()


def entry(**seeds):
    return dict(title='Drawn', metric='mAP', iters=5, trainings=['old', 'ERD'], seeds=seeds, steps=[
        dict(new=['disc'], images=[4, 8]), dict(new=['square'], images=[3, 8])])


def test_only_whole_seeds_are_in_the_table(tmp_path, capsys):
    whole = [dict(old=dict(old=value), ERD=dict(old=value + 1, new=3.0, all=value + 2)) for value in (10.0, 12.0)]
    results = dict(command='python', versions=dict(torch='2'), threads=1, tasks=dict(
        drawn=entry(**{'0': whole[0], '1': whole[1], '2': dict(old=dict(old=99.0))}), other=entry()))
    text = TOOL.render(results)
    assert '| old | 11.0 ± 1.4 | - | - |' in text and '| ERD | 12.0 ± 1.4 | 3.0 ± 0.0 | 13.0 ± 1.4 |' in text
    assert '2 seeds (0, 1), mean and standard deviation' in text and '99' not in text and text.count('###') == 1
    args = arguments(tmp_path)
    args.results.write_text(json.dumps(results))
    assert TOOL.main(['--render', '--results', str(args.results), '--page', str(args.page)]) == 0
    assert '| ERD | 12.0' in args.page.read_text() and '| ERD | 12.0' in capsys.readouterr().out
    assert TOOL.main(['--render', '--results', str(tmp_path / 'none.json')]) == 1
    args.page.write_text('without marks')
    with pytest.raises(SystemExit, match='lacks the marks'):
        TOOL.main(['--render', '--results', str(args.results), '--page', str(args.page)])


def test_iou_of_each_class_is_that_of_the_host():
    TOOL.register_metric()
    from mmseg.registry import METRICS
    own, host = (METRICS.build(dict(type=f'mmseg.{name}')) for name in ('ClasswiseIoU', 'IoUMetric'))
    drawn = torch.Generator().manual_seed(0)
    results = []
    for _ in range(3):
        labels, predicted = (torch.randint(0, 3, (8, 8), generator=drawn) for _ in range(2))
        results.append(host.intersect_and_union(predicted, labels, 3, 255))
    own.dataset_meta = host.dataset_meta = dict(classes=('a', 'b', 'c'))
    each = own.compute_metrics(results)
    assert list(each) == ['a', 'b', 'c']
    assert 100 * sum(each.values()) / 3 == pytest.approx(host.compute_metrics(results)['mIoU'], abs=0.01)


def test_the_page_has_the_marks_and_the_tables_of_the_results():
    text = TOOL.PAGE.read_text()
    assert text.count(TOOL.BEGIN) == text.count(TOOL.END) == 1
    if TOOL.RESULTS.exists():
        assert TOOL.render(TOOL.load(TOOL.RESULTS)) in text


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('KD_MM_DATA', raising=False)
    assert TOOL.main(['--work-dir', str(tmp_path), '--results', str(tmp_path / 'r.json')]) == 1
    assert '--task bccd needs --data-root PATH' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        TOOL.parse_args(['--seeds', '0'])
    assert '--seeds needs at least 1' in capsys.readouterr().err
