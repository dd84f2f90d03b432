"""Pairs for the sub-commands that take two configs: small ones with real data, as files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from click.testing import CliRunner
from mmengine.config import Config
from stock import cityscapes_data, detector, segmentor, teacher_of, with_evaluation

from kd_mm.hosts.models import build_model
from kd_mm.lab.commands.app import cli
from kd_mm.ops.modes import preserved_random_state


def kd_mm(*words: Any) -> Any:
    """The result of ``kd-mm WORDS``."""
    return CliRunner().invoke(cli, list(map(str, words)), prog_name='kd-mm')


def message(result: Any) -> str:
    """What a command printed, and what it ended with."""
    return f'{result.output}\n{result.exception or ""}'


def save_weights(cfg: Any, path: Path, classes: Any = None) -> str:
    with preserved_random_state(3):
        model = build_model(cfg, cfg.get('default_scope'))
        model.init_weights()
    meta = dict(dataset_meta=dict(classes=classes)) if classes else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def detection_pair(folder: Path, root: Any, steps: int = 2) -> Any:
    """``student``, ``teacher`` (wider neck and head) and ``weights`` of it, as paths."""
    cfg = with_evaluation(detector(root, folder / 'work', steps=steps), root)
    cfg.model.test_cfg.score_thr = 0.0  # two steps teach nothing, and without any box there is no metric
    return as_files(folder, cfg, dict(neck=dict(out_channels=24), bbox_head=dict(in_channels=24, feat_channels=24)))


def segmentation_pair(folder: Path, root: Any, steps: int = 2) -> Any:
    cfg = segmentor(root, folder / 'work', steps=steps)
    loader = dict(cityscapes_data(root)['val_dataloader'], sampler=dict(type='DefaultSampler', shuffle=False))
    loader['dataset'] = dict(loader['dataset'], type='CityscapesDataset')
    cfg.val_dataloader, cfg.val_cfg = loader, dict(type='ValLoop')
    cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return as_files(folder, cfg, dict(decode_head=dict(channels=24), auxiliary_head=dict(channels=24)))


def as_files(folder: Path, cfg: Config, change: Any) -> Any:
    """A config and a teacher of it with a changed model, as files, and weights of the teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg.work_dir = None
    cfg.dump(str(folder / 'small.py'))
    teacher = Config(dict(teacher_of(cfg, **change), train_dataloader=cfg.train_dataloader))
    teacher.dump(str(folder / 'big.py'))
    return SimpleNamespace(student=str(folder / 'small.py'), teacher=str(folder / 'big.py'), cfg=cfg,
                           weights=save_weights(teacher, folder / 'big.pth'))
