"""Stock configs of the hosts, narrowed by overrides, for the tests of the hook.

Every config starts from a file that the installed host ships; nothing is replaced but widths, depths, data and
schedule.
"""

import copy
import importlib
import importlib.util
import json
import sys
import uuid
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from conftest import write_cityscapes, write_coco
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.zoo import zoo_config

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
NORM = dict(type='BN', requires_grad=True)
#: A config file: the stock FCN-D8, narrow.
NARROW_FCN = f'''
_base_ = {str(zoo_config('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'))!r}
norm = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(depth=18, base_channels=8, stem_channels=8, norm_cfg=norm),
    decode_head=dict(in_channels=64, channels=16, norm_cfg=norm),
    auxiliary_head=dict(in_channels=32, channels=16, norm_cfg=norm))
'''


def _backbone(base: int, depth: int, **extra: Any) -> Dict[str, Any]:
    return dict(depth=depth, base_channels=base, stem_channels=base, init_cfg=None, frozen_stages=-1, norm_eval=False,
                **extra)


def widths(base: int, depth: int):
    return [base * (4 if depth >= 50 else 1) * 2**stage for stage in range(4)]


def retinanet_model(base: int = 8, depth: int = 18, neck: int = 16, classes: int = 2) -> Dict[str, Any]:
    return dict(
        backbone=_backbone(base, depth),
        neck=dict(in_channels=widths(base, depth), out_channels=neck),
        bbox_head=dict(num_classes=classes, in_channels=neck, feat_channels=neck, stacked_convs=1))


def coco_data(root: Any, batch: int = 4) -> Dict[str, Any]:
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]
    dataset = dict(_delete_=True, type='CocoDataset', data_root=str(root), ann_file='annotations.json',
                   data_prefix=dict(img='images/'), metainfo=dict(classes=('square', 'disc')), pipeline=pipeline,
                   filter_cfg=None)
    test = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
    loader = dict(batch_size=batch, num_workers=0, persistent_workers=False)
    evaluator = dict(ann_file=str(root) + '/annotations.json', metric='bbox', format_only=False)
    return dict(
        train_dataloader=dict(dataset=dataset, **loader),
        val_dataloader=dict(dataset=dict(dataset, test_mode=True, pipeline=test), **loader),
        test_dataloader=dict(dataset=dict(dataset, test_mode=True, pipeline=test), **loader),
        val_evaluator=evaluator, test_evaluator=evaluator)


def cityscapes_data(root: Any, batch: int = 4) -> Dict[str, Any]:
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    test = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    dataset = dict(data_root=str(root), pipeline=pipeline, img_suffix='_leftImg8bit.png')
    prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    loader = dict(batch_size=batch, num_workers=0, persistent_workers=False)
    return dict(
        train_dataloader=dict(dataset=dict(dataset, data_prefix=prefix), **loader),
        val_dataloader=dict(dataset=dict(dataset, data_prefix=prefix, pipeline=test), **loader),
        test_dataloader=dict(dataset=dict(dataset, data_prefix=prefix, pipeline=test), **loader))


def merge(cfg: Config, *overrides: Dict[str, Any]) -> Config:
    for override in overrides:
        cfg.merge_from_dict(copy.deepcopy(override))
    return cfg


