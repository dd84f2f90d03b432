"""The registries of kd_mm and :func:`build`.

Both are children of mmengine's with the scope ``kd_mm``, so a config writes ``type='kd_mm.DistillHook'`` and mmengine
imports this module by itself.  Inside a ``DistillHook`` entry the prefix is not needed: :func:`build` pins the scope.
"""

import difflib
import inspect
from typing import Any, List, Type

from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import Registry

HOOKS = Registry('hook', parent=ENGINE_HOOKS, scope='kd_mm', locations=['kd_mm.hooks'])
MODELS = Registry(
    'model',
    parent=ENGINE_MODELS,
    scope='kd_mm',
    locations=['kd_mm.losses', 'kd_mm.adapters', 'kd_mm.regions', 'kd_mm.schedules'])


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
    unknown = [key for key in arguments if key not in accepted_arguments(cls)]
    if unknown:
        raise ValueError(f'{cls.__name__} got unknown argument(s) {", ".join(map(repr, unknown))}. '
                         f'It accepts: {", ".join(accepted_arguments(cls))}')
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f'{cls.__name__}: {error}. It accepts: {", ".join(accepted_arguments(cls))}') from error
