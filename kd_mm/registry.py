"""The registries of kd_mm and :func:`build`.

``HOOKS``, ``MODELS``, ``DATASETS`` and ``TRANSFORMS`` are children of mmengine's registries with the scope ``kd_mm``:
for ``type='kd_mm.DistillHook'`` in a config mmengine imports this module by itself.  Inside a ``DistillHook`` entry the
prefix is not needed, because :func:`build` sets the scope.  ``TEACHERS`` is ours alone.
"""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any, Dict, Iterable, List, Type

from mmengine.registry import DATASETS as ENGINE_DATASETS
from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import TRANSFORMS as ENGINE_TRANSFORMS
from mmengine.registry import Registry

HOOKS = Registry('hook', parent=ENGINE_HOOKS, scope='kd_mm', locations=['kd_mm.engine.hook', 'kd_mm.engine.vis'])
MODELS = Registry(
    'model',
    parent=ENGINE_MODELS,
    scope='kd_mm',
    locations=['kd_mm.losses', 'kd_mm.adapters', 'kd_mm.regions', 'kd_mm.ops.schedules', 'kd_mm.teachers.labels'])

DATASETS = Registry('dataset', parent=ENGINE_DATASETS, scope='kd_mm', locations=['kd_mm.hosts.pictures'])
TRANSFORMS = Registry('transform', parent=ENGINE_TRANSFORMS, scope='kd_mm', locations=['kd_mm.hosts.transforms'])

#: Where teachers come from, see :mod:`kd_mm.teachers.sources`: a class or function that is called with a TeacherSpec.
TEACHERS = Registry('teacher', scope='kd_mm', locations=['kd_mm.teachers.sources'])

#: Small sets of losses by name, see :mod:`kd_mm.lab.recipes`.
RECIPES = Registry('recipe', scope='kd_mm', locations=['kd_mm.lab.recipes'])

#: The packages whose models are distilled, see :mod:`kd_mm.hosts.table`.
HOSTS = Registry('host', scope='kd_mm', locations=['kd_mm.hosts.known'])


def discover(package: str, path: Iterable[str], registry: Registry) -> Dict[str, Type]:
    """Import every module of a folder, in the order of their names, and collect the classes that they register.

    For the ``__init__`` of a folder whose files a user's config names; adding a file is all that a new one needs.

    Args:
        package: its ``__name__``.
        path: its ``__path__``.
        registry: where the classes are.

    Returns:
        Name of the class -> class, for every registered class that is defined in the folder or below.
    """
    for module in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        importlib.import_module(f'{package}.{module.name}')
    return {cls.__name__: cls for cls in registry.module_dict.values() if cls.__module__.startswith(f'{package}.')}


def choices(base: Type) -> List[str]:
    """Names of the registered classes that derive from ``base``, sorted."""
    MODELS.import_from_location()
    return sorted(name for name, cls in MODELS.module_dict.items() if issubclass(cls, base))


def accepted_arguments(cls: Type) -> List[str]:
    """Keyword arguments of a class, in the order of its signature."""
    return [name for name in inspect.signature(cls).parameters if name != 'self']


def build(cfg: Any, base: Type = object, what: str = 'component', **extra: Any) -> Any:
    """Build a loss, adapter, region or schedule of kd_mm from its config.

    Works on plain dicts with no Runner and no model::

        build(dict(type='CWDLoss', tau=1.0, loss_weight=5.0))(student, teacher, batch)

    Args:
        cfg: A dict with ``type`` (name with or without ``kd_mm.``, or a class) and the arguments; or an instance of
            ``base``, which is returned as it is.
        base: Class that the result must derive from.
        what: Word for the error message, such as ``'loss'``.
        **extra: Arguments added to those of ``cfg``.

    Raises:
        KeyError: ``type`` is missing or names no registered class; the choices are listed.
        ValueError: an argument is unknown or has a bad value; the accepted ones are listed.
    """
    if base is not object and isinstance(cfg, base):
        return cfg
    if not hasattr(cfg, 'get') or 'type' not in cfg:
        raise KeyError(f'a {what} is a dict with `type`, not {cfg!r}. Choices: {", ".join(choices(base))}')
    arguments = {key: value for key, value in cfg.items() if key != 'type'}
    arguments.update(extra)
    cls = cfg['type']
    if isinstance(cls, str):
        name = cls[len('kd_mm.'):] if cls.startswith('kd_mm.') else cls
        names = choices(base)
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f' Did you mean {close[0]!r}?' if close else ''
            raise KeyError(f'unknown {what} type {name!r}.{hint} Choices: {", ".join(names)}')
        cls = MODELS.module_dict[name]
    elif not callable(cls):
        raise KeyError(f'a {what} is a dict with `type`, a name or a class, not {cls!r}. Choices: '
                       f'{", ".join(choices(base))}')
    if isinstance(cls, type) and not issubclass(cls, base):
        raise KeyError(f'{cls.__name__} is no {what}. Choices: {", ".join(choices(base))}')
    unknown = [key for key in arguments if key not in accepted_arguments(cls)]
    if unknown:
        raise ValueError(f'{cls.__name__} got unknown argument(s) {", ".join(map(repr, unknown))}. '
                         f'It accepts: {", ".join(accepted_arguments(cls))}')
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f'{cls.__name__}: {error}. It accepts: {", ".join(accepted_arguments(cls))}') from error
