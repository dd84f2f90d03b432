"""The demo's drawing, its stages and its report; no training (that is what ``make demo QUICK=1`` is for)."""

import fcntl
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies'), str(ROOT / 'tools')]

import demo  # noqa: E402
import demo_data  # noqa: E402
import demo_report  # noqa: E402
import stages as engine  # noqa: E402

from kd_mm.lab.configs import read_config  # noqa: E402
from kd_mm.lab.models import build_student  # noqa: E402
from kd_mm.lab.report.examples import Example  # noqa: E402
from kd_mm.lab.report.pictures import Panel, data_url  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# data


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('drawn')
    demo_data.make(root, train=4, val=2, seed=0)
    return root


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def test_same_seed_draws_the_same_files_and_another_seed_does_not(drawn, tmp_path):
    demo_data.make(tmp_path / 'again', train=4, val=2, seed=0)
    assert files(drawn) == files(tmp_path / 'again')
    demo_data.make(tmp_path / 'other', train=1, val=1, seed=1)
    name = Path('shapes/train/00000.png')
    assert files(drawn)[name] != files(tmp_path / 'other')[name]


def test_a_larger_set_begins_with_the_smaller_one(drawn, tmp_path):
    demo_data.make(tmp_path, train=2, val=1, seed=0)
    pictures = {name: data for name, data in files(tmp_path).items() if name.suffix == '.png'}
    assert pictures == {name: files(drawn)[name] for name in pictures}


def test_training_and_validation_differ(drawn):
    assert files(drawn)[Path('shapes/train/00000.png')] != files(drawn)[Path('shapes/val/00000.png')]


