"""Configs, models and weights of the hosts."""

import copy
import os
from typing import Any, Dict, List, Optional, Set, Tuple

from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, DefaultScope
from mmengine.registry import MODELS as ENGINE_MODELS
from torch import nn

from kd_mm.hosts.files import find, places, read_file
from kd_mm.hosts.packages import require
from kd_mm.hosts.renamed import hint
from kd_mm.hosts.table import class_host, host_of_config
from kd_mm.hosts.zoo import zoo_config, zoo_weights


def task_of(model: nn.Module) -> Optional[str]:
    """``'detection'``, ``'segmentation'`` or None, by the host that a model's class comes from."""
    host = class_host(model)
    return None if host is None else host.task


def ignored_label(model: Any) -> int:
    """The label that a segmentor's own loss leaves out: ``ignore_index`` of its head (of the last one), or 255.

    Example:
        >>> ignored_label(nn.Identity())
        255
    """
    head = getattr(model, 'decode_head', None)
    if isinstance(head, (nn.ModuleList, list, tuple)):
        head = head[-1] if len(head) else None
    found = getattr(head, 'ignore_index', None)
    return found if isinstance(found, int) else 255


def scope_of_config(cfg: Any) -> Optional[str]:
    """Registry scope of a config: its ``default_scope``, else that of the host of its model's class.

    Configs with classes instead of names (``read_base()``) have no default scope.  Names below such a class, which are
    defaults in the host's code, are found in the scope of the host only.

    Example:
        >>> scope_of_config(dict(default_scope='mmseg')), scope_of_config(dict(model=dict(type='mmdet.RetinaNet')))
        ('mmseg', 'mmdet')
        >>> scope_of_config(dict(model=dict(type='RetinaNet')))
    """
    if cfg.get('default_scope'):
        return str(cfg.get('default_scope'))
    found = host_of_config(cfg)
    return None if found is None else found.scope


def load_config(source: Any, folder: Optional[str] = None) -> Tuple[Config, str, Optional[str]]:
    """Config of a teacher, a name for messages, and the path of its file.

    Args:
        source: path of a config file, name of an installed one (``mmdet::...``), a config or a dict; a dict
            is a whole config (with ``model``) or that of the model alone (with ``type``).
        folder: where a relative path is looked for after the current folder: that of the config which names it.

    Raises:
        FileNotFoundError: no such file or installed config.
        PackageError: a package that the config imports is not installed.
        ValueError: not a config, or not of a model.
    """
    if isinstance(source, (str, os.PathLike)):
        source = os.fspath(source)
        path = str(zoo_config(source)) if '::' in source else find(source, folder)[0] or ''
        if not os.path.isfile(path):
            rule = 'not' if folder is None else 'then'
            raise FileNotFoundError(f'teacher config {source!r} does not exist (looked at '
                                    f'{" and ".join(places(source, folder))}; a relative path is taken from the '
                                    f'current folder, {rule} from that of the config){hint(source)}')
        cfg, name, found = read_file(path, f'teacher config {source}'), source, path
    elif isinstance(source, (Config, dict)):
        content = source if isinstance(source, Config) else Config(copy.deepcopy(dict(source)))
        cfg = Config(dict(model=content._cfg_dict)) if 'type' in content and 'model' not in content else content
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
        init = cleaned.get('init_cfg')
        if isinstance(init, (list, tuple)):
            cleaned['init_cfg'] = [part for part in init if not _is_pretrained(part)]
        elif _is_pretrained(init):
            cleaned['init_cfg'] = None
        return cleaned
    if isinstance(value, (list, tuple)):
        return type(value)(_without_pretrained(item) for item in value)
    return copy.deepcopy(value)


def _is_pretrained(init_cfg: Any) -> bool:
    """Whether a part of ``init_cfg`` loads a file: its type is a name, the path of a class, or the class itself."""
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.split('.')[-1] in ('Pretrained', 'PretrainedInit')


def build_model(cfg: Config, scope: Optional[str], pretrained: bool = False) -> Any:
    """Build the model of a config under its own scope, without pretrained weights unless they are asked for.

    Raises:
        PackageError: a part of it needs a package that is not installed.
    """
    require(cfg.model, f'the model {cfg.model.get("type")}')
    # No to_dict(): it writes classes as text, which no registry finds.
    model_cfg = copy.deepcopy(cfg.model) if pretrained else _without_pretrained(cfg.model)
    if cfg.get('data_preprocessor') and 'data_preprocessor' not in model_cfg:
        model_cfg['data_preprocessor'] = copy.deepcopy(dict(cfg.data_preprocessor))
    scope = scope_of_config(cfg) or scope or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        # Two-stage detectors read their config by attribute (train_cfg.rpn).
        return ENGINE_MODELS.build(ConfigDict(model_cfg))


