"""Distillation in every way that the hosts train: compiled, converted, multi-scale, with workers, killed."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_coco
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm
from mmengine.runner import Runner
from stock import detector, distill_hook, hook, make_runner, same, segmentor, teacher_of, train, weights

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import DistillHook
from kd_mm.hosts.models import build_model, load_config
from kd_mm.teachers.base import Teacher

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', adapter=dict(type='ConvAdapter', always=True)))
KD = dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits'))


@pytest.fixture
def det(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    cfg.train_dataloader.sampler.shuffle = False
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path)


def kd(cfg, losses=None, **extra):
    return [hook(teacher_of(cfg), losses or CWD, **extra)]


# ------------------------------------------------------------------------------------ the model is changed on the way


@pytest.mark.no_cover  # nothing of ours runs here alone, and tracing the compiler takes half as long again
def test_torch_compile(seg):
    """``compile=...`` of the host: taps and teacher work inside a compiled train_step, with the same numbers."""
    seg.train_dataloader.sampler.shuffle = False
    seg.model.decode_head.dropout_ratio = seg.model.auxiliary_head.dropout_ratio = 0.0
    plain, expected = train(seg, kd(seg, KD))
    torch._dynamo.reset()
    seg.compile = dict(backend='eager')
    compiled, record = train(seg, kd(seg, KD))
    assert torch._dynamo.utils.counters['stats']['calls_captured'] > 0
    for one, two in zip(expected.losses, record.losses):
        assert one == pytest.approx(two, rel=1e-4)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[key], value, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize('at', ['backbone', 'neck'])
def test_efficient_conv_bn_eval(det, at):
    """mmengine folds frozen batch norms into convolutions after the taps were found."""
    losses = dict(loss_hint=dict(type='FitNetLoss', at=at))
    det.model.backbone.norm_eval = True
    plain, expected = train(det, kd(det, losses))
    det.efficient_conv_bn_eval = ['backbone']
    folded, record = train(det, kd(det, losses))
    for one, two in zip(expected.losses, record.losses):
        assert one['loss_hint'] == pytest.approx(two['loss_hint'], rel=1e-3) and two['loss_hint'] > 0
    with pytest.raises(ValueError, match="flattens 'backbone', so that 'backbone.layer3' is not called"):
        train(det, kd(det, dict(loss_hint=dict(type='FitNetLoss', at='backbone.layer3'))))


def test_sync_batch_norm(seg):
    """A teacher config with SyncBN, as most of mmseg's, runs on a CPU; converting the student moves no tap.

    Training a SyncBN student needs a GPU, whoever trains it.
    """
    teacher = teacher_of(seg)
    norm = dict(type='SyncBN', requires_grad=True)
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        teacher['model'][part]['norm_cfg'] = norm
    _, record = train(seg, [hook(teacher, KD)])
    assert all(step['loss_kd'] > 0 for step in record.losses)
    model = build_model(load_config(seg.to_dict())[0], 'mmseg')
    student = convert_sync_batchnorm(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules())
    Distiller(student, teacher, dict(loss_hint=dict(type='FitNetLoss', at='backbone')), teacher_ckpt='random')


# ------------------------------------------------------------------------------------ data


def test_sizes_that_change_every_step(det):
    det.train_dataloader.dataset.pipeline[2] = dict(
        type='RandomChoiceResize', scales=[(64, 64), (96, 96), (160, 128)], keep_ratio=False)
    det.train_cfg.max_iters, det.train_dataloader.batch_size = 4, 1
    shapes = []

    class Sizes(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            shapes.append(tuple(max(image.shape[side] for image in data_batch['inputs']) for side in (1, 2)))

    _, record = train(det, [*kd(det, dict(CWD, loss_fgd=dict(type='FGDLoss', at='neck'))), Sizes()])
    assert len(set(shapes)) > 1
    assert all(step['loss_cwd'] > 0 and step['loss_fgd'] > 0 for step in record.losses)


def test_batch_of_different_sizes(coco_root, tmp_path):
    """Images of one batch that are padded by different amounts: the teacher sees the same padded frame."""
    root = write_coco(tmp_path / 'mixed', images=4, size=(64, 96), empty=0)
    more = write_coco(tmp_path / 'more', images=4, size=(80, 64), empty=0)
    cfg = detector(root, tmp_path)
    first = copy.deepcopy(cfg.train_dataloader.dataset)
    first.pipeline = [step for step in first.pipeline if step['type'] != 'Resize']
    second = copy.deepcopy(first)
    second.data_root = str(more)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[first, second])
    cfg.train_dataloader.batch_size, cfg.train_dataloader.sampler.shuffle = 8, False
    _, record = train(cfg, kd(cfg, dict(CWD, loss_fgd=dict(type='FGDLoss', at='neck'))))
    assert all(step['loss_cwd'] > 0 and step['loss_fgd'] > 0 for step in record.losses)


def test_persistent_workers(det):
    _, expected = train(det, kd(det))
    det.train_dataloader.num_workers, det.train_dataloader.persistent_workers = 2, True
    runner, record = train(det, kd(det))
    assert record.losses[0]['loss_cwd'] == pytest.approx(expected.losses[0]['loss_cwd'], rel=1e-6)
    runner.train_dataloader._iterator = None  # ends the workers


def test_multi_branch_data_are_refused(det):
    """Of models that are no semi-supervised detectors of the host; those are in test_branches.py."""
    det.model.data_preprocessor = dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=det.model.data_preprocessor)
    with pytest.raises(ValueError, match=r'multi-branch data .* are supported for semi-supervised detectors'):
        train(det, [hook(teacher_of(det), CWD)])


def test_branches_of_a_model_that_has_none(det):
    with pytest.raises(ValueError, match='branches= is for semi-supervised detectors of mmdet'):
        train(det, [hook(teacher_of(det), CWD, branches='sup')])


# ------------------------------------------------------------------------------------ killed


KILLED = '''
import sys
sys.path[:0] = {tests!r}
import conftest, os, signal, torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from stock import make_runner

put = LocalBackend.put
def half(self, obj, filepath):
    if 'iter_4' in str(filepath):
        with open(filepath, 'wb') as stream:
            stream.write(obj[:len(obj) // 2])
            stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, obj, filepath)
LocalBackend.put = half
cfg = Config.fromfile({config!r})
make_runner(cfg, cfg.custom_hooks).train()
'''


def test_killed_in_the_middle_of_a_save(det, tmp_path):
    """The half-written file is not what a resume starts from; the resumed run ends like an uncut one."""
    det.train_cfg.max_iters, det.default_hooks.checkpoint.interval = 6, 2
    losses = dict(loss_mgd=dict(type='MGDLoss', at='neck', adapter=dict(type='ConvAdapter', always=True)))
    cut = copy.deepcopy(det)
    cut.work_dir = str(tmp_path / 'cut')
    cut.custom_hooks = kd(cut, losses)
    path = tmp_path / 'cut.py'
    cut.dump(path)
    script = tmp_path / 'killed.py'
    tests = [str(Path(__file__).resolve().parents[1] / name) for name in ('helpers', '')]
    script.write_text(KILLED.format(tests=tests, config=str(path)))
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    work = Path(cut.work_dir)
    broken = next(work.glob('iter_4.pth*'))
    with pytest.raises(Exception):  # noqa: B017
        torch.load(broken, weights_only=False)
    assert (work / 'last_checkpoint').read_text().strip().endswith('iter_2.pth')
    cut.resume = True
    resumed, _ = train(cut, cut.custom_hooks)
    whole, _ = train(det, kd(det, losses))
    assert resumed.iter == whole.iter == 6
    assert same(weights(resumed), weights(whole))
    extras = [distill_hook(runner).distiller.terms.state_dict() for runner in (resumed, whole)]
    assert same(*extras)


def test_a_killed_teacher_leaves_no_trace(det):
    """A KeyboardInterrupt inside the teacher's forward: nothing of ours stays on the student."""
    runner = make_runner(det, kd(det))

    class Stop(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            distiller = distill_hook(runner).distiller
            distiller.teacher.run = self.stop

        @staticmethod
        def stop(*_, **__):
            raise KeyboardInterrupt

    runner.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    distiller = distill_hook(runner).distiller
    assert not any('forward' in vars(module) for module in runner.model.modules())
    assert not any(tap.fired for tap in distiller.current.taps.values())
    assert isinstance(runner, Runner) and isinstance(distill_hook(runner), DistillHook)
    assert isinstance(distiller.teacher, Teacher)


# ------------------------------------------------------------------------------------------------ auxiliary heads


def test_an_auxiliary_head_is_a_tap_with_a_weight_of_its_own(seg):
    """Its logits are compared in the one pass, and the loss trains that head and what it reads, not the other head."""
    seg.train_cfg.max_iters = 1
    seg.optim_wrapper.optimizer = dict(type='SGD', lr=1.0)
    seg.model.decode_head.dropout_ratio = seg.model.auxiliary_head.dropout_ratio = 0.0
    found = {}
    for weight in (1.0, 0.4):
        losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='auxiliary_head.conv_seg', loss_weight=weight))
        before = {}
        hooks = kd(seg, losses, task_loss_weight=0)
        runner = make_runner(seg, hooks)
        runner.register_hook(Start(before))
        runner.train()
        moved = {key for key, value in weights(runner).items() if not torch.equal(value, before[key])}
        found[weight] = runner.message_hub.get_scalar('train/loss_kd').current()
        names = {key for key, _ in runner.model.named_parameters()}
        assert {'auxiliary_head.conv_seg.weight', 'backbone.layer3.0.downsample.0.weight'} <= moved
        assert not any(key.startswith(('decode_head', 'backbone.layer4')) for key in moved & names)
    assert found[0.4] == pytest.approx(0.4 * found[1.0], rel=1e-5) and found[1.0] > 0
    both = dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'),
                loss_aux=dict(type='SoftmaxKDLoss', at='auxiliary_head.conv_seg', loss_weight=0.4))
    _, record = train(seg, kd(seg, both))
    assert record.losses[0]['loss_kd'] > 0 and record.losses[0]['loss_aux'] == pytest.approx(found[0.4], rel=1e-4)


class Start(Hook):
    """Keeps the weights that the training starts from."""

    def __init__(self, kept):
        self.kept = kept

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.kept.update(weights(runner))
