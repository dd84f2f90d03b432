"""``kd-mm pretrain``: a student's backbone learns from a teacher on a plain folder of pictures, before any label."""

import os
import os.path as osp
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import click
import torch
from mmengine.config import Config, ConfigDict

from kd_mm.hosts.checkpoint import load_file, state_dict_of
from kd_mm.hosts.files import read_file
from kd_mm.hosts.pictures import check_readable, find_pictures
from kd_mm.hosts.table import Host, host_of_config
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.commands import train as training
from kd_mm.lab.commands.distill import quiet
from kd_mm.lab.commands.evaluate import own_name
from kd_mm.lab.commands.init import WRITTEN, write_new
from kd_mm.lab.configs import hook_entries, read_config
from kd_mm.lab.logs import last_checkpoint
from kd_mm.ops.words import count
from kd_mm.teachers.spec import RANDOM

#: How a teacher that is no config is written: its kind, then the values of these keys.
KINDS: Dict[str, Tuple[str, ...]] = {
    'timm': ('name', ), 'transformers': ('config', ), 'torch.hub': ('repo', 'name'), 'mmpretrain': ('config', )}
#: Parts of a student that can be trained, and the place that names each.
PARTS = dict(backbone='@backbone', neck='@neck')
#: Files whose first bytes are looked at before the training; of more, each is looked at when it is read.
MOST_FILES = 50_000


def teacher_of(text: str) -> Any:
    """What ``--teacher`` says, as the hook takes it.

    Args:
        text: ``timm:NAME``, ``transformers:FOLDER``, ``torch.hub:FOLDER:NAME``, ``mmpretrain:CONFIG``; a Python file
            with ``teacher = dict(type=...)``; or a config of the host.

    Raises:
        ValueError: a kind without its values, or no such file.

    Example:
        >>> teacher_of('timm:vit_small_patch14_dinov2')
        {'type': 'timm', 'name': 'vit_small_patch14_dinov2'}
    """
    kind, _, rest = text.partition(':')
    if kind in KINDS and not rest.startswith(':'):
        keys = KINDS[kind]
        values = rest.rsplit(':', len(keys) - 1) if rest else []
        if len(values) != len(keys) or not all(values):
            raise ValueError(f'--teacher {text}: write {kind}:' + ':'.join(key.upper() for key in keys))
        paths = {'repo', 'config'}
        return dict(type=kind, **{key: osp.abspath(osp.expanduser(value)) if key in paths and osp.exists(
            osp.expanduser(value)) else value for key, value in zip(keys, values)})
    if '::' in text:
        return text
    path = osp.abspath(osp.expanduser(text))
    if not osp.isfile(path):
        raise ValueError(f'--teacher {text}: no such config (looked at {path}). A foundation model is written '
                         + ', '.join(f'{name}:{":".join(key.upper() for key in keys)}' for name, keys in KINDS.items())
                         + ", or as a Python file with teacher = dict(type='timm', ...)")
    content = read_file(path, f'--teacher {text}')
    return content.teacher.to_dict() if 'teacher' in content and 'model' not in content else path


def pipeline(host: Host, size: Tuple[int, int]) -> List[Dict[str, Any]]:
    """Transforms of a host for pictures without labels: a random scale, crop and flip."""
    height, width = size
    scope = host.parent or host.scope  # a host that builds on another one packs by its transforms
    keys = ('img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    return [dict(type='LoadImageFromFile'),
            dict(type='RandomResize', scale=(width, height), ratio_range=(0.75, 2.0), keep_ratio=True),
            dict(type=f'{scope}.RandomCrop', crop_size=size),
            dict(type=f'{scope}.RandomFlip', prob=0.5),
            dict(type=f'{scope}.{host.pack}', meta_keys=keys)]


