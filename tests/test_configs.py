"""Every shipped config loads, is documented, names a teacher that exists, and trains one step as it is shipped; the
check of a config says what its training says.

Only overrides touch a config: data, crop size, schedule length, and the downloads (weights of the teacher and of the
backbone).  Widths and depths stay as shipped.
"""

import copy
import functools
import math
import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from detrs import detr_config
from foundation import require
from heads import head_config
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from shipped import ROUNDING, SHAPE, check_with, kd_index, quick_init, train_one_step
from stock import detector, distill_hook, hook, segmentor, teacher_of, train

import kd_mm.losses  # noqa: F401  (registers them)
from kd_mm.hosts.models import build_model
from kd_mm.hosts.zoo import zoo_config, zoo_weights
from kd_mm.lab.check import check
from kd_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for task in ('det', 'seg')
                 for path in (ROOT / 'configs' / task).glob('*/*.py'))
REQUIRED = {
    'configs/det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py',
    'configs/det/fgd/fgd_faster_rcnn_r50_from_r101_2x_coco.py',
    'configs/det/pkd/pkd_retinanet_r50_from_r101_2x_coco.py',
    'configs/det/pkd/pkd_faster_rcnn_r50_from_r101_2x_coco.py',
    'configs/det/pkd/pkd_retinanet_r50_from_fcos_x101_1x_coco.py',
    'configs/det/mgd/mgd_retinanet_r50_from_x101_2x_coco.py',
    'configs/det/cwd/cwd_retinanet_r50_from_x101_2x_coco.py',
    'configs/det/cwd/cwd_rtmdet_s_from_m_300e_coco.py',
    'configs/det/ld/ld_gfl_r50_from_r101_1x_coco.py',
    'configs/det/bckd/bckd_gfl_r50_from_r101_1x_coco.py',
    'configs/det/rm/rm_retinanet_r50_from_r101_2x_coco.py',
    'configs/det/crosskd/crosskd_gfl_r50_from_r101_1x_coco.py',
    'configs/det/crosskd/crosskd_retinanet_r50_from_r101_2x_coco.py',
    'configs/seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes.py',
    'configs/seg/kd/kd_pspnet_r18_from_r101_80k_cityscapes.py',
    'configs/seg/mgd/mgd_pspnet_r18_from_r101_80k_cityscapes.py',
    'configs/seg/fitnet/fitnet_pspnet_r18_from_r101_80k_cityscapes.py',
    'configs/seg/pkd/pkd_pspnet_r18_from_r101_80k_cityscapes.py',
    'configs/seg/cwd/cwd_deeplabv3plus_r18_from_r101_80k_cityscapes.py',
    'configs/seg/cwd/cwd_segformer_b0_from_b4_160k_cityscapes.py',
    'configs/seg/cwd/cwd_deeplabv3plus_mv2_from_r101_80k_cityscapes.py',
    'configs/seg/cwd/cwd_hrnet_w18s_from_w48_80k_ade20k.py',
    'configs/seg/cwd/cwd_hrnet_w18s_from_w48_80k_cityscapes.py',
    'configs/seg/cwd/cwd_pidnet_s_from_l_120k_cityscapes.py',
    'configs/seg/dist/dist_pspnet_r50_from_upernet_swin_b_80k_ade20k.py',
    'configs/seg/kd/kd_pspnet_r18_from_mask2former_swin_s_80k_cityscapes.py',
    'configs/seg/kd/kd_pspnet_r18_from_upernet_swin_b_80k_cityscapes.py',
    'configs/seg/skd_holistic/skd_holistic_pspnet_r18_from_r101_80k_cityscapes.py',
}
#: Sources of teachers that are packages of their own.
FOUNDATION = ('timm', 'transformers', 'mmpretrain')
#: The config that each shipped one extends, by what stands between method and teacher in its file name (and the data,
#: if there are several).
BASES = {
    'faster_rcnn_r50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py',
    'mask_rcnn_r50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py',
    'retinanet_r50': 'mmdet::retinanet/retinanet_r50_fpn_{schedule}_coco.py',
    'gfl_r50': 'mmdet::gfl/gfl_r50_fpn_{schedule}_coco.py',
    'rtmdet_s': 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'deformable_detr_r50': 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino_r50': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'rtmdet_ins_s': 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    'solov2_r50': 'mmdet::solov2/solov2_r50_fpn_1x_coco.py',
    'panoptic_fpn_r50': 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mask2former_r50 panoptic': 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'mask2former_r50': 'mm{task}::mask2former/mask2former_r50_8xb2-{data}.py',
    'pspnet_r18': 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'deeplabv3plus_r18': 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'segformer_b0': 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    'deeplabv3plus_mv2': 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024.py',
    'hrnet_w18s': 'mmseg::hrnet/fcn_hr18s_4xb2-80k_cityscapes-512x1024.py',
    'hrnet_w18s ade20k': 'mmseg::hrnet/fcn_hr18s_4xb4-80k_ade20k-512x512.py',
    'pidnet_s': 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    'pspnet_mv2 ade20k': 'mmseg::mobilenet_v2/mobilenet-v2-d8_pspnet_4xb4-160k_ade20k-512x512.py',
    'pspnet_r50 ade20k': 'mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'pspnet_r50 voc12aug': 'mmseg::pspnet/pspnet_r50-d8_4xb4-20k_voc12aug-512x512.py',
    'segformer_b0 ade20k': 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
}


