"""Distillation losses, one file a method; every module of this folder is imported, so that a new file is enough.

In the docstrings a mark says where a default or a formula comes from:

- ``[P]``: the paper says so.
- ``[C]``: the code that the authors published says so, or that of the library named beside it (``[C: mmrazor]``).
- ``[recalled]``: from memory of one of the two, and not checked.
- ``[ours]``: neither says it, or what they say does not fit here; it was chosen for this package.
"""

from typing import TYPE_CHECKING, Any

from kd_mm.losses.base.learner import Learner
from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.base.opponent import Opponent
from kd_mm.registry import MODELS, discover

_found = discover(__name__, __path__, MODELS)
globals().update(_found)

__all__ = ['KDLoss', 'Learner', 'Opponent']
__all__ += sorted(_found)

if TYPE_CHECKING:
    # What is found by name alone, for type checkers.
    def __getattr__(name: str) -> Any: ...
