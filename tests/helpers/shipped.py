"""What the tests of shipped configs and of the README share: a step on synthetic samples, by overrides alone."""

import copy
import functools
import uuid
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from kd_mm.engine import preflight
from kd_mm.engine.hook import DistillHook
from kd_mm.hosts.models import load_config
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.lab import check as inspection
from kd_mm.registry import MODELS

SHAPE = (32, 64)
#: A loss of two models that hardly differ is of this size, and has any sign.
ROUNDING = 1e-6
SAMPLES = {}


@DATASETS.register_module(force=True)
class SyntheticSamples(torch.utils.data.Dataset):
    """Two samples of :func:`synthetic_batch`, put into ``SAMPLES`` once the model exists; the real set's classes."""

    def __init__(self, key, classes):
        self.key, self.metainfo = key, dict(classes=classes)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {name: copy.deepcopy(SAMPLES[self.key][name][index]) for name in ('inputs', 'data_samples')}


#: At most so many of a model's queries, points, proposals and grid cells.
FEWER = {
    'num_queries': 30, 'panoptic_head.num_queries': 30, 'decode_head.num_queries': 30,
    'dn_cfg.group_cfg.num_dn_queries': 10, 'train_cfg.num_points': 512, 'decode_head.train_cfg.num_points': 512,
    'train_cfg.rcnn.sampler.num': 32, 'train_cfg.rpn_proposal.max_per_img': 50, 'test_cfg.rpn.max_per_img': 30,
    'mask_head.num_grids': [10, 9, 6, 4, 3],
}


def kd_index(cfg):
    return next(index for index, hook in enumerate(cfg.custom_hooks) if hook['type'] == 'kd_mm.DistillHook')


def fewer(model):
    """What :data:`FEWER` changes in the config of a model: key -> value."""
    found = {}
    for key, most in FEWER.items():
        *parents, last = key.split('.')
        place = model
        for part in parents:
            place = place.get(part) if isinstance(place, dict) else None
        value = place.get(last) if isinstance(place, dict) else None
        if isinstance(most, int) and isinstance(value, int):
            found[key] = min(most, value)
        elif isinstance(most, list) and isinstance(value, list) and len(value) == len(most):
            found[key] = [min(pair) for pair in zip(most, value)]
    return found


@functools.lru_cache(maxsize=None)
def lighter(teacher):
    """A teacher with fewer proposals, queries and grid cells, a Swin backbone with two blocks a stage, and an encoder
    of two layers; None for others, which are left."""
    found, _, _ = load_config(teacher)
    before = found.to_dict()
    encoder = found.model.get('encoder')
    if encoder is not None and 'num_layers' in encoder:
        encoder.num_layers = 2
    backbone = found.model.get('backbone', {})
    if str(backbone.get('type')).endswith('SwinTransformer'):
        backbone.depths = [2] * len(backbone.depths)
    found.merge_from_dict({f'model.{key}': most for key, most in fewer(found.model).items()})
    return None if found.to_dict() == before else found.to_dict()


def smallest_overrides(cfg, work_dir, shape=SHAPE):
    """Overrides that replace data, downloads and schedule; nothing of the student's architecture."""
    dataset = cfg.train_dataloader.dataset
    if 'datasets' in dataset:  # VOC with its additional labels is two of one kind
        dataset = dataset.datasets[0]
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        own = registry.get(dataset.type).METAINFO
    classes = (dataset.get('metainfo') or {}).get('classes') or own['classes']
    name = f'test_{uuid.uuid4().hex}'
    hook = f'custom_hooks.{kd_index(cfg)}'
    options = {
        'train_dataloader': dict(
            _delete_=True, batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(type='SyntheticSamples', key=name, classes=classes)),
        'val_dataloader': None, 'val_evaluator': None, 'val_cfg': None,
        'test_dataloader': None, 'test_evaluator': None, 'test_cfg': None,
        'default_hooks.checkpoint': None,
        'visualizer': dict(_delete_=True, type='Visualizer', name=name),
        'experiment_name': name, 'work_dir': str(work_dir), 'log_level': 'WARNING',
        'model.backbone.init_cfg': None, 'model.pretrained': None,
    }
    teachers = cfg.custom_hooks[kd_index(cfg)].get('teachers')
    for where, entry in ([(hook, cfg.custom_hooks[kd_index(cfg)])] if teachers is None else
                         [(f'{hook}.teachers.{one}', part) for one, part in teachers.items()]):
        if entry.teacher != 'self':
            options[f'{where}.teacher_ckpt'] = 'random'
    if cfg.model.get('pretrained', 'absent') == 'absent':
        options.pop('model.pretrained')
    options['train_cfg.max_epochs' if 'max_epochs' in cfg.train_cfg else 'train_cfg.max_iters'] = 1
    if (cfg.model.get('data_preprocessor') or {}).get('batch_augments'):  # padding to the full crop
        options['model.data_preprocessor.batch_augments'] = None
    if 'size' in (cfg.model.get('data_preprocessor') or {}):
        options['model.data_preprocessor.size'] = shape
    named = cfg.custom_hooks[kd_index(cfg)].get('teacher')
    teacher = None if named in (None, 'self', 'student') or not isinstance(named, str) else lighter(named)
    if teacher is not None:
        options[f'{hook}.teacher'] = dict(copy.deepcopy(teacher), _delete_=True)
    # How much of everything, not what: proposals, queries and points of a loss.
    for key, most in fewer(cfg.model).items():
        if not key.endswith('num_queries') or teacher is not None:  # as many as the teacher has
            options[f'model.{key}'] = most
    for loss_name, loss in cfg.custom_hooks[kd_index(cfg)].losses.items():
        if 'windows' in (loss.loss_weight if isinstance(loss.get('loss_weight'), dict) else {}):
            options[f'{hook}.losses.{loss_name}.loss_weight.windows'] = [(0, None)]
        if loss.get('pretrain_steps'):  # until then the student gets nothing from it
            options[f'{hook}.losses.{loss_name}.pretrain_steps'] = 0
        learned = getattr(MODELS.get(loss.type), 'learned', None)  # a file that a command of its own writes
        if learned is not None:
            options[f'{hook}.losses.{loss_name}.{learned}'] = 'random'
    return options, name


