"""Scores of models on the validation set of one config."""

import copy
import gc
import os.path as osp
import uuid
from typing import Dict, Optional

from mmengine.config import Config
from mmengine.runner import Runner

from kd_mm.engine.score import OTHERS, PRIMARY, nothing_to_find, numbers, primary, sign, span, with_span
from kd_mm.engine.trial import Trial, Wish
from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.weights import load_weights
from kd_mm.lab.data import empty_sets, is_empty

__all__ = ['OTHERS', 'PRIMARY', 'evaluate', 'own_name', 'primary', 'sign', 'span', 'with_span']


def evaluate(cfg: Config, weights: Optional[str], work_dir: str, model: Optional[Config] = None,
             images: Optional[int] = None) -> Dict[str, float]:
    """The metrics of a model on the validation set of ``cfg``, in the Runner's own validation loop.

    Args:
        cfg: config with ``val_dataloader``, ``val_evaluator`` and ``val_cfg``; its training is left out.
        weights: path or URL of a checkpoint; the keys are found as for a teacher.
        work_dir: where the Runner writes its log.
        model: a config whose model is evaluated instead: a teacher's, on the student's data.
        images: only so many of its first images; None for all.

    Raises:
        ValueError: there is no validation in the config, its data have no object, or no weights fit.
    """
    if not all(cfg.get(key) for key in ('val_dataloader', 'val_evaluator', 'val_cfg')):
        raise ValueError('the config has no validation (val_dataloader, val_evaluator, val_cfg)')
    chosen = copy.deepcopy(cfg)
    if model is not None:
        chosen.model = copy.deepcopy(model.model)
        if model.get('data_preprocessor') and 'data_preprocessor' not in chosen.model:
            chosen.model['data_preprocessor'] = copy.deepcopy(model.data_preprocessor)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr',
                'test_dataloader', 'test_evaluator', 'test_cfg'):
        chosen[key] = None
    chosen.custom_hooks, chosen.load_from, chosen.resume = [], None, False
    chosen.work_dir = work_dir
    if model is not None:  # the Runner keeps a copy of the config under the name of its file
        object.__setattr__(chosen, '_filename', osp.join(osp.dirname(str(cfg.filename or '')), 'teacher.py'))
    own_name(chosen)
    try:
        runner = Runner.from_cfg(chosen)
        runner.val_loop  # noqa: B018 (made when it is asked for)
    except ValueError as error:
        if is_empty(error):
            raise ValueError('; '.join(empty_sets(cfg, ('val', )))) from error
        raise
    if weights is not None:
        load_weights(runner.model, ckpt.load(weights), weights, strict=False)
    if images is None:
        metrics = runner.val()
    else:
        runner.model.eval()
        metrics = Trial(runner, Wish(images)).run(runner.model)
    del runner
    gc.collect()
    found = numbers(metrics)
    if nothing_to_find(found):
        raise ValueError('the validation data have no object of the classes of this config, so that nothing can be '
                         'scored (an average precision of -1). Look at val_dataloader: are its classes the names of '
                         'the categories in the annotation file?')
    return found


def own_name(cfg: Config) -> None:
    """A name of its own: the loggers of the host are global, and a second Runner would write into the first's files."""
    cfg.experiment_name = f'kd_mm_{uuid.uuid4().hex}'
    if cfg.get('visualizer'):
        cfg.visualizer['name'] = cfg.experiment_name
