"""Labels from teachers, ``labels=`` of the hook; every module here is imported, so that a new file is enough."""

from kd_mm.registry import MODELS, discover
from kd_mm.teachers.labels.base import Labeller

_found = discover(__name__, __path__, MODELS)
globals().update(_found)

__all__ = ['Labeller']
__all__ += sorted(_found)
