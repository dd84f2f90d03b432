"""What a real Runner and real users hand over: objects, loaders, paths and texts; samplers are the stock config's."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from stock import detector, distill_hook, hook, make_runner, segmentor, teacher_of, train

from kd_mm.engine.hook import DistillHook
from kd_mm.hosts.models import load_config
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.check import check

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', adapter=dict(type='ConvAdapter', always=True)))
KD = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits'))


@pytest.fixture
def det(coco_root, tmp_path):
    """Sampler and batch sampler (by aspect ratio) are mmdet's own."""
    cfg = detector(coco_root, tmp_path / 'work')
    stock = Config.fromfile(str(zoo_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')))
    cfg.train_dataloader.sampler, cfg.train_dataloader.batch_sampler = (
        stock.train_dataloader.sampler, stock.train_dataloader.batch_sampler)
    assert cfg.train_dataloader.batch_sampler.type == 'AspectRatioBatchSampler'
    return cfg


def without_scope(cfg):
    teacher = teacher_of(cfg)
    del teacher['default_scope']
    return teacher


# ------------------------------------------------------------------------------------------------ the Runner


@pytest.mark.parametrize('form', ['config', 'model', 'file', 'peer', 'several'])
def test_a_teacher_without_a_scope_is_of_the_students(det, tmp_path, form):
    """The Runner's own scope is an object, not its name."""
    teacher = without_scope(det)
    Config(teacher).dump(tmp_path / 'teacher.py')
    entry = dict(config=hook(teacher, CWD), model=hook(teacher['model'], CWD),
                 file=hook(str(tmp_path / 'teacher.py'), CWD), peer=hook(dict(type='PeerTeacher', config=teacher), CWD),
                 several=dict(type='kd_mm.DistillHook', losses=CWD, teachers=dict(
                     one=dict(teacher=teacher, teacher_ckpt='random'))))[form]
    _, record = train(det, [entry])
    assert all(step['loss_cwd'] > 0 for step in record.losses)


def test_a_segmentor_too(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    _, record = train(cfg, [hook(without_scope(cfg), dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits')))])
    assert all(step['loss_kd'] > 0 for step in record.losses)


@pytest.mark.parametrize('kind', ['batch sampler', 'plain', 'no scaling'])
def test_the_batch_size_for_scaled_rates(det, kind):
    if kind == 'plain':
        det.train_dataloader.batch_sampler = None
    det.auto_scale_lr = None if kind == 'no scaling' else dict(enable=True, base_batch_size=16)
    runner, record = train(det, [hook(teacher_of(det), CWD)])
    assert (runner.train_dataloader.batch_size is None) == (kind != 'plain')
    assert record.rates[0] == pytest.approx([0.01 * (1 if kind == 'no scaling' else 4 / 16)] * 2)


def test_relations_of_images_need_a_batch_of_them(det):
    """What is between images is nothing in a batch of one; cells and more images do."""
    losses = {f'loss_{kind}_{samples}': dict(type=kind, at='neck', samples=samples, limit=8)
              for kind in ('SPLoss', 'RKDLoss', 'PKTLoss', 'CCLoss') for samples in ('image', 'cell')}
    losses['loss_off'] = dict(type='SPLoss', at='neck', samples='image', loss_weight=0)
    det.train_dataloader.batch_size = 2
    det.custom_hooks = [hook(teacher_of(det), losses)]
    with pytest.raises(ValueError) as caught:
        train(det, det.custom_hooks)
    text, = caught.value.found
    assert text.startswith('loss_RKDLoss_image: RKDLoss compares images with each other') and 'needs 3 of them' in text
    assert check(det, (64, 64)).problems == [text]
    det.train_dataloader.batch_size = 1
    assert [problem.split(':')[0] for problem in check(det, (64, 64)).problems] == [
        f'loss_{kind}_image' for kind in ('SPLoss', 'RKDLoss', 'PKTLoss', 'CCLoss')]


def test_a_peer_is_scaled_too(det):
    det.auto_scale_lr = dict(enable=True, base_batch_size=16)
    runner, _ = train(det, [hook(dict(type='PeerTeacher', config=teacher_of(det)), CWD)])
    assert distill_hook(runner).distiller.teacher.wrapper.get_lr()['lr'][0] == pytest.approx(0.01 / 4)


# ------------------------------------------------------------------------------------------------ the user


def test_paths_are_objects(det, tmp_path):
    first, _ = train(det, [])
    Config(dict(det.to_dict())).dump(tmp_path / 'teacher.py')
    file, weights = tmp_path / 'teacher.py', Path(det.work_dir) / 'iter_2.pth'
    losses = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits'))
    _, record = train(det, [DistillHook(teacher=file, teacher_ckpt=weights, losses=losses)])
    assert all(step['loss_kd'] > 0 for step in record.losses)
    assert load_config(file)[1] == str(file)
    train(det, [DistillHook(teacher='student', teacher_ckpt=weights, losses=losses)])
    train(det, [DistillHook(teacher=dict(type='PeerTeacher', config=file), teacher_ckpt=weights, losses=losses)])


WRONG = [
    (dict(adapter_lr_mult='x'), "adapter_lr_mult='x' must be a finite number from 0, not text"),
    (dict(adapter_lr_mult=-1), 'adapter_lr_mult=-1 must be from 0'),
    (dict(adapter_decay_mult='2'), "adapter_decay_mult='2' must be a finite number from 0, not text"),
    (dict(seed='a'), "seed='a' must be a whole number, not text"),
    (dict(inherit=True), "inherit=True must be a list of module paths"),
    (dict(inherit=dict(neck=1)), "must say for each module path how: 'copy', 'grow'"),
    (dict(teacher_strict='no'), "teacher_strict='no' must be True or False, not text"),
    (dict(teacher=None, teachers=dict(a=dict(teacher='self.py', teacher_strict='no'))),
     r"teachers\['a'\].teacher_strict='no' must be True or False"),
    (dict(task_loss_weight='x'), "task_loss_weight='x' must be a number from 0"),
]


@pytest.mark.parametrize(('extra', 'message'), WRONG, ids=[str(list(extra)) for extra, _ in WRONG])
def test_wrong_values_are_named_by_check_and_training(det, extra, message):
    entry = {**hook(teacher_of(det), CWD), **extra}
    with pytest.raises(ValueError, match=message):
        train(det, [entry])
    det.custom_hooks = [entry]
    import re
    found = check(det, (64, 64), teacher_random=True).problems
    assert any(re.search(message, problem) for problem in found), found


def test_several_wrong_values_come_together(det):
    entry = hook(teacher_of(det), dict(loss_cwd=dict(CWD['loss_cwd'], at='nack')), seed='a', adapter_lr_mult=-1)
    det.custom_hooks = [entry]
    text = '\n'.join(check(det, (64, 64)).problems)
    assert all(word in text for word in ("seed='a'", 'adapter_lr_mult=-1', "'nack'")), text


@pytest.mark.parametrize('name', ['DistillHook', 'mmdet.DistillHook', 'kd_mm.engine.hook.DistillHook'])
def test_the_name_of_the_hook(det, name):
    """Check and training agree."""
    entry = dict(hook(teacher_of(det), CWD), type=name)
    det.custom_hooks = [entry]
    problems = check(det, (64, 64)).problems
    if name.startswith('kd_mm.'):
        train(det, [entry])
        assert problems == []
    else:
        with pytest.raises(KeyError):
            train(det, [entry])
        assert len(problems) == 1 and "write type='kd_mm.DistillHook'" in problems[0]


def test_a_hook_among_the_default_hooks(det):
    det.default_hooks.distill = hook(teacher_of(det), CWD)
    _, record = train(det)
    assert all(step['loss_cwd'] > 0 for step in record.losses)
    det.custom_hooks = []
    assert check(det, (64, 64)).problems == []
    det.custom_hooks = [hook(teacher_of(det), CWD)]
    assert any('2 times' in problem for problem in check(det, (64, 64)).problems)
    with pytest.raises(ValueError, match='lists kd_mm.DistillHook 2 times'):
        train(det, det.custom_hooks)


def test_one_class_without_a_comma(det, monkeypatch):
    """``classes=('disc')`` is text; the host trains on it as on one class."""
    det.train_dataloader.dataset.metainfo = dict(classes=('disc'))
    det.model.bbox_head.num_classes = 1
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance().__class__, 'log',
                        lambda self, level, message, *args, **kwargs: said.append((level, message)))
    runner, record = train(det, [hook(dict(det.to_dict()), KD)])
    assert distill_hook(runner).distiller.classes == ['disc'] == distill_hook(runner).distiller.teacher.classes
    assert all(step['loss_kd'] > 0 for step in record.losses)
    assert any(level >= 30 and 'comma' in str(text) for level, text in said)


def test_a_data_set_without_a_length(det):
    """An iterable one has no ``len``."""
    runner = make_runner(det, [hook(teacher_of(det), CWD)])
    runner.train_loop  # noqa: B018 (builds the loader)
    assert len(runner.train_dataloader.dataset) == 8
    stream = Stream(runner.train_dataloader.dataset)
    runner.train_dataloader.__dict__['dataset'] = stream
    runner.train()
    assert runner.iter == 2


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, held):
        self.held, self.metainfo = held, held.metainfo

    def __iter__(self):
        return (self.held[index] for index in range(8))

    def __getitem__(self, index):
        return self.held[index]