@contextmanager
def quick_init():
    """Random weights are scaled from a few numbers drawn beforehand: to draw 90 million for each pair takes seconds."""
    drawn = torch.Generator().manual_seed(0)
    pools = dict(uniform_=torch.rand(2**21, generator=drawn).mul_(2).sub_(1),
                 normal_=torch.randn(2**21, generator=drawn))
    own = {name: getattr(torch.Tensor, name) for name in pools}

    def quick(name, tensor, first=0.0, second=1.0, **options):
        if tensor.numel() < 2**12 or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return own[name](tensor, first, second, **options)
        scale, shift = (second, first) if name == 'normal_' else ((second - first) / 2, (second + first) / 2)
        with torch.no_grad():
            for part in tensor.view(-1).split(2**20):
                start = int(torch.randint(0, len(pools[name]) - len(part), (), generator=drawn))
                torch.mul(pools[name][start:start + len(part)], scale, out=part)
            return tensor if shift == 0 else tensor.add_(shift)

    for name in pools:
        setattr(torch.Tensor, name, lambda tensor, *args, name=name, **options: quick(name, tensor, *args, **options))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(torch.Tensor, name, function)


@contextmanager
def small_first_pass():
    """The pass before the training tries smaller pictures first than those of a user."""
    before = preflight.SHAPES
    preflight.SHAPES = ((64, 64), *before)
    try:
        yield
    finally:
        preflight.SHAPES = before


def check_with(cfg, runner, monkeypatch):
    """The report of the check of a config that a Runner has trained, on the models that are built already.

    What the check would build them from must be what the hook was given.
    """
    hook = next(hook for hook in runner.hooks if isinstance(hook, DistillHook))

    def as_built(config, student, arguments, samples):
        assert student is runner.model and arguments == hook.config and samples is None
        return hook.distiller

    monkeypatch.setattr(inspection, 'build_whole', lambda *_: runner.model)
    monkeypatch.setattr(inspection, 'make_distiller', as_built)
    return inspection.check(cfg, SHAPE)


class LookAtStep(Hook):
    """Notes the losses of the step, and the gradient that the distillation terms alone have on the student."""

    def __init__(self, names):
        self.names, self.losses, self.gradients, self.steps = names, {}, {}, 0

    def before_train(self, runner):
        model, parse = runner.model, runner.model.parse_losses

        def parse_losses(losses):
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for name in self.names:
                found = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
                self.gradients[name] = sum(float(part.norm()) for part in found if part is not None)
            return parse(losses)

        model.parse_losses = parse_losses

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps += 1
        self.losses = {name: float(value) for name, value in outputs.items()}


def train_one_step(cfg, work_dir, ignored=True, gradients=True, shape=SHAPE):
    """One real training step of a config, data, downloads and schedule overridden.

    Args:
        ignored: whether segmentation labels have pixels of 255.
        gradients: whether to look at the gradient of each term, for one more backward pass of each.
        shape: of the pictures.

    Returns:
        tuple: the Runner, what :class:`LookAtStep` saw, the names of the distillation losses.
    """
    options, key = smallest_overrides(cfg, work_dir, shape)
    cfg.merge_from_dict(options)
    with quick_init():
        runner = Runner.from_cfg(cfg)
    SAMPLES[key] = synthetic_batch(runner.model, 2, shape)
    for sample in () if ignored else SAMPLES[key]['data_samples']:
        labels = sample.gt_sem_seg.data
        labels[labels == 255] = 0
    beside = cfg.custom_hooks[kd_index(cfg)].get('input_key')
    for sample in SAMPLES[key]['data_samples'] if beside else ():
        sample.set_metainfo({beside: np.full((*sample.img_shape, 3), 90, np.uint8)})
    names = list(cfg.custom_hooks[kd_index(cfg)].losses)
    look = LookAtStep(names if gradients else ())
    runner.register_hook(look)
    try:
        with quick_init(), small_first_pass():
            runner.train()
    finally:
        SAMPLES.pop(key)
    return runner, look, names