def start_counters() -> None:
    """Set the counters that some heads read from the Runner's log (YOLOv6 its epoch), where no Runner has yet."""
    hub = MessageHub.get_current_instance()
    for key in ('iter', 'epoch'):
        if hub.get_info(key) is None:
            hub.update_info(key, 0)


def class_names(cfg: Optional[Config], checkpoint: Optional[Dict[str, Any]] = None,
                counted: bool = True) -> Optional[List[str]]:
    """Class names of a model: from the checkpoint's data set description, else from its config's data set.

    Args:
        cfg: of the model.
        checkpoint: its file.
        counted: take the names that a data set has by itself only if the model has as many classes: who changes the
            head of an installed config alone does not mean COCO's.
    """
    meta = (checkpoint or {}).get('meta', {})
    names = classes_of(meta.get('dataset_meta')) or meta.get('CLASSES')
    if not names and cfg is not None:
        names = _classes_of_config(cfg, (cfg.get('train_dataloader') or {}).get('dataset'), counted)
    return as_names(names) if names else None


def classes_of(metainfo: Any) -> Any:
    """The class names in the ``metainfo`` of a data set; None where there are none.

    mmdet's ``ConcatDataset`` has a list of them where those of its parts differ: the names then are what all have.

    Example:
        >>> classes_of(dict(classes=('disc', ), palette=None)), classes_of([dict(classes=('disc', )), dict(classes=())])
        (('disc',), None)
    """
    parts = metainfo if isinstance(metainfo, (list, tuple)) else [metainfo or {}]
    found = [part.get('classes') or part.get('CLASSES') for part in parts]
    same = all(bool(names) and as_names(names) == as_names(found[0]) for names in found)
    return found[0] if found and same else None


def _classes_of_config(cfg: Config, dataset: Any, counted: bool) -> Any:
    """The class names of a data set in a config, of a wrapper those inside; None where they are not known."""
    if not hasattr(dataset, 'get'):
        return None
    names = (dataset.get('metainfo') or {}).get('classes')
    if names is not None:
        return names
    several = dataset.get('datasets')
    if isinstance(several, (list, tuple)) and several and not dataset.get('dataset'):
        return classes_of([dict(classes=_classes_of_config(cfg, part, counted)) for part in several])
    if inner_dataset(dataset) is not None or not dataset.get('type'):
        return _classes_of_config(cfg, inner_dataset(dataset), counted)
    found = dataset['type']
    if isinstance(found, str):
        with DATASETS.switch_scope_and_registry(scope_of_config(cfg)) as registry:
            found = registry.get(found)
    names = (getattr(found, 'METAINFO', None) or {}).get('classes')
    counts = class_counts(cfg.get('model')) if counted else set()
    return names if not counts or len(names or ()) in counts else None


def class_counts(model_cfg: Any) -> Set[int]:
    """Every number of classes in the config of a model; empty where there is none.

    Example:
        >>> class_counts(dict(decode_head=[dict(num_classes=19), dict(num_classes=2)], neck=None)) == {2, 19}
        True
    """
    if isinstance(model_cfg, (list, tuple)):
        return set().union(*map(class_counts, model_cfg))
    if not hasattr(model_cfg, 'values'):
        return set()
    panoptic = [model_cfg.get(f'num_{kind}_classes') for kind in ('things', 'stuff')]
    own = [model_cfg.get('num_classes'), sum(panoptic) if all(isinstance(part, int) for part in panoptic) else None]
    return {count for count in own if isinstance(count, int)}.union(*map(class_counts, model_cfg.values()))


def inner_dataset(dataset: Any) -> Any:
    """The data set that a wrapper in a config holds, the first of several (as the host takes its classes); else None.

    Example:
        >>> inner_dataset(dict(type='ConcatDataset', datasets=[dict(type='A'), dict(type='B')]))
        {'type': 'A'}
    """
    several = dataset.get('datasets')
    return dataset.get('dataset') or (several[0] if isinstance(several, (list, tuple)) and several else None)


def as_names(classes: Any) -> List[str]:
    """``metainfo.classes`` of a data set as a list: a text is a file with a name a line, as for the host, or one name.

    Example:
        >>> as_names(('disc', 'square')), as_names('disc')  # a text is what (('disc')) without a comma is
        (['disc', 'square'], ['disc'])
    """
    if not isinstance(classes, str):
        return list(classes)
    return list_from_file(classes) if os.path.isfile(classes) else [classes]