def make_config(student: str, teacher: Any, weights: Optional[str], images: str, part: str, size: Tuple[int, int],
                batch: int, iters: int, lr: float, workers: int, scratch: bool) -> Config:
    """The config of the pre-training: the student's model, everything else new.

    Raises:
        FileNotFoundError, ValueError: the student's config is wrong.
    """
    cfg = read_config(student)
    if hook_entries(cfg):
        raise ValueError(f'{student} distils already. Give the plain config of the student')
    found = host_of_config(cfg)
    assert found is not None  # read_config has looked
    if found.host.batch is not None:
        raise ValueError(f'{student}: the data preprocessors of {found.host.scope} take labelled batches alone, and '
                         'pictures have no labels. Pre-train the backbone in a config of another host')
    model: Any = cfg.model
    if part == 'neck' and not model.get('neck'):
        raise ValueError(f'{student} has no neck: take --part backbone')
    backbone = model.get('backbone') or {}
    for key, value in (('frozen_stages', -1), ('norm_eval', False)):
        if key in backbone:  # all of it learns
            backbone[key] = value
    if scratch:
        model.pop('pretrained', None)
        backbone['init_cfg'] = None
    data = model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if data.get('size') is not None:
        data['size'] = size
    if data.get('batch_augments'):
        data['batch_augments'] = None
    warm = iters // 20
    new: Dict[str, Any] = dict(
        default_scope=found.scope, model=model,
        train_dataloader=dict(
            batch_size=batch, num_workers=workers, persistent_workers=workers > 0, drop_last=True,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dict(type='kd_mm.ImageFolder', root=osp.abspath(osp.expanduser(images)),
                         pipeline=pipeline(found.host, size))),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters + 1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05),
                           clip_grad=dict(max_norm=3.0)),
        param_scheduler=[
            *([dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm)] if warm else []),
            dict(type='CosineAnnealingLR', by_epoch=False, begin=warm, end=iters, eta_min=lr / 100)],
        default_hooks=dict(
            timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
            param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook'),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max(1, iters // 10), max_keep_ckpts=2)),
        log_processor=dict(by_epoch=False), log_level='INFO', randomness=dict(seed=0), resume=False, load_from=None,
        custom_hooks=[dict(
            type='kd_mm.DistillHook', teacher=teacher, teacher_ckpt=weights, task_loss_weight=0,
            losses=dict(loss_pretrain=loss_of(part, teacher)))])
    for key in ('env_cfg', 'custom_imports'):
        if cfg.get(key):
            new[key] = cfg[key]
    if 'data_preprocessor' in cfg and 'data_preprocessor' not in model:
        model['data_preprocessor'] = data
    return Config(ConfigDict(new))


def loss_of(part: str, teacher: Any) -> Dict[str, Any]:
    """The cosine of every cell, after a linear layer on the student.

    A foundation model gives one map unless it is told otherwise: it teaches the last stage of a backbone, and every
    level of a neck.  A teacher with levels of its own is paired level by level.
    """
    loss: Dict[str, Any] = dict(type='DSILoss', student_at=PARTS[part], teacher_at=PARTS[part], loss_weight=1.0,
                                adapter=dict(type='ConvAdapter', always=True))
    kind = teacher.get('type') if hasattr(teacher, 'get') else None
    if kind in KINDS and not teacher.get('out_indices'):
        loss['levels'] = dict(student=[-1], teacher=[-1])
        loss['teacher_at'] = '@backbone'
    return loss


def all_levels(cfg: Config) -> None:
    """Let one map of a foundation model teach every level of the student's neck."""
    levels = int(cfg.model.neck.get('num_outs') or len(cfg.model.neck.get('in_channels', (0, ))))
    loss = cfg.custom_hooks[0].losses.loss_pretrain
    if 'levels' in loss:
        loss.levels = dict(student=list(range(levels)), teacher=[-1] * levels)


def save_parts(folder: str, run: str, part: str, what: Dict[str, Any]) -> str:
    """The trained parts of the last checkpoint of a run alone, as a plain file in ``folder``; its path.

    Raises:
        ValueError: there is no checkpoint.
    """
    latest = last_checkpoint(run)
    if latest is None:
        raise ValueError(f'{run} has no checkpoint after the training')
    names = ('backbone', 'neck') if part == 'neck' else ('backbone', )
    state = {key: value for key, value in state_dict_of(load_file(latest)).items() if key.split('.')[0] in names}
    path = osp.join(folder, 'pretrained.pth')
    torch.save(dict(meta=what, state_dict=state), f'{path}.part')
    os.replace(f'{path}.part', path)
    return path


