"""Adapters: student and teacher features into one space.  Every module of this folder is imported, so that a new file
is enough.
"""

from typing import TYPE_CHECKING, Any

from kd_mm.adapters.auto import auto_adapter
from kd_mm.adapters.base import Adapter
from kd_mm.registry import MODELS, discover

_found = discover(__name__, __path__, MODELS)
globals().update(_found)

__all__ = ['Adapter', 'auto_adapter']
__all__ += sorted(_found)

if TYPE_CHECKING:
    # What is found by name alone, for type checkers.
    def __getattr__(name: str) -> Any: ...
