"""``kd-mm pretrain``: a folder of pictures, a teacher, a real training, and the ordinary one that goes on from it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from foundation import DINOV2, TINY, require
from mmengine.config import Config
from pairs import detection_pair, kd_mm, message, segmentation_pair
from shipped import quick_init
from stock import train

from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model, load_config
from kd_mm.hosts.pictures import ImageFolder
from kd_mm.lab.commands.pretrain import teacher_of

timm = require('timm')
STUDENTS = (
    'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detection_pair(tmp_path_factory.mktemp('det'), coco_root)


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    """A Python file that names a tiny teacher."""
    path = tmp_path_factory.mktemp('vit') / 'vit.py'
    path.write_text(f'teacher = dict(type="timm", name={DINOV2!r}, options={TINY!r})\n')
    return path


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])


def pretrain(student, teacher, images, work_dir, *words):
    return kd_mm('pretrain', student, '--teacher', teacher, '--teacher-ckpt', 'random', '--images', images,
                 '--size', 64, 64, '--batch', 2, '--workers', 0, '--work-dir', work_dir, *words)


def test_backbone_and_neck_then_ordinary_training(det, vit, coco_root, tmp_path):
    work, images = tmp_path / 'run', coco_root / 'images'
    result = pretrain(det.student, vit, images, work, '--iters', 2, '--part', 'neck')
    assert result.exit_code == 0, message(result)
    assert f'load_from={work}/pretrained.pth' in result.output
    log = next((work / 'training').glob('*/*.log')).read_text()
    assert 'kd_mm: loss_pretrain' in log and 'kd-mm compare' not in log  # no training on pictures alone is beside it
    content = load_file(work / 'pretrained.pth')
    assert {key.split('.')[0] for key in content['state_dict']} == {'backbone', 'neck'}
    cfg = Config.fromfile(str(work / 'pretrain.py'))
    assert cfg.custom_hooks[0].losses.loss_pretrain.levels == dict(student=[0, 1, 2, 3, 4], teacher=[-1] * 5)
    whole = load_file(work / 'training' / 'iter_2.pth')['state_dict']
    first = load_file(work / 'training' / 'iter_1.pth')['state_dict']
    moved = [key for key in whole if not torch.equal(whole[key], first[key])]
    assert any(key.startswith('neck.') for key in moved) and any(key.startswith('backbone.') for key in moved)
    assert not any(key.startswith('bbox_head.') for key in moved)

    # the ordinary training begins with it, by load_from and by init_cfg
    file = str(work / 'pretrained.pth')
    for way in ('load_from', 'init_cfg'):
        ordinary = Config.fromfile(det.student)
        ordinary.work_dir = str(tmp_path / way)
        if way == 'load_from':
            ordinary.load_from = file
        else:
            ordinary.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=file, prefix='backbone.')
        ordinary.optim_wrapper.optimizer.lr = 0.0
        runner, record = train(ordinary)
        own = runner.model.state_dict()
        names = [key for key in content['state_dict'] if key.startswith('backbone.') and 'running' not in key
                 and 'num_batches' not in key]
        assert names and all(torch.equal(own[key], content['state_dict'][key]) for key in names)
        assert record.losses


def test_it_is_continued(det, vit, coco_root, tmp_path, monkeypatch):
    """Cut after two of four steps and resumed, it ends with the weights of the uncut run."""
    from mmengine.runner import IterBasedTrainLoop
    images, step = coco_root / 'images', IterBasedTrainLoop.run_iter
    found = []
    for name in ('uncut', 'cut'):
        if name == 'cut':
            def run_iter(self, batch):
                if self._iter == 2:
                    raise KeyboardInterrupt
                return step(self, batch)
            monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', run_iter)
        result = pretrain(det.student, vit, images, tmp_path / name, '--iters', 4)
        if name == 'cut':
            assert result.exit_code != 0 and not (tmp_path / 'cut' / 'pretrained.pth').exists()
            monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', step)
            result = pretrain(det.student, vit, images, tmp_path / name, '--iters', 4)
            assert 'Continue with --resume' in message(result)
            result = pretrain(det.student, vit, images, tmp_path / name, '--iters', 4, '--resume')
        assert result.exit_code == 0, message(result)
        found.append(load_file(tmp_path / name / 'pretrained.pth')['state_dict'])
    assert found[0].keys() == found[1].keys() and not any('neck' in key for key in found[0])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0] if 'num_batches' not in key)


def test_a_segmentor_from_a_model_of_the_host(cityscapes_root, tmp_path):
    """A host's model teaches level by level; its pictures are those of the folder below the folder."""
    pair = segmentation_pair(tmp_path / 'seg', cityscapes_root)
    result = kd_mm('pretrain', pair.student, '--teacher', pair.teacher, '--teacher-ckpt', pair.weights, '--images',
                   cityscapes_root / 'leftImg8bit', '--size', 64, 64, '--batch', 2, '--workers', 0, '--iters', 1,
                   '--work-dir', tmp_path / 'run')
    assert result.exit_code == 0, message(result)
    assert (tmp_path / 'run' / 'pretrained.pth').is_file()


