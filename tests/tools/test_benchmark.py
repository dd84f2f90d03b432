"""What the benchmark plans, keeps and writes; no training (its parts are those of the demo)."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

import benchmark  # noqa: E402
import benchmark_data  # noqa: E402
import benchmark_plan  # noqa: E402
import benchmark_results  # noqa: E402
import machine  # noqa: E402
import sources  # noqa: E402
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
(work / 'epoch_3.pth').write_text(sys.argv[2])
(work / 'last_checkpoint').write_text(str(work / 'epoch_3.pth'))
'''


PAIRS = [(task, pair) for task, pairs in benchmark.PAIRS.items() for pair in pairs]


@pytest.fixture(params=PAIRS, ids=lambda item: item[1])
def pair(request):
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[request.param[0]])
    return request.param[1]


@pytest.fixture
def data(tmp_path):
    return benchmark_data.Data(tmp_path / 'bccd', 'bccd', 8, 'hash of the annotations')


def plan(methods, data, work_dir, seeds=1, pair='det', **options):
    pytest.importorskip('mmdet')
    settings = benchmark.read_settings(pair)
    return settings, benchmark.plan(settings, methods, seeds, data, work_dir, **options)


def names(stages):
    return [(type(stage).__name__, stage.name, getattr(stage, 'seed', None)) for stage in stages]


@pytest.mark.parametrize('task', benchmark.PAIRS)
def test_every_method_has_an_entry_or_a_reason(task):
    """A new method cannot be forgotten: each folder of configs/<task> is measured or says why not."""
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
    groups = [benchmark.read_settings(pair) for pair in benchmark.PAIRS[task]]
    folders = {path.name for path in (ROOT / 'configs' / task).iterdir() if path.is_dir()}
    folders -= {'labels', 'teachers'}  # no losses: labels from teachers, and where teachers come from
    methods = {method for settings in groups for method in settings.methods}
    left_out = {method for settings in groups for method in settings.get('left_out', {})}
    assert folders - methods - left_out == set()
    for settings in groups:
        assert set(settings.get('left_out', {})).isdisjoint(settings.methods)
        rows = [*benchmark.entries(settings), benchmark.RECIPE]
        assert set(settings.get('leading', ())) <= set(rows) and not set(rows) & set(benchmark.WORDS)
    # And nothing is measured that has no config and card of its own; `cwd_feature` is another tap of `cwd`,
    # and `local_pod` what of `plop` needs no new classes.
    assert methods - folders <= {'cwd_feature', 'local_pod'}
    for method in methods & folders:
        assert '(../README.md)' in (ROOT / 'configs' / task / method / 'README.md').read_text(), method
    # Folders are named like the files of the losses.
    assert left_out <= {path.stem for path in (ROOT / 'kd_mm' / 'losses').glob('*.py')}


def test_every_entry_builds(pair):
    """The losses exist and take the options that the entries give them, with measured weights too."""
    from kd_mm.engine.term import Term
    settings = benchmark.read_settings(pair)
    for method, entry in benchmark.entries(settings).items():
        losses, files = benchmark_plan.with_files(entry.get('losses', {}), Path('learned'), method)
        assert bool(files) == ('learn' in entry), method
        assert losses or 'student' in entry
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
    monkeypatch.setattr(sources, 'losses_hash', lambda losses: 'changed' if 'loss_cwd' in losses else 'same')
    one = {stage.name: stage.config_hash for stage in benchmark.plan(settings, ['pkd', 'cwd'], 1, data, tmp_path)}
    monkeypatch.setattr(sources, 'losses_hash', lambda losses: 'again' if 'loss_cwd' in losses else 'same')
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
    return benchmark_results.Results(benchmark_results.Book(path), 'det')


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


def test_all_students_of_a_seed_learn_from_one_teacher(fake, data, tmp_path):
    def again(methods, folder, path='benchmark.json', **options):
        _, stages = plan(methods, data, tmp_path / folder, **options)
        results = open_results(tmp_path / path)
        said = results.renew(stages)
        todo, failed = run(stages, results)
        assert not failed
        return [(stage.name, stage.seed) for stage in todo], said, results

    everything, said, results = again(['pkd', 'cwd'], 'here', seeds=3, teachers=2)
    assert len(everything) == 11 and said == []
    teachers = {seed: found['weights'] for seed, found in results.data['runs']['teacher'].items()}
    assert {seed: found['teacher'] for seed, found in results.data['runs']['pkd'].items()} == {
        '0': teachers['0'], '1': teachers['1'], '2': teachers['0']}
    assert not any('teacher' in found for found in results.data['runs']['plain'].values())
    assert len(set(teachers.values())) == 2 and results.strangers() == []
    # Nothing is to be trained: no teacher is missed.
    assert again(['pkd', 'cwd'], 'nowhere', seeds=3, teachers=2)[:2] == ([], [])
    # Where the teacher is, only what is missing is trained, though the other seed's teacher were gone.
    del results.data['runs']['pkd']['1']
    results.save()
    (tmp_path / 'here' / 'teacher_seed0' / 'last_checkpoint').unlink()
    assert again(['pkd', 'cwd'], 'here', seeds=3, teachers=2)[:2] == ([('teacher', 1), ('pkd', 1)], [])
    # Elsewhere it is another teacher, and what learned from the first is trained anew; the other seed's stays.
    results = open_results(tmp_path / 'benchmark.json')
    del results.data['runs']['cwd']['2']
    results.save()
    fake['teacher'] = 0.7
    todo, said, results = again(['pkd', 'cwd'], 'there', seeds=3, teachers=2)
    assert todo == [('teacher', 0), ('pkd', 0), ('cwd', 0), ('pkd', 2), ('cwd', 2)]
    assert len(said) == 1 and said[0].startswith('teacher, seed 0: the checkpoint of its result is not in ')
    assert '3 of them are trained anew' in said[0]
    assert results.data['runs']['teacher']['1']['weights'] == teachers['1']
    assert results.data['runs']['teacher']['0']['weights'] != teachers['0'] and results.strangers() == []


def test_students_of_another_teacher_are_told(fake, data, tmp_path):
    settings, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work')
    results = open_results(tmp_path / 'benchmark.json')
    run(stages, results)
    assert 'another training of the teacher' not in benchmark.page('det', [(settings, results)], results.book)
    results.data['runs']['cwd']['0']['teacher'] = 'other'
    assert not results.has(stages[-1]) and [stage.name for stage in benchmark.needed(stages, results)] == [
        'teacher', stages[-1].name]
    assert 'Learned from another training of the teacher than the rest: cwd.' in benchmark.page(
        'det', [(settings, results)], results.book)


def test_a_teacher_trained_anew_leaves_no_student_of_the_old_one(fake, data, tmp_path):
    _, stages = plan(['pkd'], data, tmp_path / 'work')
    run(stages, open_results(tmp_path / 'benchmark.json'))
    teacher, _, student = stages
    results = open_results(tmp_path / 'benchmark.json')
    results.data['runs'] = {name: results.data['runs'][name] for name in ('teacher', 'plain')}
    (teacher.work_dir / 'last_checkpoint').unlink()
    assert student.state() == 'done' and results.renew(stages) == []
    assert student.state() == 'stale'


def test_a_method_that_fails_does_not_stop_the_others(fake, data, tmp_path):
    fake['pkd'] = -1.0
    settings, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work')
    results = open_results(tmp_path / 'benchmark.json')
    _, failed = run(stages, results)
    assert list(failed) == ['pkd, seed 0']
    assert benchmark.last_line(failed['pkd, seed 0']) == 'no such tap'
    assert results.scores('cwd') == [45.0] and results.scores('pkd') == []
    results.data['errors']['pkd'] = 'no such tap'
    page = benchmark.page('det', [(settings, results)], results.book)
    assert '| `pkd` | failed |' in page and '- `pkd` failed: no such tap' in page
    fake['pkd'] = 0.7
    run(stages, results)
    assert 'failed' not in benchmark.page('det', [(settings, results)], results.book)


def test_table_compares_the_same_seeds_and_hides_nothing(fake, data, tmp_path):
    settings, stages = plan(['pkd', 'cwd'], data, tmp_path / 'work', seeds=3)
    results = open_results(tmp_path / 'benchmark.json')
    run(stages, results)
    results.data['cost']['pkd'] = dict(plain_ms=100.0, teacher_ms=50.0, kd_ms=160.0, ratio=1.07,
                                       plain_bytes=2**20 * 10, kd_bytes=2**20 * 15)
    lines, spread = benchmark.table(settings, results)
    rows = [line for line in lines.splitlines() if line.startswith('| ')][1:]
    assert rows[0] == ('| `pkd` | 56.0 ± 1.0 | 3 | +5.0 [+5.0, +5.0] | better |  | 0.2 | 0.160 (1.60x) | 1.07 | '
                       '15 (1.50x) |')
    assert rows[1].startswith('| **plain student** | 51.0 ± 1.0 | 3 |')
    assert rows[2].startswith('| `cwd` | 46.0 ± 1.0 | 3 | -5.0 [-5.0, -5.0] | worse |')
    assert '1.0' in spread
    page = benchmark.page('det', [(settings, results)], results.book)
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


# ---------------------------------------------------------------------------------------------------------------------
# what the numbers show


def measured(tmp_path, **scores):
    """Results with these scores by row, seed by seed."""
    results = open_results(tmp_path / 'benchmark.json')
    for name, values in scores.items():
        results.data['runs'][name.replace('__', ':').replace('_5', '.5')] = {
            str(seed): dict(score=value, hash='') for seed, value in enumerate(values)}
    return results


def test_differences_are_paired_and_their_interval_is_students(tmp_path):
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2) = 4.3027 of the tables.
    results = measured(tmp_path, plain=[10.0, 40.0, 20.0], pkd=[11.0, 42.0, 23.0], cwd=[12.0, 42.0, 22.1],
                       at=[9, 38.9, 19], fgd=[11.0])
    mean, half, seeds = results.gain('pkd')
    assert (mean, seeds) == (2.0, 3) and half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert results.verdict('pkd') == 'no difference shown'
    assert results.verdict('cwd') == 'better' and results.verdict('at') == 'worse'
    # Only seeds that both have are compared; with one there is no interval.
    assert results.gain('fgd') == (1.0, None, 1) and results.verdict('fgd') == 'one seed'
    assert results.gain('mgd') is None and results.verdict('mgd') == ''
    assert results.gain('pkd', against='cwd')[0] == pytest.approx((-1 + 0 + 0.9) / 3)


def test_at_equal_time_the_plain_student_is_trained_at_least_as_long(tmp_path):
    results = measured(tmp_path, plain=[10.0, 11.0], plain__x1_5=[12.0, 13.0], plain__x2=[14.0, 14.0], pkd=[13.0, 15.0])
    assert results.equal_time('pkd') is None  # no cost
    for kd_ms, wanted in ((149.0, (1.5, 1.5)), (150.0, (1.5, 1.5)), (151.0, (0.0, 2.0))):
        results.data['cost']['pkd'] = dict(kd_ms=kd_ms, plain_ms=100.0)
        mean, _, seeds, factor = results.equal_time('pkd')
        assert (mean, factor, seeds) == (*wanted, 2)
    results.data['cost']['pkd'] = dict(kd_ms=201.0, plain_ms=100.0)
    assert results.equal_time('pkd') is None  # none was trained so long
    # With measured weights it is the same method.
    results.data['runs']['pkd:auto'] = results.data['runs']['pkd']
    results.data['cost']['pkd']['kd_ms'] = 120.0
    assert results.equal_time('pkd:auto') == results.equal_time('pkd')


def test_the_recipe_has_a_place_among_single_methods(tmp_path):
    results = measured(tmp_path, pkd=[1.0, 2.0], cwd=[3.0], fgd=[4.0], mimic=[5.0], recipe__auto=[4.0, 4.0])
    assert results.percentile('recipe:auto', ['pkd', 'cwd', 'fgd', 'mimic', 'at']) == 75
    assert results.percentile('recipe:auto', ['at']) is None
    assert [name for name in ('pkd', 'pkd:auto', 'pkd+ld', ':scratch', 'plain', 'plain:x2', 'teacher')
            if benchmark_plan.single(name)] == ['pkd']


# ---------------------------------------------------------------------------------------------------------------------
# rows of other kinds


def test_rows_with_other_students_and_teachers(data, tmp_path):
    from mmengine.config import Config
    rows = [':scratch', ':foundation', 'pkd:auto', 'pkd+ld']
    settings, stages = plan(rows, data, tmp_path, pair='lite_gfl', longer=True)
    runs = {stage.name: stage for stage in stages}
    assert list(runs) == ['teacher', 'plain', ':scratch', ':foundation', 'pkd:auto', 'pkd+ld', 'plain:x1.25',
                          'plain:x1.5', 'plain:x2', 'plain:x2.5']
    assert runs[':scratch'].needs == runs[':foundation'].needs == () and runs['pkd+ld'].needs == (runs['teacher'],)
    assert len({stage.config_hash for stage in stages}) == len({stage.work_dir for stage in stages}) == len(stages)
    config = Config.fromfile(str(runs[':foundation'].config), import_custom_modules=False)
    hook, = config.custom_hooks
    assert hook.teacher_ckpt == 'own' and hook.teacher.type == 'tools.studies.lite.pretrained'
    assert config.model.backbone.pretrained is False
    # What is said of a row is no part of its key, what it learns from is.
    for part, key, same in (('note', None, True), ('hook', 'teacher_ckpt', False)):
        entry = settings.rows[':foundation']
        (entry if key is None else entry[part])[key or part] = 'another'
        again = benchmark.plan(settings, [':foundation'], 1, data, tmp_path)[-1].config_hash
        assert (again == runs[':foundation'].config_hash) is same
    losses = Config.fromfile(str(runs['pkd:auto'].config), import_custom_modules=False).custom_hooks[0].losses
    assert losses.loss_pkd.loss_weight == 'auto'
    # The plain student that is trained longer has its whole schedule stretched.
    longer = runs['plain:x1.5']
    config = Config.fromfile(str(longer.config), import_custom_modules=False)
    assert config.train_cfg.max_epochs == config.train_cfg.val_interval == 6 and longer.total_iters == 12
    assert config.param_scheduler[-1].end == 12 and config.param_scheduler[0].end == 6


def test_every_seed_learns_from_its_teacher(data, tmp_path):
    _, stages = plan(['pkd', 'maskd'], data, tmp_path, seeds=3, teachers=2)
    teachers = {stage.title: stage.needs[0].seed for stage in stages if stage.needs}
    assert teachers == {
        'pkd, seed 0': 0, 'maskd, learned from the teacher': 0, 'maskd, seed 0': 0,
        'pkd, seed 1': 1, 'maskd, learned from the teacher of seed 1': 1, 'maskd, seed 1': 1,
        'pkd, seed 2': 0, 'maskd, seed 2': 0}
    assert [stage.seed for stage in stages if stage.name == 'teacher'] == [0, 1]
    files = {str(stage.files[0]) for stage in stages if isinstance(stage, benchmark_plan.Lesson)}
    assert len(files) == 2


def test_words_stand_for_rows():
    pytest.importorskip('mmdet')
    settings = benchmark.read_settings('lite_gfl')
    rows = benchmark.rows_of(settings, ['all'])
    assert len(rows) == len(set(rows)) and rows[:3] == list(settings.leading[:3])
    assert {'fgd', 'fgd:auto', 'pkd+ld', ':foundation', 'recipe:auto', 'plain:x'} <= set(rows)
    assert 'crosskd' not in rows and 'crosskd:auto' not in rows
    assert benchmark.rows_of(settings, ['recipe', 'fgd', 'longer']) == ['recipe:auto', 'fgd', 'plain:x']
    assert all(name.endswith(':auto') for name in benchmark.rows_of(settings, ['auto']))
    assert benchmark.rows_of(benchmark.read_settings('det'), ['auto', 'recipe', 'longer', 'leading']) == []
    rows.remove('plain:x')
    assert [name for name in rows if benchmark.costs(name, settings)] == [
        name for name in rows if name == 'recipe:auto' or not name.endswith(':auto') and name != ':scratch']


def test_the_recipe_row_is_what_distill_chooses():
    pytest.importorskip('mmdet')
    home = benchmark.HOME
    name, entry = benchmark_plan.recipe_entry(home / 'lite_gfl_student.py', home / 'lite_gfl_teacher.py')
    assert name == 'mimic' and entry['losses']['loss_mimic']['type'] == 'MimicLoss'
    name, _ = benchmark_plan.recipe_entry(home / 'gfl_student.py', home / 'gfl_teacher.py')
    assert name == 'crosskd'


# ---------------------------------------------------------------------------------------------------------------------
# other data


@pytest.fixture
def coco(tmp_path):
    """A COCO root as the published one is laid out: five pictures, two classes whose ids are not in order."""
    import cv2
    import numpy as np
    root = tmp_path / 'mine'
    (root / 'annotations').mkdir(parents=True)
    for split, count in (('train2017', 3), ('val2017', 2)):
        (root / split).mkdir()
        images = [dict(id=i, file_name=f'{i}.png', width=64, height=48) for i in range(count)]
        for image in images:
            cv2.imwrite(str(root / split / image['file_name']), np.full((48, 64, 3), 100, np.uint8))
        boxes = [dict(id=i, image_id=i, category_id=3, bbox=[4, 4, 20, 20], area=400, iscrowd=0) for i in range(count)]
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(dict(
            images=images, annotations=boxes, categories=[dict(id=7, name='cat'), dict(id=3, name='dog')])))
    return root


def test_any_coco_root(coco, tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    data = benchmark_data.other_data(coco, 'mmdet')
    assert (data.name, data.images, data.classes) == ('mine', 3, ('cat', 'dog')) and data.options() == []
    settings, stages = plan(['pkd', 'icd'], data, tmp_path / 'work')
    runs = {stage.name: stage for stage in stages}
    register_all_modules(init_default_scope=True)
    for name in ('teacher', 'plain', 'pkd'):
        config = Config.fromfile(str(runs[name].config))
        assert config.model.bbox_head.num_classes == 2
        assert config.val_evaluator.ann_file == str(coco / 'annotations' / 'instances_val2017.json')
        # One step an epoch: the schedule ends where the training does.
        assert config.param_scheduler[-1].end == config.train_cfg.max_epochs == runs[name].total_iters
        assert all(item.begin < item.end for item in config.param_scheduler)
        assert config.param_scheduler[0].end == config.param_scheduler[1].begin
        for loader, count in ((config.train_dataloader, 3), (config.val_dataloader, 2)):
            dataset = DATASETS.build(loader.dataset)
            assert len(dataset) == count and dataset[0]['data_samples'].gt_instances.labels.tolist() == [1]
    hook, = Config.fromfile(str(runs['pkd'].config)).custom_hooks
    assert hook.teacher == str(runs['teacher'].config)
    assert Config.fromfile(str(runs['icd'].config)).custom_hooks[0].losses.loss_icd.num_classes == 2
    # What the annotations say is a part of the key.
    path = coco / 'annotations' / 'instances_val2017.json'
    path.write_text(path.read_text().replace('20, 20', '21, 20'))
    assert benchmark_data.other_data(coco, 'mmdet').hash != data.hash


@pytest.mark.parametrize('change, message', [
    (lambda root: (root / 'annotations' / 'instances_val2017.json').unlink(), r'no annotations/\*val\*\.json'),
    (lambda root: (root / 'train2017' / '0.png').unlink(), r'0\.png, the first image of instances_train2017\.json'),
    (lambda root: (root / 'annotations' / 'instances_train2017.json').write_text('{"images": []}'), 'no images'),
])
def test_a_root_that_is_not_complete_is_named(coco, change, message):
    change(coco)
    with pytest.raises(engine.StageError, match=message):
        benchmark_data.other_data(coco, 'mmdet')


def test_any_cityscapes_root(tmp_path):
    root = tmp_path / 'town'
    for split in ('train', 'val'):
        for kind, suffix in (('leftImg8bit', '_leftImg8bit.jpg'), ('gtFine', '_gtFine_labelTrainIds.png')):
            (root / kind / split / 'a').mkdir(parents=True)
            (root / kind / split / 'a' / f'a_0{suffix}').write_bytes(b'0')
    data = benchmark_data.other_data(root, 'mmseg')
    assert data.images == 1 and data.changes['train_dataloader']['dataset']['img_suffix'] == '_leftImg8bit.jpg'
    (root / 'gtFine' / 'val' / 'a' / 'a_0_gtFine_labelTrainIds.png').write_bytes(b'00')
    assert benchmark_data.other_data(root, 'mmseg').hash != data.hash
    (root / 'leftImg8bit' / 'val' / 'a' / 'a_0_leftImg8bit.jpg').unlink()
    with pytest.raises(engine.StageError, match='no leftImg8bit/val'):
        benchmark_data.other_data(root, 'mmseg')


def test_another_set_has_a_table_of_its_own(fake, coco, tmp_path):
    """The whole command with trainings that take no time, twice: the second one trains nothing."""
    arguments = ['--task', 'det', '--pairs', 'det', '--methods', 'pkd', '--dataset', str(coco), '--lanes', '1',
                 '--cost-steps', '0', '--results', str(tmp_path / 'out'), '--work-dir', str(tmp_path / 'work')]
    assert benchmark.main(arguments) == 0
    content = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert list(content['pairs']) == ['det@mine'] and content['pairs']['det@mine']['runs']['pkd']['0']['made'] == 0
    made, = content['made']
    assert made['command'] == ('python tools/studies/benchmark.py --task det --pairs det --methods pkd --seeds 1 '
                               '--dataset mine')
    assert made['machine']['processor'] == machine.processor() and made['machine']['threads'] == 1
    assert made['versions']['torch'] and str(tmp_path) not in json.dumps(content)
    page = (tmp_path / 'out' / 'README.md').read_text()
    assert '## GFL R18 on mine' in page and '| `pkd` | 55.0 | 1 | +5.0 | one seed |' in page
    fake['pkd'] = 0.9
    assert benchmark.main(arguments) == 0
    assert json.loads((tmp_path / 'out' / 'benchmark.json').read_text()) == content


# ---------------------------------------------------------------------------------------------------------------------
# what a result depends on


def test_a_change_in_shared_code_makes_a_result_old(tmp_path):
    root = tmp_path
    package = root / 'kd_mm'
    (package / 'ops').mkdir(parents=True)
    shared, loss = package / 'ops' / 'shared.py', package / 'loss.py'
    shared.write_text('"""About."""\ndef double(x):\n    return 2 * x\n')
    (package / 'ops' / 'other.py').write_text('x = 1\n')
    loss.write_text(f'from {package.name}.ops.shared import double\n')

    def key():
        sources.parsed.cache_clear()
        sources._bare.cache_clear()
        return sources.code_hash(sources.closure([loss], root), root)

    before = key()
    assert sources.closure([loss], root) == [loss, shared]
    shared.write_text('"""Another sentence."""\n\n\ndef double(x):\n    # Why.\n    """What."""\n    return 2 * x\n')
    assert key() == before
    shared.write_text('"""About."""\ndef double(x):\n    return 3 * x\n')
    assert key() != before


def test_a_loss_depends_on_what_it_calls():
    files = {path.relative_to(ROOT).as_posix() for path in sources.closure([ROOT / 'kd_mm' / 'losses' / 'fgd.py'])}
    assert {'kd_mm/losses/fgd.py', 'kd_mm/losses/base/loss.py', 'kd_mm/ops/schedules.py'} <= files
    assert 'kd_mm/losses/pkd.py' not in files and not any(name.startswith('kd_mm/engine') for name in files)
    pkd = dict(loss=dict(type='PKDLoss', at='neck'))
    adapted = dict(loss=dict(type='PKDLoss', at='neck', adapter=dict(type='CrossAttentionAdapter')))
    assert sources.losses_hash(pkd) == sources.losses_hash(dict(loss=dict(type='PKDLoss', at='backbone')))
    assert sources.losses_hash(pkd) != sources.losses_hash(adapted)
    assert sources.engine_hash() != sources.losses_hash(pkd)


def test_rows_of_an_older_code_are_told(tmp_path):
    results = measured(tmp_path, pkd=[1.0], cwd=[2.0])
    entries = {name: dict(losses=dict(loss=dict(type=kind))) for name, kind in (('pkd', 'PKDLoss'), ('cwd', 'CWDLoss'))}
    results.data['runs']['pkd']['0']['code'] = 'of before'
    results.data['runs']['cwd']['0']['code'] = sources.losses_hash(entries['cwd']['losses'])[:benchmark_results.CODE]
    assert results.outdated(entries) == ['pkd']


@pytest.mark.parametrize('task', benchmark.PAIRS)
def test_the_page_is_what_the_results_make(task):
    """No number in it was typed: `python tools/studies/benchmark.py --task TASK --render` writes the same page."""
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
    home = ROOT / 'configs' / task
    assert (home / 'README.md').read_text() == benchmark.render(task, home)


def test_numbers_of_a_note_come_from_the_results(tmp_path, pair):
    results = measured(tmp_path, pkd=[40.94, 39.8])
    results.data['trials'] = dict(pkd=dict(heavy=dict(scores={'0': 34.1}, kd_task_ratio=4.0)))
    assert results.filled('pkd', '{heavy.0} ({heavy.ratio}) instead of {run.0}') == '34.1 (4.0) instead of 40.9'
    with pytest.raises(KeyError):
        results.filled('pkd', '{run.7}')
    # And none is typed.
    notes = benchmark.read_settings(pair).get('notes', {})
    assert not re.findall(r'\d\d\.\d', ' '.join(notes.values()))


def test_results_of_another_machine_are_added(tmp_path):
    def book(name, command, **scores):
        results = benchmark_results.Results(benchmark_results.Book(tmp_path / name), 'det')
        results.book.start(dict(command=command))
        for row, score in scores.items():
            results.data['runs'][row] = {'0': dict(score=score, hash='', made=results.book.current)}
        return results
    own = book('own.json', 'here', plain=1.0, pkd=2.0)
    own.data['errors']['fgd'] = 'failed'
    other = book('other.json', 'there', pkd=3.0, fgd=4.0)
    other.data['cost']['fgd'] = dict(kd_ms=1.0)
    assert own.book.merge(other.book) == 2
    own.save()
    found = open_results(tmp_path / 'own.json')
    assert [found.scores(name) for name in ('plain', 'pkd', 'fgd')] == [[1.0], [3.0], [4.0]]
    assert [found.book.made[found.data['runs'][name]['0']['made']]['command'] for name in ('plain', 'pkd', 'fgd')] == [
        'here', 'there', 'there']
    assert found.data['errors'] == {} and found.data['cost'] == {'fgd': dict(kd_ms=1.0)}
    assert own.book.merge(other.book) == 2 and len(own.book.made) == 2


STEPS = [('lite_gfl', name) for name in (':foundation', 'pkd+ld', 'ofd', 'fgd:auto')] + [
    ('lite_rcnn', name) for name in ('defeat', 'pkd+dist')] + [
    ('lite_dino', name) for name in ('detrdistill', 'kd_detr+pkd', 'mimic', 'mgd')] + [
    ('lite_psp', name) for name in (':foundation', 'transkd', 'reviewkd+cwd', 'af_dcd')] + [
    ('segformer', name) for name in ('transkd', 'reviewkd', 'kd+pkd', 'cirkd')]


@pytest.mark.parametrize('pair, name', STEPS)
def test_a_step_of_the_pairs_on_other_networks(pair, name, data, tmp_path, monkeypatch):
    """Taps, widths and teachers fit: one training step of the config that the benchmark writes, with random weights."""
    pytest.importorskip('mmseg' if pair in benchmark.PAIRS['seg'] else 'mmdet')
    from mmengine.config import Config
    from mmengine.model import BaseModule
    from shipped import ROUNDING, train_one_step

    from tools.studies import lite
    monkeypatch.setattr(lite.LiteBackbone, 'init_weights', BaseModule.init_weights)
    _, stages = plan([name], data, tmp_path, pair=pair)
    config = Config.fromfile(str(stages[-1].config))
    # A query is one of the cells, so there must be as many.
    _, look, names = train_one_step(config, tmp_path / 'work', shape=(64, 128))
    assert names and all(look.losses[name] > -ROUNDING and look.gradients[name] > 0 for name in names)