def detector(root: Any, work_dir: Any, steps: int = 2, by_epoch: bool = False, **model: Any) -> Config:
    """RetinaNet on the test's COCO data, two SGD steps; by iteration unless ``by_epoch`` (then ``steps`` epochs)."""
    cfg = Config.fromfile(str(zoo_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')))
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.batch_sampler = None
    merge(cfg, dict(model=retinanet_model(**model)), coco_data(root))
    return finish(cfg, work_dir, steps, by_epoch)


def segmentor(root: Any, work_dir: Any, steps: int = 2, base: int = 8, depth: int = 18, classes: int = 19) -> Config:
    """FCN-D8 with an auxiliary head on the test's Cityscapes data; by iteration, as all of mmseg."""
    cfg = Config.fromfile(str(zoo_config('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py')))
    width = widths(base, depth)
    merge(cfg, dict(
        norm_cfg=NORM,
        model=dict(
            pretrained=None,
            data_preprocessor=dict(size=(64, 64)),
            backbone=dict(type='ResNetV1c', depth=depth, base_channels=base, stem_channels=base, norm_cfg=NORM),
            decode_head=dict(in_channels=width[3], channels=16, num_classes=classes, norm_cfg=NORM),
            auxiliary_head=dict(in_channels=width[2], channels=16, num_classes=classes, norm_cfg=NORM))),
          cityscapes_data(root))
    if depth < 50:
        cfg.model.backbone.dilations = (1, 1, 2, 4)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    return finish(cfg, work_dir, steps, False)


def finish(cfg: Config, work_dir: Any, steps: int, by_epoch: bool) -> Config:
    cfg.train_cfg = (dict(type='EpochBasedTrainLoop', max_epochs=steps, val_interval=steps + 1) if by_epoch
                     else dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps + 1))
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.param_scheduler = []
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
    cfg.default_hooks = dict(
        timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
        param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook'),
        checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=steps))
    cfg.log_processor = dict(type='LogProcessor', window_size=1, by_epoch=by_epoch)
    cfg.auto_scale_lr = None
    cfg.randomness = dict(seed=7)
    cfg.work_dir = str(work_dir)
    cfg.load_from, cfg.resume = None, False
    cfg.log_level = 'WARNING'
    return cfg


def with_evaluation(cfg: Config, root: Any) -> Config:
    """Give a detector's config its validation and test loops back."""
    data = coco_data(root)
    for kind, loop in (('val', 'ValLoop'), ('test', 'TestLoop')):
        loader = copy.deepcopy(data[f'{kind}_dataloader'])
        loader['dataset'].pop('_delete_')
        cfg[f'{kind}_dataloader'] = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False), drop_last=False)
        cfg[f'{kind}_evaluator'] = dict(type='CocoMetric', **data[f'{kind}_evaluator'])
        cfg[f'{kind}_cfg'] = dict(type=loop)
    return cfg


def teacher_of(cfg: Config, **model: Any) -> Dict[str, Any]:
    """A wider teacher for :func:`detector`: the same config, other widths."""
    teacher = dict(model=copy.deepcopy(cfg.model.to_dict()), default_scope=cfg.default_scope)
    merged = Config(teacher)
    merged.merge_from_dict(dict(model=model))
    return merged.to_dict()


def wide(cfg: Config) -> Dict[str, Any]:
    """A teacher of half as many channels more in the backbone and in the neck."""
    return teacher_of(cfg, **retinanet_model(base=12, neck=24))


def hook(teacher: Any, losses: Dict[str, Any], **extra: Any) -> Dict[str, Any]:
    return dict(type='kd_mm.DistillHook', teacher=teacher, losses=losses,
                teacher_ckpt=extra.pop('teacher_ckpt', 'random'), **extra)


def labels_hook(teacher: Any, labels: Any, losses: Any = None, **extra: Any) -> Dict[str, Any]:
    entry = dict(type='kd_mm.DistillHook', labels=labels, losses=losses, **extra)
    if 'teachers' not in extra:
        entry.update(teacher=teacher, teacher_ckpt=extra.get('teacher_ckpt', 'random'))
    return entry


def make_runner(cfg: Config, hooks: Optional[list] = None) -> Runner:
    cfg = copy.deepcopy(cfg)
    # The Runner of the forks writes its config as text, which objects have none of.
    objects = [hook for hook in hooks or () if not is_plain(hook)]
    if hooks is not None:
        cfg.custom_hooks = [hook for hook in hooks if is_plain(hook)]
    # Loggers and visualizers are global by name: a second Runner of the process would write to the first one's files.
    cfg.experiment_name = f'test_{uuid.uuid4().hex}'
    cfg.visualizer.name = cfg.experiment_name
    runner = Runner.from_cfg(cfg)
    for hook in objects:
        runner.register_hook(hook)
    return runner


