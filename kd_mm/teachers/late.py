"""A tensor whose convolution has not run yet, so that a residual sum can become part of it.

A residual block computes ``convolution(x)``, then perhaps its shortcut, and then adds the two.  The library adds a
convolution's result into a tensor that is there already, which needs neither a pass over memory nor new memory; so the
convolution has to wait for the shortcut.  Whatever else is done with the tensor makes its convolution run first.
"""

from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device('cpu')
#: What counts as the sum of two tensors.
SUMS = (Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add, Tensor.add_, torch.add)


class Late(Tensor):
    """What a convolution will give.

    Args:
        dtype, shape, device: of the result; of the shape nothing but the result itself is used.
        make: runs the convolution.
        add: runs it with the sum: gets the other tensor, gives the sum or None if it cannot.
        gone: raised where the tensor is used although it is part of a sum.
    """

    @staticmethod
    def __new__(cls, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor],
                add: Callable[[Tensor], Optional[Tensor]], gone: Exception, device: torch.device = CPU) -> 'Late':
        late = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        vars(late).update(_make=make, _add=add, _gone=gone, _value=None, _spent=False)
        return late

    def __init__(self, *args: Any) -> None:
        pass

    def value(self) -> Tensor:
        """The convolution's result.

        Raises:
            FlowChanged: it is part of a sum already.
        """
        own = vars(self)
        if own['_spent']:
            raise own['_gone']
        if own['_value'] is None:
            own['_value'] = own['_make']()
        return own['_value']

    def plus(self, other: Any) -> Optional[Tensor]:
        """The sum as one operation; None where that cannot be."""
        own = vars(self)
        if own['_spent'] or own['_value'] is not None or type(other) is not Tensor:
            return None
        result = own['_add'](other)
        own['_spent'] = result is not None
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SUMS and len(args) == 2 and not kwargs:
            late, other = args if isinstance(args[0], Late) else args[::-1]
            result = late.plus(other)
            if result is not None:
                return result
        return func(*tree_map(_value, args), **tree_map(_value, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_value, args), **tree_map(_value, kwargs or {}))


class Spent(Tensor):
    """A tensor over which a sum was written: whoever uses it again is told."""

    _gone: Exception

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next(vars(leaf)['_gone'] for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Spent))


def spend(tensor: Tensor, gone: Exception) -> Tensor:
    """The same memory as another tensor; the first raises ``gone`` where it is used from now on."""
    result = tensor.detach()
    vars(tensor)['_gone'] = gone
    tensor.__class__ = Spent
    return result


def _value(item: Any) -> Any:
    return item.value() if isinstance(item, Late) else item
