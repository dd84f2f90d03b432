"""Bytes of tensors, counted by what is made and not by a device: the same number on every machine."""

import weakref
from typing import Any, Iterator, Set, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
        given = {storage_key(leaf) for leaf in walk((args, kwargs))}
        for leaf in walk(output):
            key = storage_key(leaf)
            if leaf.layout == torch.strided and key not in given and key not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(key)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return output

    def _freed(self, key: int, size: int) -> None:
        self.held -= size
        self._known.discard(key)


def counted(tensor: Tensor) -> Tuple[int, int, int]:
    """Equal as long as this is the same tensor in the same memory, and torch has counted no change of it.

    While it is compared, tensor and memory must be held: what is free again becomes another's, with the same numbers.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> before = counted(weight)
        >>> before == counted(weight), before == counted(weight.add_(1))
        (True, False)
    """
    return id(tensor), tensor.data_ptr(), tensor._version


def walk(value: Any) -> Iterator[Tensor]:
    """Every tensor of a (nested) value, in order: items of tuples and lists, values of dicts.

    ``torch.utils._pytree`` finds the same at several times the cost, which counts where each operation is looked at.

    Example:
        >>> import torch
        >>> [tensor.item() for tensor in walk((torch.tensor(1), [dict(a=torch.tensor(2)), None], 'text'))]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from walk(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from walk(item)


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common; a sparse one shares it with none.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> storage_key(x) == storage_key(x[1:]), storage_key(x) == storage_key(x.clone())
        (True, False)
    """
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