def is_plain(value) -> bool:
    """Whether a config can be written as text."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


class Recorder(Hook):
    """Keeps what a test wants to see of every step: the logged losses and the learning rates of all groups."""

    priority = 'VERY_LOW'

    def __init__(self, look=None):
        self.losses, self.rates, self.seen, self.look = [], [], [], look

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({key: float(value) for key, value in outputs.items()})
        if self.look is not None:
            self.seen.append(self.look(runner))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append([group['lr'] for group in runner.optim_wrapper.optimizer.param_groups])


def train(cfg: Config, hooks: Optional[list] = None, look=None):
    """Train with ``hooks`` as custom hooks; the Runner and a :class:`Recorder`."""
    runner, recorder = make_runner(cfg, hooks or []), Recorder(look)
    runner.register_hook(recorder)
    runner.train()
    return runner, recorder


def loss_step(student, distiller, shape=(64, 64)):
    """The losses of one training forward with the distiller attached."""
    return losses_of(student.train(), distiller, student.data_preprocessor(synthetic_batch(student, 2, shape), True))


def losses_of(student, distiller, data):
    """The losses of one forward on a batch, of which some heads rewrite the samples."""
    distiller.attach()
    try:
        return student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()


def traces(model):
    """Everything that a guest could leave on a model."""
    return {name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks),
                   len(module._backward_hooks), len(module._forward_hooks_always_called),
                   len(module._forward_hooks_with_kwargs), module.training)
            for name, module in model.named_modules()}, {
                name: (parameter.requires_grad, len(parameter._backward_hooks or ()),
                       len(getattr(parameter, '_post_accumulate_grad_hooks', None) or ()))
                for name, parameter in model.named_parameters()}


def learned(student, teacher):
    """The gradients that are not 0, by parameter, and the student without them; the teacher must have none."""
    grads = {key: parameter.grad.clone() for key, parameter in student.named_parameters()
             if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    student.zero_grad()
    return grads


def without_objects(data):
    """A copy of a batch whose images have no objects."""
    data = copy.deepcopy(data)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    return data


def distill_hook(runner: Runner) -> Any:
    return next(hook for hook in runner.hooks if type(hook).__name__ == 'DistillHook')


def weights(runner: Runner) -> Dict[str, Any]:
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


def same(first: Dict[str, Any], second: Dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


#: Scripts of tools/ whose code is a sub-command.
COMMANDS = dict(check_config='check', list_taps='taps', measure='profile', train='train', test='test',
                export_student='export')


def real_pictures(root: Any) -> str:
    """A folder of photographs where the real sets lie beside the checkout, else of the COCO files of the tests."""
    real = TOOLS.parents[1] / 'shared' / 'data' / 'coco128' / 'val2017'
    return str(real if real.is_dir() else Path(root) / 'images')


def tool(name):
    """A command line below tools/ as a module, or that of the sub-command behind it."""
    if name in COMMANDS:
        return importlib.import_module(f'kd_mm.lab.commands.{COMMANDS[name]}')
    path = next(path for folder in ('', 'studies', 'dev') if (path := TOOLS / folder / f'{name}.py').is_file())
    for folder in (TOOLS, path.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))  # tools/test.py takes the shared parts from tools/train.py
    spec = importlib.util.spec_from_file_location(f'kd_mm_tool_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_stock_coco(root):
    """COCO's own layout and categories, so that nothing but the data root of a stock config changes."""
    from mmdet.datasets import CocoDataset
    root = Path(root)
    (root / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        source = write_coco(root / 'raw', images=4, seed=len(split))
        (source / 'images').rename(root / split)
        content = json.loads((source / 'annotations.json').read_text())
        content['categories'] = [dict(id=index, name=name)
                                 for index, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


def write_stock_cityscapes(root):
    root = Path(write_cityscapes(root, images=4))
    for kind in ('leftImg8bit', 'gtFine'):
        (root / kind / 'val').symlink_to(root / kind / 'train')
    return root


def det_config():
    """The stock RetinaNet config, narrow and with small images."""
    cfg = Config.fromfile(str(zoo_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')))
    cfg.merge_from_dict({
        'model': retinanet_model(classes=80), 'train_cfg.max_epochs': 1,
        'model.test_cfg.score_thr': 0.0,  # two steps teach nothing, and without any box there is no metric
        'train_dataloader.dataset.pipeline.2.scale': (64, 64), 'val_dataloader.dataset.pipeline.1.scale': (64, 64),
        'test_dataloader.dataset.pipeline.1.scale': (64, 64)})
    return cfg


def seg_config(tmp):
    """The stock FCN config, narrow and with small crops."""
    cfg = Config.fromfile(str(zoo_config('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py')))
    cfg.model = segmentor(tmp, tmp).model
    cfg.merge_from_dict({
        'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 2,
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (64, 64), 'test_dataloader.dataset.pipeline.1.scale': (64, 64)})
    return cfg
