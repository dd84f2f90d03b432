"""What the benchmark plans, keeps and writes; no training (its parts are those of the demo)."""

import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

import benchmark  # noqa: E402
import stages as engine  # noqa: E402

FAKE_TRAINING = '''
import json, pathlib, sys
work, score = pathlib.Path(sys.argv[1]), float(sys.argv[2])
logs = work / '2026' / 'vis_data'
logs.mkdir(parents=True, exist_ok=True)
if score < 0:
    sys.exit('no such tap')
rows = [dict(loss=2.0, time=0.1, iter=i, step=i, kd_task_ratio=0.1 * i) for i in (1, 2, 3)]
rows.append({'coco/bbox_mAP': score, 'step': 3})
(logs / 'scalars.json').write_text(''.join(json.dumps(row) + chr(10) for row in rows))
(work / 'epoch_3.pth').write_text('')
(work / 'last_checkpoint').write_text(str(work / 'epoch_3.pth'))
'''


PAIRS = [(task, pair) for task, pairs in benchmark.PAIRS.items() for pair in pairs]


@pytest.fixture(params=PAIRS, ids=lambda item: item[1])
def pair(request):
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[request.param[0]])
    return request.param[1]


@pytest.fixture
def data(tmp_path):
    """As much of a COCO folder as planning looks at."""
    folder = tmp_path / 'bccd'
    (folder / 'annotations').mkdir(parents=True)
    (folder / 'annotations' / 'instances_train.json').write_text('{"images": [1, 2, 3, 4, 5, 6, 7, 8]}')
    return folder


def plan(methods, data, work_dir, seeds=1):
    pytest.importorskip('mmdet')
    settings = benchmark.read_settings('det')
    return settings, benchmark.plan(settings, methods, seeds, data, work_dir)


def names(stages):
    return [(type(stage).__name__, stage.name, getattr(stage, 'seed', None)) for stage in stages]


@pytest.mark.parametrize('task', benchmark.PAIRS)
def test_every_method_has_an_entry_or_a_reason(task):
    """A new method cannot be forgotten: each folder of configs/<task> is measured or says why not."""
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
    groups = [benchmark.read_settings(pair) for pair in benchmark.PAIRS[task]]
    folders = {path.name for path in (ROOT / 'configs' / task).iterdir() if path.is_dir()}
    methods = {method for settings in groups for method in settings.methods}
    left_out = {method for settings in groups for method in settings.get('left_out', {})}
    assert folders - methods - left_out == set()
    assert left_out.isdisjoint(methods)
    # And nothing is measured that has no config and card of its own; `cwd_feature` is another tap of `cwd`.
    assert methods - folders <= {'cwd_feature'}
    for method in methods & folders:
        assert '(../README.md)' in (ROOT / 'configs' / task / method / 'README.md').read_text(), method
    # Folders are named like the files of the losses.
    assert left_out <= {path.stem for path in (ROOT / 'kd_mm' / 'losses').glob('*.py')}


def test_every_entry_builds(pair):
    """The losses exist and take the options that the entries give them."""
    from kd_mm.engine.term import Term
    settings = benchmark.read_settings(pair)
    for method, entry in settings.methods.items():
        losses, files = benchmark.with_files(entry.to_dict()['losses'], Path('learned'), method)
        assert bool(files) == ('learn' in entry), method
        for name, loss in losses.items():
            if files:
                loss.update({key: 'random' for key, value in loss.items() if value in map(str, files)})
            Term(name, loss)


def test_teacher_and_student_differ_in_network_and_schedule_alone(pair):
    from mmengine.config import Config
    settings = benchmark.read_settings(pair)
    teacher, student = (Config.fromfile(str(benchmark.HOME / settings[role])).to_dict()
                        for role in ('teacher', 'student'))
    for name in ('model', 'train_cfg', 'param_scheduler'):
        assert teacher.pop(name) != student.pop(name)
    assert teacher == student