@pytest.mark.parametrize('student', STUDENTS)
def test_the_students_of_the_cards(student, vit, coco_root, tmp_path):
    """As they are in the zoo: what comes out is the whole backbone of the stock model, which it fits."""
    result = pretrain(student, vit, coco_root / 'images', tmp_path / 'run', '--iters', 1, '--from-scratch')
    assert result.exit_code == 0, message(result)
    learned = load_file(tmp_path / 'run' / 'pretrained.pth')['state_dict']
    cfg, _, _ = load_config(student)
    cfg.model.pop('pretrained', None)
    cfg.model.backbone.init_cfg = None
    with quick_init():
        own = build_model(cfg, cfg.default_scope).state_dict()
    assert set(learned) == {key for key in own if key.startswith('backbone.')}
    assert all(own[key].shape == value.shape for key, value in learned.items())
    for card in ('det', 'seg'):
        text = (Path(__file__).resolve().parents[3] / 'configs' / card / 'dsi' / 'README.md').read_text()
        assert (f'kd-mm pretrain {student} ' in text) == (student.startswith('mmdet') == (card == 'det'))


def test_wrong_use_is_told(det, vit, coco_root, tmp_path):
    images = coco_root / 'images'
    empty, broken = tmp_path / 'empty', tmp_path / 'broken'
    empty.mkdir()
    shutil.copytree(images, broken)
    (broken / 'a.jpg').write_bytes(b'\xff\xd8\xff')
    (broken / 'none.png').write_bytes(b'')
    for words, text in (
            ((det.student, vit, empty), 'has no pictures'),
            ((det.student, vit, tmp_path / 'nowhere'), 'no such folder of pictures'),
            ((det.student, vit, broken), 'none.png'),
            ((det.student, tmp_path / 'no.py', images), 'no such config'),
            ((det.student, 'timm:', images), 'write timm:NAME'),
            ((det.student, 'timm:vit_none', images), 'has no model of this name'),
            ((tmp_path / 'student.py', vit, images), 'no such config')):
        result = pretrain(*words, tmp_path / 'run', '--iters', 1)
        assert result.exit_code == 1 and text in message(result), message(result)
        assert 'Traceback' not in message(result)
    result = kd_mm('pretrain', det.student, '--teacher', vit, '--images', images, '--batch', 2, '--work-dir',
                   tmp_path / 'other')
    assert 'kd_mm downloads nothing for it' in message(result)
    (tmp_path / 'file').write_text('')
    result = pretrain(det.student, vit, images, tmp_path / 'file' / 'run')
    assert f'the work dir {tmp_path}/file/run cannot be written: ' in message(result)
    assert 'Give another one with --work-dir' in message(result)
    result = pretrain(det.student, vit, images, tmp_path / 'run', '--batch', 100)
    assert 'give a smaller --batch' in message(result)
    # what failed before its first checkpoint does not keep the folder, a file of somebody else does
    failed = pretrain(det.student, vit, images, tmp_path / 'again', '--', '--cfg-options', 'load_from=no.pth')
    assert failed.exit_code == 1 and 'no such file' in message(failed), message(failed)
    result = pretrain(det.student, vit, images, tmp_path / 'again', '--iters', 1)
    assert result.exit_code == 0, message(result)
    result = pretrain(det.student, vit, images, tmp_path / 'again', '--iters', 2)
    assert result.exit_code == 1 and 'pretrain.py is there already, with another content' in message(result)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'pretrain.py').write_text('mine = 1\n')
    assert pretrain(det.student, vit, images, tmp_path / 'mine').exit_code == 1
    assert (tmp_path / 'mine' / 'pretrain.py').read_text() == 'mine = 1\n'
    assert teacher_of('torch.hub:folder:dino') == dict(type='torch.hub', repo='folder', name='dino')


def test_a_picture_that_breaks_while_it_is_read_is_named(tmp_path, coco_root):
    whole = next((coco_root / 'images').iterdir())
    (tmp_path / 'cut.png').write_bytes(Path(whole).read_bytes()[:300])
    dataset = ImageFolder(str(tmp_path), [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(8, 8))])
    with pytest.raises(ValueError, match=r'cut.png cannot be read as a picture'):
        dataset[0]
