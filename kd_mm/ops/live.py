"""Bytes of tensors, counted by what is made and not by a device: the same number on every machine."""

import weakref
from typing import Any, Set

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """How many bytes the tensors made inside hold together, now (``held``) and at most (``peak``).

    What a graph keeps for its backward pass is held.  Scratch space of single operations is not seen.

    Example:
        >>> import torch
        >>> with LiveBytes() as bytes_of:
        ...     total = (torch.zeros(256) + 1).sum()
        >>> bytes_of.peak, bytes_of.held
        (2048, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: Set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and _key(leaf) not in given and _key(leaf) not in self._known:
                storage, key = leaf.untyped_storage(), _key(leaf)
                self._known.add(key)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return output

    def _freed(self, key: int, size: int) -> None:
        self.held -= size
        self._known.discard(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