def load(path):
    return Config.fromfile(str(ROOT / path))


@functools.lru_cache(maxsize=None)
def base_config(path):
    """A config of the host, to be read alone."""
    return Config.fromfile(str(path))


def base_of(path):
    stem = Path(path).stem.removeprefix(f'{Path(path).parent.name}_')
    student, data = stem.partition('_from_')[0], stem.rpartition('_')[2]
    task = 'det' if '/det/' in path else 'seg'
    base = BASES.get(f'{student} {data}') or BASES[student]
    return zoo_config(base.format(
        schedule='1x' if '_1x_' in path else '2x', task=task,
        data='lsj-50e_coco' if task == 'det' else '90k_cityscapes-512x1024'))


def plain(value):
    """Without the scope marks that mmengine leaves in a base found by ``mmdet::``."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_all_required_configs_are_shipped():
    assert set(CONFIGS) >= REQUIRED


@pytest.mark.parametrize('path', CONFIGS)
def test_config_is_sound(path):
    cfg = load(path)
    hook = cfg.custom_hooks[kd_index(cfg)]
    assert all(name.startswith('loss_') for name in hook.losses)
    card = (ROOT / path).parent / 'README.md'
    assert Path(path).name in card.read_text(), f'{card} does not mention {path}'
    for loss in hook.losses.values():
        assert loss.type in MODELS.module_dict or loss.type in card.read_text()

    for entry in (hook.get('teachers') or dict(only=hook)).values():
        if 'teacher_ckpt' not in entry:  # it comes from the student, or trains beside it
            assert entry.teacher == 'self' or entry.teacher.type in ('EMATeacher', 'PeerTeacher')
        elif isinstance(entry.teacher, dict) or not urlparse(entry.teacher_ckpt).scheme:
            # Nothing is downloaded for a foundation model: the card says what to put where, and on which terms.
            assert not urlparse(entry.teacher_ckpt).scheme and entry.teacher_ckpt in card.read_text()
            assert 'licence' in card.read_text() or not isinstance(entry.teacher, dict)
        else:
            _listed(entry, path)
    _is_the_base(path, cfg)


def _listed(entry, path):
    # The teacher is an installed config, and its weights are those that the installed model index lists (the forks'
    # index has the same files on another server).
    listed = zoo_weights(str(base_of(path) if entry.teacher == 'student' else zoo_config(entry.teacher)))
    assert listed and urlparse(listed).path == urlparse(entry.teacher_ckpt).path


def _is_the_base(path, cfg):
    # Nothing of the base is lost: its hooks are there, in order, and so is everything else but what the config adds.
    base = base_config(base_of(path))
    kept = [item['type'] for item in cfg.custom_hooks if item['type'] != 'kd_mm.DistillHook']
    assert kept == [item['type'] for item in base.get('custom_hooks') or []]
    given = plain(cfg['train_dataloader'])
    if cfg.custom_hooks[kd_index(cfg)].get('input_key'):  # its pipeline carries one more picture along
        given['dataset']['pipeline'] = plain(base['train_dataloader']['dataset']['pipeline'])
    assert given == plain(base['train_dataloader'])
    for part in ('model', 'val_dataloader', 'param_scheduler', 'train_cfg', 'default_hooks'):
        assert plain(cfg[part]) == plain(base[part]), part


@functools.lru_cache(maxsize=None)
def keys_of(base):
    """The keys of a checkpoint of a config without distillation."""
    cfg = base_config(base)
    with quick_init():
        return list(build_model(cfg, cfg.default_scope).state_dict())


@pytest.mark.parametrize('path', CONFIGS)
def test_one_training_step(path, tmp_path, monkeypatch):
    cfg = load(path)
    learns_the_task = cfg.custom_hooks[kd_index(cfg)].get('task_loss_weight', 1) != 0
    source = cfg.custom_hooks[kd_index(cfg)].get('teacher')
    if isinstance(source, dict) and source.type in FOUNDATION:
        require(source.type)
    # mmseg 1.2.2 looks up the class weight of the label 255 and fails, with its own PIDNet configs and without us
    # (open-mmlab/mmsegmentation#3734).
    ignored = 'pidnet' not in path
    runner, look, names = train_one_step(cfg, tmp_path, ignored=ignored, gradients=False)

    assert look.steps == 1
    assert all(math.isfinite(value) for value in look.losses.values()), look.losses
    own = any('loss' in name and name not in names for name in look.losses if name != 'loss')
    assert own == learns_the_task
    for name in names:
        adversarial = hasattr(MODELS.get(cfg.custom_hooks[kd_index(cfg)].losses[name].type), 'opponents')
        assert look.losses[name] > -ROUNDING or adversarial, look.losses  # a score has no sign of its own
    assert {name for _, name in distill_hook(runner).distiller.watch.proven} == set(names)  # each had a gradient
    assert list(runner.model.state_dict()) == keys_of(base_of(path))

    report = check_with(cfg, runner, monkeypatch)
    if not ignored:  # the labels of the check have some
        assert f'a training step on random images of {SHAPE[0]}x{SHAPE[1]} fails: ' in report.problems[0]
        return
    assert report.problems == [] and not any('no gradient' in warning for warning in report.warnings)
    assert [term.name for term in report.step.terms] == names
    assert all(0 < term.gradient < math.inf for term in report.step.terms)
    assert report.step.task.keys() == {name for name in look.losses if 'loss' in name and name not in (*names, 'loss')}


def test_rtmdet_stops_with_mosaic():
    """The window ends 20 epochs of COCO before the end, when the base switches its pipeline."""
    cfg = load('configs/det/cwd/cwd_rtmdet_s_from_m_300e_coco.py')
    switch = next(hook for hook in cfg.custom_hooks if hook['type'] == 'PipelineSwitchHook')
    images, processes, per_gpu = 117266, 8, cfg.train_dataloader.batch_size
    epoch = math.ceil(math.ceil(images / processes) / per_gpu)
    window = cfg.custom_hooks[-1].losses.loss_cwd.loss_weight.windows[0]
    assert tuple(window) == (0, -(cfg.train_cfg.max_epochs - switch['switch_epoch']) * epoch)


def test_a_loss_that_looks_at_the_images(tmp_path):
    """TransKD's assistants read the batch itself, which the Distiller hands on."""
    cfg = load('configs/seg/transkd/transkd_segformer_b0_from_b4_160k_cityscapes.py')
    cfg.custom_hooks[kd_index(cfg)].losses.loss_transkd.embedding = 'assistant'
    _, look, _ = train_one_step(cfg, tmp_path)
    assert look.losses['loss_transkd'] > 0 and look.gradients['loss_transkd'] > 0