def test_shapes_are_valid_coco(drawn):
    from pycocotools.coco import COCO
    for split, count in (('train', 4), ('val', 2)):
        coco = COCO(str(drawn / 'shapes' / 'annotations' / f'instances_{split}.json'))
        assert len(coco.imgs) == count
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(demo_data.DET_CLASSES)
        assert len(coco.anns) >= count
        for image in coco.imgs.values():
            pixels = cv2.imread(str(drawn / 'shapes' / split / image['file_name']))
            assert pixels.shape[:2] == (image['height'], image['width'])
        for note in coco.anns.values():
            x, y, w, h = note['bbox']
            image = coco.imgs[note['image_id']]
            assert x >= 0 and y >= 0 and w >= 6 and h >= 6
            assert x + w <= image['width'] + 0.02 and y + h <= image['height'] + 0.02
        # CocoMetric loads its results into a copy of this file, which needs every section.
        assert coco.loadRes([{'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 9, 9], 'score': 0.5}])


def test_streets_have_cityscapes_layout_and_train_ids_only(drawn):
    allowed = {*demo_data.SEG_TRAIN_IDS, 255}
    seen = set()
    for split, count in (('train', 4), ('val', 2)):
        images = sorted((drawn / 'streets' / 'leftImg8bit' / split).rglob('*_leftImg8bit.png'))
        assert len(images) == count
        for path in images:
            name = path.name.replace('_leftImg8bit', '_gtFine_labelTrainIds')
            labels = cv2.imread(str(drawn / 'streets' / 'gtFine' / split / 'demo' / name), cv2.IMREAD_UNCHANGED)
            assert labels.dtype == np.uint8 and labels.shape == cv2.imread(str(path)).shape[:2]
            seen |= set(np.unique(labels).tolist())
    assert seen <= allowed
    assert {demo_data.ROAD, demo_data.SKY, demo_data.BUILDING, demo_data.CAR} <= seen


# ---------------------------------------------------------------------------------------------------------------------
# stages


FAKE_TRAINING = '''
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
logs = work / sys.argv[2] / 'vis_data'
logs.mkdir(parents=True)
(work / 'runs.txt').open('a').write('run ')
if (work / 'iter_10.pth').exists():  # resumed with nothing left to train
    sys.exit()
rows = [dict(loss=2.0 - i / 10, time=0.1, iter=i, step=i) for i in (5, 10)] + [{'mIoU': 40.0, 'step': 10}]
(logs / 'scalars.json').write_text(''.join(json.dumps(row) + chr(10) for row in rows))
if 'crash' in sys.argv:
    sys.exit('no such tap')
(work / 'iter_10.pth').write_text('')
(work / 'last_checkpoint').write_text(str(work / 'iter_10.pth'))
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Three stages of one task whose training is a script that takes no time."""
    script = tmp_path / 'fake.py'
    script.write_text(FAKE_TRAINING)
    task = demo.Task('toy', 'Toy', 'mmseg', 'demo/seg', 'mIoU', 'streets', (96, 192))
    teacher = demo.Stage(task, 'teacher', 0, tmp_path / 'toy' / 'teacher_seed0', (), config_hash='a', total_iters=10)
    student = demo.Stage(task, 'student', 0, tmp_path / 'toy' / 'student_seed0', (), config_hash='b', total_iters=10)
    distilled = demo.Stage(task, 'distilled', 0, tmp_path / 'toy' / 'distilled_seed0', (), config_hash='c',
                           total_iters=10, teacher=teacher)
    broken = set()

    def command(stage):
        run = f'2026{len(list(stage.work_dir.glob("2026*"))):04d}'
        return [sys.executable, str(script), str(stage.work_dir), run, *(['crash'] if stage.role in broken else [])]

    monkeypatch.setattr(demo.Stage, 'command', command)
    monkeypatch.setattr(engine.time, 'sleep', lambda seconds, sleep=engine.time.sleep: sleep(0.02))
    return [teacher, student, distilled], broken


def runs(stage):
    return (stage.work_dir / 'runs.txt').read_text().split().count('run')


def run(stages):
    out = io.StringIO()
    engine.run_stages(stages, 2, engine.Progress(stages, 2, out=out, every=0.0))
    return out.getvalue()


def test_stages_run_once_and_are_skipped_afterwards(fake):
    stages, _ = fake
    text = run(stages)
    assert [runs(stage) for stage in stages] == [1, 1, 1]
    assert all(stage.state() == 'done' for stage in stages)
    line = r'\[demo 3/3\] toy: distilled student, seed 0  (starting|iter \d+/10)  whole demo: \d+ %, about .+ left'
    assert re.search(line, text)
    assert 'finished before, skipped' in run(stages)
    assert [runs(stage) for stage in stages] == [1, 1, 1]


def test_changed_settings_start_anew_and_only_what_they_touch(fake):
    stages, _ = fake
    run(stages)
    stages[1].config_hash = 'other'
    assert stages[1].state() == 'stale'
    run(stages)
    assert [len(list(stage.work_dir.glob('2026*'))) for stage in stages] == [1, 1, 1]
    assert runs(stages[1]) == 1  # the folder was emptied first


def test_a_failing_stage_says_what_to_do_and_resumes(fake):
    stages, broken = fake
    broken.add('distilled')
    with pytest.raises(engine.StageError) as error:
        run(stages)
    message = str(error.value)
    assert 'toy: distilled student, seed 0 failed (exit code 1)' in message
    assert 'no such tap' in message and 'distilled_seed0.log' in message and 'fake.py' in message
    assert stages[2].state() == 'started'
    broken.clear()
    run(stages)
    assert [runs(stage) for stage in stages] == [1, 1, 2]  # same folder, continued


def test_a_training_cut_off_in_its_last_evaluation_is_trained_again(fake):
    """All iterations are done, so a resumed training ends at once and never says how good it is."""
    stages, _ = fake
    run(stages)
    (scalars, ) = stages[1].work_dir.glob('2026*/vis_data/scalars.json')
    lines = scalars.read_text().splitlines(keepends=True)
    scalars.write_text(''.join(lines[:-1]) + json.dumps({'mIoU': 20.0, 'step': 5}))
    stages[1].write_stamp(finished=False)
    assert not stages[1].evaluated() and stages[0].evaluated()
    text = run(stages)
    assert 'student, seed 0: was interrupted in its last evaluation, is trained again' in text
    assert stages[1].evaluated() and stages[1].state() == 'done'
    assert [runs(stage) for stage in stages] == [1, 1, 1]  # in a folder that was emptied first


def test_a_folder_that_is_still_written_to_is_refused(fake):
    """A killed demo may leave a training behind; a second one in the same folder would mix their checkpoints."""
    stages, _ = fake
    code = 'import sys, time; print(1, flush=True); time.sleep(60)'
    stages[0].work_dir.parent.mkdir(parents=True)
    with open(stages[0].lock, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = subprocess.Popen([sys.executable, '-c', code], pass_fds=(lock.fileno(),), stdout=subprocess.PIPE)
    try:
        with pytest.raises(engine.StageError, match='another training is still writing'):
            run(stages)
    finally:
        left.kill()
        left.wait()
    run(stages)
    assert stages[0].state() == 'done'


def test_the_command_resumes_and_hands_over_the_teacher(tmp_path):
    task = demo.TASKS['demo'][0]
    teacher = demo.Stage(task, 'teacher', 0, tmp_path / 't', ())
    teacher.work_dir.mkdir()
    (teacher.work_dir / 'epoch_3.pth').write_text('')
    (teacher.work_dir / 'last_checkpoint').write_text('/moved/since/epoch_3.pth')
    stage = demo.Stage(task, 'distilled', 7, tmp_path / 's', ('train_cfg.max_epochs=2',), '/data/shapes/', teacher)
    command = stage.command()
    assert command[1].endswith('tools/train.py') and command[2].endswith('configs/demo/det_distilled.py')
    assert command[command.index('--resume') + 1] == 'auto'
    for option in ('randomness.seed=7', 'data_root=/data/shapes/', 'train_cfg.max_epochs=2',
                   f'custom_hooks.0.teacher_ckpt={teacher.work_dir / "epoch_3.pth"}'):
        assert option in command


def test_hash_follows_config_seed_data_and_teacher():
    task = demo.TASKS['demo'][0]
    teacher = demo.Stage(task, 'teacher', 0, Path('t'), (), config_hash='t1')

    def stage(seed=0, teacher=None):
        return demo.Stage(task, 'distilled', seed, Path('s'), (), teacher=teacher)

    first = demo.stage_hash(stage(), 'config', 'data')
    assert first == demo.stage_hash(stage(), 'config', 'data')
    before = demo.stage_hash(stage(teacher=teacher), 'config', 'data')
    assert len({first, before, demo.stage_hash(stage(1), 'config', 'data'), demo.stage_hash(stage(), 'other', 'data'),
                demo.stage_hash(stage(), 'config', 'other')}) == 5
    teacher.config_hash = 't2'
    assert before != demo.stage_hash(stage(teacher=teacher), 'config', 'data')


def test_scalars_of_a_resumed_run_are_joined(tmp_path):
    for name, rows in (('20260101', [{'loss': 3.0, 'iter': 1}, {'loss': 2.0, 'iter': 2}, {'mIoU': 10.0, 'step': 2}]),
                       ('20260102', [{'loss': 1.5, 'iter': 2}, {'loss': 1.0, 'iter': 3}])):
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(json.dumps(row) for row in rows) + '\n{"loss": 0.')
    train, val = engine.read_scalars(tmp_path)
    assert [(row['iter'], row['loss']) for row in train] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert [row['mIoU'] for row in val] == [10.0]


@pytest.mark.parametrize('data', ['bccd', 'camvid'])
def test_real_data_that_is_missing_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('KD_MM_DATA', raising=False)
    assert demo.main(['--data', data, '--work-dir', str(tmp_path / 'w')]) == 1
    assert '--data-root PATH' in capsys.readouterr().err
    assert demo.main(['--data', data, '--data-root', str(tmp_path), '--work-dir', str(tmp_path / 'w')]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / demo.TASKS[data][0].folder) in message and 'lacks' in message


@pytest.mark.parametrize('task', [task for tasks in demo.TASKS.values() for task in tasks], ids=lambda task: task.key)
def test_roles_differ_in_network_and_hook_alone(task):
    """The comparison is fair: same data, schedule and optimizer."""
    pytest.importorskip(task.host)
    from mmengine.config import Config
    teacher, student, distilled = (Config.fromfile(str(task.path(role))).to_dict() for role in demo.ROLES)
    hook = distilled.pop('custom_hooks')
    assert [entry['type'] for entry in hook] == ['kd_mm.DistillHook']
    assert distilled == student
    assert teacher.pop('model') != student.pop('model')
    assert teacher == student


# ---------------------------------------------------------------------------------------------------------------------
# report


def recorded(student, distilled, teacher=(60.0,), quick=False):
    def one(role, seed, score, seconds):
        return {'role': role, 'seed': seed, 'score': score, 'seconds': seconds, 'metric': [(5, score / 2), (10, score)],
                'loss': [(i, 3.0 / i) for i in range(1, 11)]}

    made = [one('teacher', i, s, 0.4) for i, s in enumerate(teacher)]
    made += [one('student', i, s, 0.2) for i, s in enumerate(student)]
    made += [one('distilled', i, s, 0.3) for i, s in enumerate(distilled)]
    return {'toy': {'title': 'Toy <task>', 'metric': 'mIoU', 'quick': quick, 'runs': made}}


def test_numbers_of_the_report():
    numbers = demo_report.summary(recorded([49.0, 50.0, 51.0], [54.0, 55.0, 56.0])['toy'])
    assert numbers['gain'] == pytest.approx(5) and numbers['gap'] == pytest.approx(10)
    assert numbers['closed'] == pytest.approx(50)
    assert numbers['overhead'] == pytest.approx(1.5)
    assert numbers['roles']['student']['spread'] == pytest.approx(1.0)
    assert numbers['roles']['teacher']['spread'] is None


def test_verdicts_are_honest():
    good = demo_report.verdict(recorded([49.0, 50.0, 51.0], [54.0, 55.0, 56.0])['toy'])
    assert '5.0 points better' in good and '5.0 standard deviations' in good
    thin = demo_report.verdict(recorded([40.0, 50.0, 60.0], [41.0, 51.0, 61.0])['toy'])
    assert 'less than one standard deviation' in thin
    bad = demo_report.verdict(recorded([50.0], [48.0])['toy'])
    assert '2.0 points WORSE' in bad and 'did not help' in bad
    assert 'no gap' in demo_report.verdict(recorded([70.0], [71.0])['toy'])
    assert 'mean nothing' in demo_report.verdict(recorded([50.0], [55.0], quick=True)['toy'])


def test_report_files(tmp_path):
    url = data_url(np.zeros((4, 4, 3), np.uint8))
    pictures = {'toy': [Example('0.png', tuple(Panel(name, url, (4, 4)) for name in ('image', 'truth', 'teacher')), 0)]}
    page, text = demo_report.write(tmp_path, recorded([49.0, 51.0], [54.0, 56.0]), pictures)
    text = text.read_text()
    assert '| Toy <task> | mIoU | 60.0 | 50.0 ± 1.4 | 55.0 ± 1.4 | +5.0 | 50 % | 0.400 / 0.200 / 0.300 | 1.50 |' in text
    page = page.read_text()
    assert page.count('<figure class="plot">') == 2 and page.count('<image href="data:') == 3
    # five runs, each a line in both charts, in the colour of its role
    assert [page.count(f'stroke: {colour}') for colour in ('#7d8590', '#d9822b', '#2b8a6b')] == [4, 6, 6]
    assert 'Toy &lt;task&gt;' in page and 'Toy <task>' not in page
    # Self-contained: no other file and no server is asked for anything.
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and 'http' not in page


def test_task_loss_leaves_distillation_out():
    assert demo_report.task_loss({'loss': 5.0, 'loss_cls': 2.0, 'loss_pkd': 3.0}, ('loss_pkd',)) == pytest.approx(2.0)


@pytest.mark.parametrize('task, folder', [(task, task.folder) for task in demo.TASKS['demo']],
                         ids=[task.key for task in demo.TASKS['demo']])
def test_pictures_of_all_three_models(task, folder, drawn, tmp_path):
    """Untrained models of the demo's own configs; what is drawn is what they predict."""
    pytest.importorskip(task.host)
    stages = []
    for role in demo.ROLES:
        cfg = read_config(str(task.path('student' if role == 'distilled' else role)))
        torch.save(dict(state_dict=build_student(cfg).state_dict()), tmp_path / f'{role}.pth')
        stages.append(SimpleNamespace(task=task, role=role, seed=0, data_root=f'{drawn / folder}/',
                                      checkpoint=lambda role=role: tmp_path / f'{role}.pth'))
    found = demo_report.draw_pictures(stages, count=2)[task.key]
    captions = [panel.caption for panel in found[0].panels]
    assert len(found) == 2 and [name for name in captions if name in demo_report.NAMES.values()] == [
        'teacher', 'distilled student', 'plain student']
    truth = found[0].panels[captions.index('truth')]
    assert bool(truth.boxes) == (task.host == 'mmdet')
    if truth.boxes:  # the drawn objects, with readable names
        assert {label.text for label in truth.labels} <= set(demo_data.DET_CLASSES) and truth.labels
        width, height = truth.size
        assert all(0 <= box.box[0] < box.box[2] <= width + 1 and box.box[3] <= height + 1 for box in truth.boxes)
    page, _ = demo_report.write(tmp_path, {task.key: recorded([49.0], [54.0])['toy']}, {task.key: found})
    assert page.read_text().count('<image href="data:') == sum(len(example.panels) for example in found)
