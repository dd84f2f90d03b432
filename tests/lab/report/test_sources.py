"""Which models a work dir gives, in all the states in which it may be."""

import json

import pytest
from mmengine.config import Config
from stock import detector, hook, teacher_of, with_evaluation

from kd_mm.lab.logs import checkpoints, last_checkpoint
from kd_mm.lab.report.sources import add_teacher, from_work_dir, spread

LOSSES = dict(loss_pkd=dict(type='PKDLoss', at='@neck'))


def work_dir(folder, cfg, steps=(1, 2, 10), prefix='iter'):
    """A folder as the host leaves it, without weights in its files."""
    (folder / '20260101_000000' / 'vis_data').mkdir(parents=True)
    cfg.dump(str(folder / '20260101_000000' / 'vis_data' / 'config.py'))
    for step in steps:
        (folder / f'{prefix}_{step}.pth').write_text('')
    (folder / 'best_coco.pth').write_text('')
    (folder / 'last_checkpoint').write_text(f'/gone/since/{prefix}_{steps[-1]}.pth')
    return folder


@pytest.fixture
def cfg(coco_root):
    return with_evaluation(detector(coco_root, 'unused'), coco_root)


def with_hook(cfg, teacher, **extra):
    cfg.custom_hooks = [hook(teacher, LOSSES, **extra)]
    return cfg


def test_a_training_of_the_host(cfg, tmp_path):
    """The folder was moved; checkpoints are in the order of their numbers."""
    Config(teacher_of(cfg)).dump(str(tmp_path / 'big.py'))
    (tmp_path / 'big.pth').write_text('')
    folder = work_dir(tmp_path / 'run', with_hook(cfg, str(tmp_path / 'big.py'),
                                                  teacher_ckpt=str(tmp_path / 'big.pth')))
    rows = [dict(iter=1, kd_agree_pkd=0.5), dict(iter=2, kd_agree_pkd=0.75, loss=1.0), dict(step=2)]
    (folder / '20260101_000000' / 'vis_data' / 'scalars.json').write_text(
        '\n'.join(map(json.dumps, rows)) + '\n{"iter": 3, "kd_ag')
    source = from_work_dir(str(folder))
    assert source.sides['student'].weights == str(folder / 'iter_10.pth') and 'plain' not in source.sides
    assert [step for step, _ in source.history] == [1, 2, 10]
    assert source.logged == {'kd_agree_pkd': [(1, 0.5), (2, 0.75)]}
    add_teacher(source)
    assert source.sides['teacher'].weights == str(tmp_path / 'big.pth') and not source.notes


@pytest.mark.parametrize('entry, text', [
    (dict(teacher='self'), 'The teacher (self) makes no predictions of its own'),
    (dict(teacher=dict(type='EMATeacher')), 'The teacher (EMATeacher) makes no predictions of its own'),
    (dict(teacher=dict(type='timm', name='resnet18')), 'The teacher (timm) makes no predictions of its own'),
    (dict(teacher='mmdet::gfl/gfl_r50_fpn_1x_coco.py', teacher_ckpt='random'), 'The teacher has random weights')])
def test_teachers_that_cannot_be_compared(cfg, tmp_path, entry, text):
    extra = dict(teacher_ckpt=None)
    extra.update({key: value for key, value in entry.items() if key != 'teacher'})
    source = from_work_dir(str(work_dir(tmp_path / 'run', with_hook(cfg, entry['teacher'], **extra))))
    add_teacher(source)
    assert list(source.sides) == ['student'] and text in source.notes[0]


def test_a_teacher_of_the_students_own_kind_and_several(cfg, tmp_path):
    (tmp_path / 'old.pth').write_text('')
    cfg = with_hook(cfg, 'student', teacher_ckpt=str(tmp_path / 'old.pth'))
    folder = work_dir(tmp_path / 'run', cfg, prefix='epoch')
    source = from_work_dir(str(folder))
    add_teacher(source)
    assert source.sides['teacher'].weights == str(tmp_path / 'old.pth')
    assert source.sides['teacher'].cfg.model == source.cfg.model and [step for step, _ in source.history] == [1, 2, 10]
    cfg.custom_hooks = [dict(type='kd_mm.DistillHook', losses=LOSSES, teachers=dict(
        first=dict(teacher='student', teacher_ckpt=str(tmp_path / 'old.pth')), second=dict(teacher='student')))]
    source = from_work_dir(str(work_dir(tmp_path / 'several', cfg)))
    add_teacher(source)
    assert 'teacher' in source.sides and 'Of several teachers the first, first, is compared' in source.notes[0]


def test_a_training_without_distillation(cfg, tmp_path):
    source = from_work_dir(str(work_dir(tmp_path / 'run', cfg)))
    add_teacher(source)
    assert list(source.sides) == ['student'] and 'has no kd_mm.DistillHook' in source.notes[0]


def test_missing_weights_are_an_error(cfg, tmp_path):
    Config(teacher_of(cfg)).dump(str(tmp_path / 'big.py'))
    for given, error, text in ((None, ValueError, 'no weights for the teacher'),
                               ('gone.pth', FileNotFoundError, 'no such checkpoint: gone.pth')):
        folder = tmp_path / str(given)
        source = from_work_dir(str(work_dir(folder, with_hook(cfg, str(tmp_path / 'big.py'), teacher_ckpt=given))))
        with pytest.raises(error, match=text):
            add_teacher(source)


def test_checkpoints_of_a_folder(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ('iter_9.pth', 'iter_10.pth', 'best_mIoU.pth', 'student.pth'):
        (tmp_path / name).write_text('')
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10]
    assert last_checkpoint(tmp_path) == str(tmp_path / 'iter_10.pth')  # no pointer
    history = [(step, '') for step in range(8)]
    assert spread(history, 0) == [] and spread(history, 1) == history[-1:] and len(spread(history, 20)) == 8
    assert [step for step, _ in spread(history, 3)] == [0, 4, 7]