@click.command('pretrain')
@click.argument('student')
@click.option('--teacher', required=True, help='timm:NAME, transformers:FOLDER, torch.hub:FOLDER:NAME, '
              'mmpretrain:CONFIG, a Python file with teacher = dict(type=...), or a config of the host.')
@click.option('--teacher-ckpt', help="File of the teacher's weights; random for a dry try.")
@click.option('--images', required=True, help='Folder of pictures, in it or below.')
@click.option('--part', type=click.Choice(list(PARTS)), default='backbone', show_default=True,
              help='What learns: the backbone, or backbone and neck.')
@click.option('--size', type=click.IntRange(32), nargs=2, default=(448, 448), show_default=True,
              help='Height and width of the crops.')
@click.option('--batch', type=click.IntRange(1), default=16, show_default=True, help='Pictures a step.')
@click.option('--iters', type=click.IntRange(1), default=10000, show_default=True, help='Steps.')
@click.option('--lr', type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True, help='Learning rate.')
@click.option('--workers', type=click.IntRange(0), default=2, show_default=True, help='Processes that read pictures.')
@click.option('--from-scratch', is_flag=True, help="Random weights at the start, not those that the student's config "
              'names.')
@click.option('--work-dir', help='Folder of everything. Default: work_dirs/STUDENT_pretrained.')
@click.option('--resume', is_flag=True, help='Continue in the work dir.')
@click.option('--overwrite', is_flag=True, help='Start anew in a work dir that has checkpoints.')
@click.argument('flags', nargs=-1, type=click.UNPROCESSED)
def command(student: str, teacher: str, teacher_ckpt: Optional[str], images: str, part: str, size: Tuple[int, int],
            batch: int, iters: int, lr: float, workers: int, from_scratch: bool, work_dir: Optional[str], resume: bool,
            overwrite: bool, flags: Sequence[str]) -> None:
    """Train the backbone of STUDENT without labels: it learns the features of a teacher on a folder of pictures.

    What comes out, pretrained.pth, is where an ordinary training starts. After -- come flags of kd-mm train, such as
    --amp.
    """
    try:
        paths = find_pictures(images)
        check_readable(paths[:MOST_FILES], images)
        if len(paths) < batch:
            raise ValueError(f'{images} has {count(len(paths), "picture")} and a step takes {batch}: give a smaller '
                             '--batch')
        source = teacher_of(teacher)
        weights = teacher_ckpt
        if weights not in (None, RANDOM) and '://' not in str(weights):
            weights = osp.abspath(osp.expanduser(str(weights)))
        cfg = make_config(student, source, weights, images, part, size, batch, iters, lr, workers, from_scratch)
        if part == 'neck':
            all_levels(cfg)
        stem = re.sub(r'\W', '_', Path(student.split('::')[-1]).stem)
        folder = work_dir or osp.join('work_dirs', f'{stem}_pretrained')
        training.check_folder(folder)
        path = osp.join(folder, 'pretrain.py')
        run = osp.join(folder, 'training')  # where the Runner writes its own copy of the config
        write_new(path, f'{WRITTEN} pretrain.\n{cfg.pretty_text}', overwrite, ours=last_checkpoint(run) is None)
        words = ['--work-dir', run, *(['--resume'] if resume else []), *(['--overwrite'] if overwrite else [])]
        args = training.parse_args([path, *words, *flags])
        click.echo(f'{count(len(paths), "picture")}; {part} of {student} learns from {teacher}; log and checkpoints: '
                   f'{run}')
        trained = training.load_config(args)
        own_name(trained)
        with quiet():
            training.train(trained, args)
        out = save_parts(folder, run, part, dict(student=student, teacher=teacher, part=part, iterations=iters))
    except REFUSALS as error:
        fail(error)
    click.echo(f'{out}: {part}. Start an ordinary training from it with\n'
               f'  --cfg-options load_from={out} model.backbone.init_cfg=None\n'
               f"or in the config: backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={out!r}, "
               "prefix='backbone.'))")