def test_plan_trains_the_teacher_once_and_learns_before_it_distils(data, tmp_path):
    settings, stages = plan(['pkd', 'maskd'], data, tmp_path, seeds=2)
    assert names(stages) == [
        ('Run', 'teacher', 0), ('Run', 'plain', 0), ('Run', 'pkd', 0), ('Lesson', 'maskd', None), ('Run', 'maskd', 0),
        ('Run', 'plain', 1), ('Run', 'pkd', 1), ('Run', 'maskd', 1)]
    assert [need.title for need in stages[4].needs] == ['teacher, seed 0', 'maskd, learned from the teacher']
    assert stages[1].total_iters == settings_epochs(settings) * 2


def settings_epochs(settings):
    from mmengine.config import Config
    return Config.fromfile(str(benchmark.HOME / settings.student)).train_cfg.max_epochs


def test_the_written_config_is_the_student_plus_one_hook(data, tmp_path):
    from mmengine.config import Config
    settings, _ = plan(['fgd'], data, tmp_path)
    config = Config.fromfile(str(tmp_path / 'configs' / 'fgd.py')).to_dict()
    hook, = config.pop('custom_hooks')
    assert hook['type'] == 'kd_mm.DistillHook' and hook['losses'] == settings.methods.fgd.losses.to_dict()
    assert config == Config.fromfile(str(benchmark.HOME / settings.student)).to_dict()


def test_settings_of_one_method_touch_no_other(data, tmp_path, monkeypatch):
    _, stages = plan(['pkd', 'cwd'], data, tmp_path)
    before = {stage.name: stage.config_hash for stage in stages}
    settings = benchmark.read_settings('det')
    settings.methods.pkd.losses.loss_pkd.loss_weight = 3.0
    after = {stage.name: stage.config_hash for stage in benchmark.plan(settings, ['pkd', 'cwd'], 1, data, tmp_path)}
    assert {name for name in before if before[name] != after[name]} == {'pkd'}
    # So does the code of its loss.
    monkeypatch.setattr(benchmark, 'loss_sources', lambda losses: ['changed'] if 'loss_cwd' in losses else ['same'])
    one = {stage.name: stage.config_hash for stage in benchmark.plan(settings, ['pkd', 'cwd'], 1, data, tmp_path)}
    monkeypatch.setattr(benchmark, 'loss_sources', lambda losses: ['again'] if 'loss_cwd' in losses else ['same'])
    two = {stage.name: stage.config_hash for stage in benchmark.plan(settings, ['pkd', 'cwd'], 1, data, tmp_path)}
    assert {name for name in one if one[name] != two[name]} == {'cwd'}


@pytest.fixture
def fake(data, tmp_path, monkeypatch):
    """The real plan; every training is a script that takes no time and reaches the score in ``scores``."""
    script = tmp_path / 'fake.py'
    script.write_text(FAKE_TRAINING)
    scores = {'teacher': 0.6, 'plain': 0.5, 'pkd': 0.55, 'cwd': 0.45}
    monkeypatch.setattr(benchmark.Run, 'command', lambda stage: [
        sys.executable, str(script), str(stage.work_dir), str(scores[stage.name] + 0.01 * stage.seed)])
    monkeypatch.setattr(engine.time, 'sleep', lambda seconds, sleep=engine.time.sleep: sleep(0.02))
    return scores


def open_results(path):
    return benchmark.Results(benchmark.Book(path), 'det')


def run(stages, results):
    todo = benchmark.needed(stages, results)
    progress = benchmark.Collecting(todo, 2, results, 'coco/bbox_mAP', out=io.StringIO(), every=0.0)
    failed = engine.run_stages(todo, 2, progress, keep_going=True)
    progress.show({stage.title for stage in todo if stage.state() == 'done'}, {}, force=True)
    return todo, failed


