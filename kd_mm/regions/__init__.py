"""Regions: where to imitate.  Every module of this folder is imported, so that a new file is enough."""

from typing import TYPE_CHECKING, Any

from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, discover

_found = discover(__name__, __path__, MODELS)
globals().update(_found)

__all__ = ['RegionMask']
__all__ += sorted(_found)

if TYPE_CHECKING:
    # What is found by name alone, for type checkers.
    def __getattr__(name: str) -> Any: ...
