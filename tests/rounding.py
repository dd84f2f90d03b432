"""Arithmetic of another machine: every result that had to be rounded may be off by one unit in the last place."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Rounded the same way everywhere (IEEE 754), or no arithmetic at all although a number among the arguments is rounded.
SAME = {'add', 'sub', 'rsub', 'mul', 'div', 'sqrt', 'reciprocal', 'clamp', 'clamp_min', 'clamp_max', 'fill',
        'masked_fill', 'full_like', 'new_full'}


def floats(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.is_floating_point()]


def widened(value):
    """A copy; float32 as float64."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().double() if value.is_floating_point() else value.detach().clone()


class Rounding(TorchDispatchMode):
    """Inside, sums, products of matrices, exponentials and the like come out as another order or kernel may round them.

    An operation in float32 runs a second time in float64.  Elements that agree are exact, whatever the order of the
    sums, and stay; each other element is multiplied by ``1 + k * 2^-23`` with k of -1, 0 or 1 at random.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = floats((args, kwargs))
        if (func.is_view or torch.Tag.nondeterministic_seeded in func.tags or not inputs
                or any(value.dtype != torch.float32 for value in inputs)
                or func._schema.name.split('::')[1].rstrip('_') in SAME):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(widened, (args, kwargs))  # before an in-place operation changes them
        result, wide = func(*args, **kwargs), func(*wide_args, **wide_kwargs)
        for value, exact in zip(floats(result), floats(wide)):
            moved = value * (1 + torch.randint(-1, 2, value.shape, generator=self.generator) * 2.0**-23)
            value.copy_(torch.where(value.double() == exact, value, moved))
        return result