def test_results_are_kept_and_not_trained_again(fake, data, tmp_path):
    _, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work')
    path = tmp_path / 'benchmark.json'
    todo, failed = run(stages, open_results(path))
    assert todo == stages and not failed
    again = open_results(path)
    assert again.data['runs']['pkd']['0']['score'] == pytest.approx(55.0)
    assert again.data['runs']['pkd']['0']['kd_task_ratio'] == pytest.approx(0.2)
    assert benchmark.needed(stages, again) == []
    assert stages[2].evaluated()
    (scalars, ) = stages[2].work_dir.glob('*/vis_data/scalars.json')
    scalars.write_text(scalars.read_text().replace('coco/bbox_mAP', 'loss'))
    assert not stages[2].evaluated()  # interrupted before that: to be trained again
    # A result of other settings does not count.
    again.data['runs']['pkd']['0']['hash'] = 'other'
    assert [stage.name for stage in benchmark.needed(stages, again)] == ['teacher', 'pkd']
    again.data['runs']['pkd']['0']['hash'] = stages[2].config_hash
    # A seed more: only what is new runs, with the teacher it needs.
    _, more = plan(['pkd', 'cwd'], data, tmp_path / 'work', seeds=2)
    again.data['runs']['pkd']['1'] = dict(score=1.0, hash='other')
    assert again.score(stages[2]) == pytest.approx(55.0)  # that of its own seed, not of the last one
    assert [(stage.name, stage.seed) for stage in benchmark.needed(more, again)] == [
        ('teacher', 0), ('plain', 1), ('pkd', 1), ('cwd', 1)]


def test_a_method_that_fails_does_not_stop_the_others(fake, data, tmp_path):
    fake['pkd'] = -1.0
    settings, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work')
    results = open_results(tmp_path / 'benchmark.json')
    _, failed = run(stages, results)
    assert list(failed) == ['pkd, seed 0']
    assert benchmark.last_line(failed['pkd, seed 0']) == 'no such tap'
    assert results.scores('cwd') == [45.0] and results.scores('pkd') == []
    results.data['errors']['pkd'] = 'no such tap'
    page = benchmark.page('det', [(settings, results)], {})
    assert '| `pkd` | failed |' in page and '- `pkd` failed: no such tap' in page
    fake['pkd'] = 0.7
    run(stages, results)
    assert 'failed' not in benchmark.page('det', [(settings, results)], {})


def test_table_compares_the_same_seeds_and_hides_nothing(fake, data, tmp_path):
    settings, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work', seeds=3)
    results = open_results(tmp_path / 'benchmark.json')
    run(stages, results)
    results.data['cost']['pkd'] = dict(plain_ms=100.0, teacher_ms=50.0, kd_ms=160.0, ratio=1.07,
                                       plain_bytes=2**20 * 10, kd_bytes=2**20 * 15)
    lines, spread = benchmark.table(settings, results)
    rows = [line for line in lines.splitlines() if line.startswith('| ')][1:]
    assert rows[0] == '| `pkd` | 56.0 ± 1.0 | 3 | +5.0 | 0.2 | 0.160 (1.60x) | 1.07 | 15 (1.50x) |'
    assert rows[1].startswith('| **plain student** | 51.0 ± 1.0 | 3 |')
    assert rows[2].startswith('| `cwd` | 46.0 ± 1.0 | 3 | -5.0 |')
    assert '1.0' in spread
    page = benchmark.page('det', [(settings, results)], {})
    assert 'The teacher reaches 60.0' in page and 'Not measured yet: ' in page and 'fgd' in page
    assert str(tmp_path) not in page


def test_unknown_methods_and_missing_data_are_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.delenv('KD_MM_DATA', raising=False)
    assert benchmark.main(['--task', 'det', '--methods', 'fdg', '--data-root', str(tmp_path), '--quick',
                           '--work-dir', str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert 'no method fdg' in message and 'fgd' in message
    assert benchmark.main(['--task', 'det', '--quick', '--work-dir', str(tmp_path)]) == 1
    assert '--data-root PATH' in capsys.readouterr().err
