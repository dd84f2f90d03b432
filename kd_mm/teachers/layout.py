"""Channels last, and operators that do not know of it or are slow with it.

Operators of a host's own library read memory in the order of (N, C, H, W), whatever the strides of a tensor say: with
the channels innermost some give wrong numbers (modulated deformable convolutions, RoIAlign), others refuse.  Their
modules get usual maps, and what comes after them gets the channels innermost again.  So do convolutions of single
channels with large holes (:func:`kd_mm.teachers.maps.far`) on a CPU.
"""

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kd_mm.hosts.swap import swapped
from kd_mm.teachers.maps import far, laid_out, to_innermost, to_usual

#: Packages whose modules are such operators.
PACKAGES = ('mmcv.ops.', )


def operators(model: nn.Module) -> List[nn.Module]:
    """The modules of a model, or of a class derived from one, that want usual maps."""
    return [module for module in model.modules()
            if any(cls.__module__.startswith(PACKAGES) for cls in type(module).__mro__)]


def slow(model: nn.Module) -> List[nn.Module]:
    """The convolutions of a model that are slow with the channels innermost."""
    return [module for module in model.modules() if far(module)]


@contextmanager
def usual_in(modules: List[nn.Module]) -> Iterator[None]:
    """The modules get maps in the usual layout inside, and give them with the channels innermost if they got such."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(swapped(module, 'forward', usual(module.forward)))
        yield


def usual(original: Any) -> Any:
    """A function of maps that gets them in the usual layout, and gives its own as it was given them."""
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        output = original(*tree_map(_contiguous, args), **tree_map(_contiguous, kwargs))
        innermost = any(laid_out(tensor) and not tensor.is_contiguous() for tensor in given)
        return to_innermost(output) if (
            innermost and isinstance(output, Tensor) and output.dim() == 4) else output

    return forward


def _contiguous(item: Any) -> Any:
    return to_usual(item) if isinstance(item, Tensor) and item.dim() == 4 else item