# --------------------------------------------------------------- what is not shipped: check and training agree


def own(cfg, losses, teacher=None, **extra):
    """``cfg`` with a hook of its own."""
    cfg.custom_hooks = [hook(teacher_of(cfg) if teacher is None else teacher, losses, **extra)]
    return cfg


def mask_former():
    cfg = Config.fromfile(str(zoo_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')))
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None),
        panoptic_head=dict(
            in_channels=[8, 16, 32, 64], num_queries=10, pixel_decoder=dict(encoder=dict(num_layers=1)),
            transformer_decoder=dict(num_layers=2)),
        data_preprocessor=dict(batch_augments=None), train_cfg=dict(num_points=64))))
    return cfg


def one_channel(cfg):
    """A segmentor of two classes that gives one sigmoid score."""
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(num_classes=2, out_channels=1, threshold=0.3,
                    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    return cfg


def with_wrapper(cfg, kind, **more):
    cfg.optim_wrapper = dict(type=kind, optimizer=SGD, **more)
    return cfg


def grey(cfg):
    """A student of grey pictures; the teacher, made before, is one of colour."""
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    cfg.merge_from_dict(dict(model=dict(data_preprocessor=dict(mean=[114.0], std=[57.0], bgr_to_rgb=False),
                                        backbone=dict(in_channels=1))))
    return cfg


def peer(cfg, **extra):
    return dict(type='PeerTeacher', config=teacher_of(cfg), **extra)


CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', adapter=dict(type='ConvAdapter', always=True)))
KD = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits'))
AMP, SGD = 'AmpOptimWrapper', dict(type='SGD', lr=0.01)
FLOAT16 = 'PeerTeacher: loss scaling .AmpOptimWrapper in float16. is not supported'
#: Name -> what makes the config of a narrow detector ``d`` or segmentor ``s``, and what both refuse, if they do.
AGREE = {
    'peer': (lambda d, s: own(d, {**CWD, **KD}, peer(d)), None),
    'peer with an optimizer that is none': (
        lambda d, s: own(d, KD, peer(d, optim_wrapper=dict(optimizer=dict(type='SGDD', lr=0.1)))),
        'PeerTeacher: the optimizer of the peer .*, made from its own optim_wrapper, cannot be built'),
    'peer in float16': (lambda d, s: own(d, KD, peer(d, optim_wrapper=dict(type=AMP, optimizer=SGD))), FLOAT16),
    'peer in float16, by class': (
        lambda d, s: own(d, KD, peer(d, optim_wrapper=dict(type=AmpOptimWrapper, optimizer=SGD))), FLOAT16),
    'peer in the float16 of the student': (
        lambda d, s: own(with_wrapper(d, AMP, dtype='float16'), KD, peer(d)), FLOAT16),
    'peer in the bfloat16 of the student': (
        lambda d, s: own(with_wrapper(d, AmpOptimWrapper, dtype=torch.bfloat16), KD, peer(d)), None),
    'mean teacher': (lambda d, s: own(d, CWD, dict(type='EMATeacher')), None),
    'losses of heads': (lambda d, s: own(head_config('gfl'), {
        f'loss_{kind}': dict(type=kind, at='bbox_head')
        for kind in ('LDLoss', 'GOLSDLoss', 'BCKDLoss', 'CrossKDLoss')}), None),
    'rank mimicking': (lambda d, s: own(d, dict(loss_rm=dict(type='RMLoss', at='bbox_head'))), None),
    'queries': (lambda d, s: own(detr_config('dino'), {
        f'loss_{kind}': dict(type=kind, at='bbox_head') for kind in ('KDDETRLoss', 'DETRDistillLogitsLoss')}), None),
    'masks of queries': (lambda d, s: own(mask_former(), dict(
        loss_masks=dict(type='MaskQueryLoss', at='panoptic_head'))), None),
    'one channel': (lambda d, s: own(one_channel(s), dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits'))),
                    'the softmax over one class is always 1'),
    'mixed precision': (lambda d, s: own(with_wrapper(d, AMP, dtype='bfloat16'), {**CWD, **KD}), None),
    'accumulation': (lambda d, s: own(with_wrapper(s, 'OptimWrapper', accumulative_counts=2), dict(
        loss_game=dict(type='SKDHolisticLoss', at='@logits'))), None),
    'grey student': (lambda d, s: own(grey(d), CWD, teacher_of(d)), None),
    'without the own losses': (lambda d, s: own(d, CWD, task_loss_weight=0), None),
    'folded norms': (lambda d, s: own(Config({**d, 'efficient_conv_bn_eval': ['backbone']}), CWD), None),
    'folded norms at a tap': (
        lambda d, s: own(Config({**d, 'efficient_conv_bn_eval': ['backbone']}), dict(
            loss_hint=dict(type='FitNetLoss', at='backbone.layer3'))), "efficient_conv_bn_eval flattens 'backbone'"),
    'a tap inside of a checkpoint of mmengine': (
        lambda d, s: own(Config({**d, 'activation_checkpointing': ['backbone']}), dict(
            loss_hint=dict(type='FitNetLoss', at='backbone.layer3'))), "activation_checkpointing runs 'backbone'"),
    'folding what is not there': (
        lambda d, s: own(Config({**d, 'efficient_conv_bn_eval': ['nothing']}), CWD), 'nothing'),
    'an optimizer that is none': (lambda d, s: own(with_wrapper(d, 'OptimWraper'), CWD), 'OptimWraper'),
    'a seed that is text': (lambda d, s: own(d, CWD, seed='a'), "seed='a' must be a whole number"),
}


@pytest.mark.parametrize('name', AGREE)
def test_check_and_training_agree(coco_root, cityscapes_root, tmp_path, monkeypatch, name):
    # mmengine refuses mixed precision without an accelerator, although torch has it on the CPU.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    make, refusal = AGREE[name]
    cfg = make(detector(coco_root, tmp_path / 'det'), segmentor(cityscapes_root, tmp_path / 'seg'))
    random_samples = cfg.train_dataloader.dataset.data_root not in (str(coco_root), str(cityscapes_root))
    report = check(copy.deepcopy(cfg), SHAPE if random_samples else (64, 64))
    names = list(cfg.custom_hooks[0].losses)
    if refusal is not None:
        with pytest.raises(Exception, match=refusal) as caught:
            train(cfg, cfg.custom_hooks)
        assert any(re.search(refusal, problem) for problem in report.problems), report.problems
        if not isinstance(caught.value, KeyError):  # a registry's own words, before the hook is asked
            text = str(caught.value)
            assert all(problem in text or text in problem for problem in report.problems), (text, report.problems)
        return
    assert report.problems == [] and not any('no gradient' in warning for warning in report.warnings), report.warnings
    assert all(term.gradient > 0 for term in report.step.terms)
    if random_samples:
        _, look, _ = train_one_step(cfg, tmp_path)
        losses, gradients = [look.losses], look.gradients
    else:
        runner, record = train(cfg, cfg.custom_hooks)
        losses, gradients = record.losses, {key[1]: 1.0 for key in distill_hook(runner).distiller.watch.proven
                                            if key[0] == 'student'}
    assert all(math.isfinite(value) for step in losses for value in step.values())
    assert all(gradients[name] > 0 for name in names)
