"""kd_mm: knowledge distillation for MMDetection 3.x and MMSegmentation 1.x.

Importing the package imports neither host.  ``type='kd_mm.DistillHook'`` in a config finds everything else by itself.
In Python ``from kd_mm import DistillHook, Distiller, build`` is the public door.
"""

import importlib
from typing import TYPE_CHECKING, Any, List

__version__ = '0.1.0'

if TYPE_CHECKING:
    from kd_mm.engine.distiller import Distiller
    from kd_mm.engine.hook import DistillHook
    from kd_mm.engine.vis import DistillVisHook
    from kd_mm.registry import build

__all__ = ['DistillHook', 'DistillVisHook', 'Distiller', '__version__', 'build']
_DOOR = {'DistillHook': 'kd_mm.engine.hook', 'DistillVisHook': 'kd_mm.engine.vis',
         'Distiller': 'kd_mm.engine.distiller', 'build': 'kd_mm.registry'}


def __getattr__(name: str) -> Any:
    if name in _DOOR:
        return getattr(importlib.import_module(_DOOR[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
