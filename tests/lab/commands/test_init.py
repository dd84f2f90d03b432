"""``kd-mm init``: an ordinary config that passes the check, or a message that says what to mend."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from pairs import detection_pair, kd_mm, message, save_weights, segmentation_pair

from kd_mm.hosts.models import build_model
from kd_mm.lab.check import check
from kd_mm.lab.configs import read_config


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detection_pair(tmp_path_factory.mktemp('det'), coco_root)


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])


def init(pair, *words, **change):
    named = dict(student=pair.student, teacher=pair.teacher, weights=pair.weights, **{})
    named.update(change)
    weights = ['--teacher-ckpt', named['weights']] if named['weights'] else []
    return kd_mm('init', named['student'], '--teacher', named['teacher'], *weights, *words)


def test_the_config_is_ordinary_and_passes_the_check(det, tmp_path):
    out = tmp_path / 'new' / 'mine.py'
    result = init(det, '--out', out, '--explain')
    assert result.exit_code == 0, message(result)
    assert 'recipe mimic' in result.output and 'crosskd: does not fit' in result.output
    text = out.read_text()
    assert f'_base_ = {det.student!r}' in text and '# Written by kd-mm. Recipe mimic' in text
    assert max(map(len, text.splitlines())) <= 120 + len(det.student)
    cfg = read_config(str(out))
    assert cfg.custom_hooks[0]['teacher'] == det.teacher and cfg.custom_hooks[0]['teacher_ckpt'] == det.weights
    report = check(cfg, (64, 64))
    assert report.problems == [] and report.step.terms[0].method == 'MimicLoss'
    assert init(det, '--out', out).exit_code == 0  # the same text may be written again


def test_a_dry_try_and_two_tasks(det, cityscapes_root, tmp_path):
    assert init(det, '--out', tmp_path / 'dry.py', weights='random').exit_code == 0
    assert read_config(str(tmp_path / 'dry.py')).custom_hooks[0]['teacher_ckpt'] == 'random'
    seg = segmentation_pair(tmp_path / 'seg', cityscapes_root)
    result = init(det, teacher=seg.teacher, weights=seg.weights)
    assert result.exit_code == 1 and 'a config of mmdet and' in message(result) and 'same task' in message(result)


def test_hooks_of_the_student_are_kept(det, tmp_path):
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = {det.student!r}\ncustom_hooks = [dict(type='EMAHook', momentum=0.1)]\n")
    assert init(det, '--out', tmp_path / 'kd.py', student=own).exit_code == 0
    kinds = [hook['type'] for hook in Config.fromfile(str(tmp_path / 'kd.py')).custom_hooks]
    assert kinds == ['EMAHook', 'kd_mm.DistillHook']


def test_configs_in_the_new_style(det, tmp_path):
    """Classes for types: such a file is no base of one in the other style, so the whole config is written."""
    cfg = Config.fromfile(det.student)
    text = '\n'.join(f'{key} = {cfg.to_dict()[key]!r}' for key in cfg if not key.startswith('_'))
    own = tmp_path / 'lazy.py'
    own.write_text('from mmdet.models.detectors import RetinaNet\nfrom mmengine.hooks import EMAHook\n' + text
                   + '\nmodel["type"] = RetinaNet\ncustom_hooks = [dict(type=EMAHook, momentum=0.1)]\n')
    assert Config._is_lazy_import(str(own))
    result = init(det, '--out', tmp_path / 'kd.py', student=own)
    assert result.exit_code == 0, message(result)
    cfg = read_config(str(tmp_path / 'kd.py'))
    assert [str(hook['type']).split('.')[-1] for hook in cfg.custom_hooks] == ['EMAHook', 'DistillHook']
    assert check(cfg, (64, 64)).problems == []
    # mmengine writes each config as text, and a lambda has none
    with own.open('a') as stream:
        stream.write('train_dataloader["dataset"]["pipeline"].append(dict(type="Own", fn=lambda x: x))\n')
    said = 'train_dataloader.dataset.pipeline.4.fn: a lambda, or a function of the config itself'
    result = init(det, '--out', tmp_path / 'lambda.py', student=own)
    assert result.exit_code == 1 and said in message(result) and not (tmp_path / 'lambda.py').exists()
    result = kd_mm('train', own, '--work-dir', tmp_path / 'run')
    assert result.exit_code == 1 and said in message(result)


def test_segmentation(cityscapes_root, tmp_path):
    pair = segmentation_pair(tmp_path, cityscapes_root)
    assert init(pair, '--recipe', 'cwd', '--out', tmp_path / 'kd.py').exit_code == 0
    assert "'loss_cwd'" in (tmp_path / 'kd.py').read_text()
    result = init(pair, '--recipe', 'pkd', '--out', tmp_path / 'no.py')
    assert "the recipe 'pkd' is for detection, and these models do segmentation" in message(result)
    assert result.exit_code == 1 and not (tmp_path / 'no.py').exists()


def test_a_file_with_another_content_is_not_overwritten(det, tmp_path):
    (tmp_path / 'mine.py').write_text('a = 1\n')
    result = init(det, '--out', tmp_path / 'mine.py')
    assert result.exit_code == 1 and 'mine.py is there already, with another content' in message(result)
    assert (tmp_path / 'mine.py').read_text() == 'a = 1\n'
    assert init(det, '--out', tmp_path / 'mine.py', '--overwrite').exit_code == 0


def test_names_that_a_config_cannot_have(det, tmp_path, monkeypatch):
    student = tmp_path / 'student.py'
    student.write_text(f'_base_ = {det.student!r}\n')
    (tmp_path / 'folder.py').mkdir()
    (tmp_path / 'file').write_text('')
    for out, said in ((student, 'is the config'), (tmp_path / 'kd.txt', 'its name ends with .py'),
                      (tmp_path / 'folder.py', 'cannot be written: Is a directory. Give the name of a file'),
                      (tmp_path / 'file' / 'kd.py', 'cannot be written: ')):
        result = init(det, '--out', out, '--overwrite', student=student)
        assert result.exit_code == 1 and said in message(result), message(result)
    assert student.read_text() == f'_base_ = {det.student!r}\n'
    result = init(det, '--out', tmp_path / 'mein Schüler' / 'größer.py', student=student)
    assert f"Check it with kd-mm check '{tmp_path}/mein Schüler/größer.py'" in result.output, message(result)
    assert kd_mm('check', tmp_path / 'mein Schüler' / 'größer.py', '--shape', 64, 64).exit_code == 0


def test_no_weights_and_itself(det, tmp_path):
    for change, text in (
            (dict(weights=None), 'big.py has no published weights. Give those of your teacher with --teacher-ckpt'),
            (dict(weights='gone.pth'), 'no such teacher weights: gone.pth (looked at '),
            (dict(weights=None, teacher=det.student), 'is the same model as the student'),
            (dict(teacher='nowhere.py'), "teacher config 'nowhere.py' does not exist"),
            (dict(teacher='timm:resnet18'), 'or teaches by kd-mm pretrain'),
            (dict(student='nowhere.py'), 'kd-mm init: no such config: nowhere.py')):
        result = init(det, '--out', tmp_path / 'no.py', **change)
        assert result.exit_code == 1 and text in message(result), message(result)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_weights_of_the_teacher(det, tmp_path):
    """The first is of torch.save and holds none, the others those of something else."""
    for content, text in ((dict(meta={}), 'none.pth holds no weights; its entries are meta'),
                          (dict(state_dict=dict(a=torch.zeros(1))), 'none.pth: no key fits RetinaNet'),
                          (dict(state_dict=build_model(Config.fromfile(det.student), 'mmdet').state_dict()),
                           'wrong file for this config?')):
        torch.save(content, tmp_path / 'none.pth')
        result = init(det, '--out', tmp_path / 'no.py', weights=tmp_path / 'none.pth')
        assert result.exit_code == 1 and text in message(result), message(result)
    assert not (tmp_path / 'no.py').exists()


def test_classes_that_differ(det, tmp_path):
    content = torch.load(det.weights, weights_only=True)
    content['meta'] = dict(dataset_meta=dict(classes=('square', 'star', 'tree')))
    torch.save(content, tmp_path / 'other.pth')
    result = init(det, '--out', tmp_path / 'no.py', weights=tmp_path / 'other.pth')
    assert result.exit_code == 1 and ('the student has 2 (square, disc), the teacher 3 (square, star, tree); the '
                                      'teacher lacks disc. Take a teacher') in message(result)


def test_a_config_without_data_or_with_a_teacher_already(det, tmp_path):
    cfg = Config.fromfile(det.student)
    bare = Config(dict(model=cfg.model, default_scope='mmdet'))
    bare.dump(str(tmp_path / 'bare.py'))
    result = init(det, student=tmp_path / 'bare.py')
    assert result.exit_code == 1 and 'bare.py has no train_dataloader' in message(result)
    assert init(det, '--out', tmp_path / 'kd.py').exit_code == 0
    result = init(det, student=tmp_path / 'kd.py')
    assert result.exit_code == 1 and 'distils already' in message(result)


def test_a_student_larger_than_its_teacher_is_said(det, tmp_path):
    large = Config.fromfile(det.student)
    weights = save_weights(large, tmp_path / 'small.pth')
    large.model = Config.fromfile(det.teacher).model
    large.dump(str(tmp_path / 'large.py'))
    result = init(det, '--out', tmp_path / 'kd.py', student=tmp_path / 'large.py', teacher=det.student, weights=weights)
    assert result.exit_code == 0, message(result)
    assert 'is larger than its teacher' in result.output and 'are the two exchanged?' in result.output
    assert 'is larger than its teacher' not in init(det, '--out', tmp_path / 'right.py').output


def test_recipes_are_listed():
    text = kd_mm('recipes', '--task', 'segmentation').output
    assert 'reviewkd (segmentation)' in text and 'crosskd' not in text
    assert 'crosskd (detection)' in kd_mm('recipes').output


def test_the_default_name_is_an_identifier(det, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert init(det).exit_code == 0
    found, = Path().glob('*.py')
    assert found.name == 'small_from_big_mimic.py' and found.stem.isidentifier()
