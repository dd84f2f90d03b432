"""Bytes of tensors, counted by what is made and not by a device: the same number on every machine."""

import weakref
from typing import Any, Set

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """How many bytes the tensors made inside hold together, now (``held``) and at most (``peak``).

    What a graph keeps for its backward pass is held.  Scratch space of single operations is not seen, nor are sparse
    tensors.

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
        given = {storage_key(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        for leaf in tree_flatten(output)[0]:
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and (
                    storage_key(leaf) not in given and storage_key(leaf) not in self._known):
                storage, key = leaf.untyped_storage(), storage_key(leaf)
                self._known.add(key)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return output

    def _freed(self, key: int, size: int) -> None:
        self.held -= size
        self._known.discard(key)


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common; a sparse one shares it with none.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> storage_key(x) == storage_key(x[1:]), storage_key(x) == storage_key(x.clone())
        (True, False)
    """
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
