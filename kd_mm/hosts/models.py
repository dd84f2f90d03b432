"""Configs, models and weights of the hosts."""

import copy
import os
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from mmengine.registry import MODELS as ENGINE_MODELS
from torch import nn

from kd_mm.hosts.zoo import zoo_config, zoo_weights

_TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}


def task_of(model: nn.Module) -> Optional[str]:
    """``'detection'``, ``'segmentation'`` or None, by the host that a model's class comes from."""
    for base in type(model).__mro__:
        host = base.__module__.split('.')[0]
        if host in _TASKS:
            return _TASKS[host]
    return None


def load_config(source: Any) -> Tuple[Config, str, Optional[str]]:
    """Config of a teacher, a name for messages, and the path of its file.

    Args:
        source: path of a config file, ``mmdet::`` or ``mmseg::`` name of an installed one, a config or a dict; a dict
            is a whole config (with ``model``) or that of the model alone (with ``type``).

    Raises:
        FileNotFoundError: no such file or installed config.
        ValueError: not a config of a model.
    """
    if isinstance(source, str):
        path = str(zoo_config(source)) if '::' in source else os.path.expanduser(source)
        if not os.path.isfile(path):
            raise FileNotFoundError(f'teacher config {source!r} does not exist (looked at {os.path.abspath(path)})')
        cfg, name, found = Config.fromfile(path), source, path
    elif isinstance(source, (Config, dict)):
        content = source if isinstance(source, Config) else Config(copy.deepcopy(dict(source)))
        cfg = Config(dict(model=content.to_dict())) if 'type' in content and 'model' not in content else content
        name, found = f'the given {cfg.get("model", {}).get("type", "config")}', source.get('filename', None)
    else:
        raise ValueError(f'teacher={source!r} is neither a path, a config name such as '
                         "'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', nor a config dict")
    if not cfg.get('model') or 'type' not in cfg.model:
        raise ValueError(f'teacher config {name} has no `model` with a `type`')
    return cfg, name, found


def default_weights(path: Optional[str]) -> Optional[str]:
    """URL of the published weights of a teacher config; None if there are none.

    Not its ``load_from``, which is where its own training started.
    """
    return zoo_weights(path) if path else None


def _without_pretrained(value: Any) -> Any:
    """A model config that asks for no download: the teacher's own checkpoint makes it needless."""
    if isinstance(value, dict):
        cleaned = {key: _without_pretrained(item) for key, item in value.items() if key != 'pretrained'}
        if isinstance(cleaned.get('init_cfg'), dict) and cleaned['init_cfg'].get('type') == 'Pretrained':
            cleaned['init_cfg'] = None
        return cleaned
    if isinstance(value, (list, tuple)):
        return type(value)(_without_pretrained(item) for item in value)
    return value


def build_model(cfg: Config, scope: Optional[str], pretrained: bool = False) -> Any:
    """Build the model of a config under its own scope, without pretrained weights unless they are asked for."""
    model_cfg = copy.deepcopy(cfg.model.to_dict() if hasattr(cfg.model, 'to_dict') else cfg.model)
    model_cfg = model_cfg if pretrained else _without_pretrained(model_cfg)
    if cfg.get('data_preprocessor') and 'data_preprocessor' not in model_cfg:
        model_cfg['data_preprocessor'] = copy.deepcopy(dict(cfg.data_preprocessor))
    scope = cfg.get('default_scope') or scope or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        # Two-stage detectors read their config by attribute (train_cfg.rpn).
        return ENGINE_MODELS.build(ConfigDict(model_cfg))


def class_names(cfg: Optional[Config], checkpoint: Optional[Dict[str, Any]] = None) -> Optional[List[str]]:
    """Class names of a model: from the checkpoint's data set description, else from its config's data set."""
    meta = (checkpoint or {}).get('meta', {}).get('dataset_meta') or {}
    names = meta.get('classes') or meta.get('CLASSES') or (checkpoint or {}).get('meta', {}).get('CLASSES')
    dataset: Any = cfg.get('train_dataloader', {}).get('dataset') if cfg is not None else None
    while names is None and cfg is not None and hasattr(dataset, 'get'):
        names = (dataset.get('metainfo') or {}).get('classes')
        if names is None and dataset.get('type') and not dataset.get('dataset'):
            found = dataset['type']
            if isinstance(found, str):
                with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
                    found = registry.get(found)
            names = getattr(found, 'METAINFO', {}).get('classes')
        dataset = dataset.get('dataset')
    return list(names) if names and not isinstance(names, str) else None
