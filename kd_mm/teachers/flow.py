"""Which convolution feeds which norm and nothing else: found by watching one forward pass, never by names.

A pair is proven when, in a pass of the whole model,

- the norm was given the very tensor that the convolution had returned,
- no operation took that tensor or a view of it before the norm did,
- nobody held it any more at the first operation after the norm, so that nothing could use it later,
- and both modules ran once.

In the same way it is found which attentions return weights, averaged over the heads, that nobody looks at.

The activation after the norm belongs to the pair in the same way: it was given the very tensor that the norm had
returned, and nothing took that before; if it works in place, later uses are of its own result.  An activation may also
follow a convolution or a linear layer at once.

A sum may stand between the norm and the activation (a residual block).  It belongs to the pair if the other tensor was
used by nothing after it and nobody held it at the end of the pass: then the sum may be written over it.
"""

import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from kd_mm.hosts.swap import swapped
from kd_mm.ops.live import storage_key, walk
from kd_mm.teachers.kernels import ACTIVATIONS, Layer

#: Sums of two tensors, as they reach the processor.
SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Pair:
    """A layer, the norm that alone takes its output, and the activation that alone takes the norm's.

    Attributes:
        conv, norm, activation: the modules. ``activation`` may be None, and so may ``norm``, where the activation
            follows a layer (a linear one, too) at once.
        name: path of the layer.
        stride: of the output in pixels of the input, rounded.
        summed: whether another tensor, of which nothing else is left, is added before the activation.
    """

    conv: Layer
    norm: Optional[_BatchNorm]
    activation: Optional[nn.Module]
    name: str
    stride: int
    summed: bool = False


def unhooked(module: nn.Module) -> bool:
    """Whether nothing but the module's own forward happens when it is called."""
    return not (module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


@lru_cache(maxsize=None)
def _class_of_layers(kind: Any) -> bool:
    """Whether a class does what ``torch.nn.Conv2d`` or ``torch.nn.Linear`` does, and nothing else.

    The hosts' wrappers of both handle empty batches, which torch does by itself.
    """
    wrapper = (kind.__module__, kind.__name__)
    if issubclass(kind, nn.Conv2d):
        return kind._conv_forward is nn.Conv2d._conv_forward and (
            kind.forward is nn.Conv2d.forward or wrapper == ('mmcv.cnn.bricks.wrappers', 'Conv2d'))
    return issubclass(kind, nn.Linear) and (
        kind.forward is nn.Linear.forward or wrapper == ('mmcv.cnn.bricks.wrappers', 'Linear'))


def plain_layer(module: Any) -> bool:
    """Whether a module is a convolution or a linear layer as torch has it, with weights that are simply there.

    An old-style weight norm is a hook.  Asked in every pass: somebody may change the module meanwhile.
    """
    kind: Any = type(module)
    return _class_of_layers(kind) and unhooked(module) and 'parametrizations' not in module._modules


def plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that in eval mode is one multiplication and one addition a channel."""
    return (isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
            and not module.training and module.running_mean is not None and module.running_var is not None
            and unhooked(module))


def plain_attention(module: nn.Module) -> bool:
    """Whether a module is ``torch.nn.MultiheadAttention``, and nothing else."""
    return isinstance(module, nn.MultiheadAttention) and (
        type(module).forward is nn.MultiheadAttention.forward) and unhooked(module)


def plain_activation(module: nn.Module) -> bool:
    """Whether a module is one of :data:`ACTIVATIONS`, and nothing else."""
    return type(module) in ACTIVATIONS and unhooked(module)


class _Sum:
    """The sum of a norm's output and another tensor, whose memory is ``other`` as long as somebody holds it."""

    def __init__(self, other: Tensor):
        self.other, self.key = weakref.ref(other.untyped_storage()), storage_key(other)


class _Made:
    """A tensor that a watched module (or a sum) has returned."""

    def __init__(self, maker: Any, tensor: Tensor):
        self.maker, self.ref = maker, weakref.ref(tensor)
        self.taken = False  # by the module that may take it


class Flow(TorchDispatchMode):
    """Watches one pass of a model, see the module's docstring.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: Dict[nn.Module, int] = {}
        self.next: Dict[Any, Any] = {}
        self.size: Dict[nn.Module, Tuple[int, int]] = {}
        self.refused: Set[Any] = set()
        #: sums whose other tensor is wanted later; and those where that is not known yet.
        self.held: Set[_Sum] = set()
        self._open: List[_Sum] = []
        self.weighing: Dict[nn.MultiheadAttention, None] = {}
        self._made: Dict[int, _Made] = {}
        self._inside: Optional[_Made] = None

    @contextmanager
    def watching(self) -> Iterator['Flow']:
        """The model's convolutions, norms and activations are watched inside."""
        with ExitStack() as stack:
            for module in self.names:
                if any(plain(module) for plain in (plain_layer, plain_norm, plain_activation)):
                    stack.enter_context(swapped(module, 'forward', self._watched(module)))
                elif plain_attention(module):
                    stack.enter_context(swapped(module, 'forward', self._weighing(module)))
            stack.enter_context(self)
            yield self
            self._settle()
            self.held.update(self._open)

    def _watched(self, module: nn.Module) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls[module] = self.calls.get(module, 0) + 1
            given = None
            if not isinstance(module, (nn.Conv2d, nn.Linear)) and len(args) == 1 and isinstance(args[0], Tensor):
                given = self._given(module, args[0])
            self._inside = given
            try:
                output = original(*args, **kwargs)
            finally:
                self._inside = None
            if given is not None:
                self.next[given.maker] = module
                if output is args[0]:  # in place: what is used later is this module's own result
                    self._made.pop(storage_key(output), None)
                else:
                    given.taken = True
            if isinstance(output, Tensor) and type(module) not in ACTIVATIONS:
                if output.dim() == 4:
                    self.size[module] = (output.shape[-2], output.shape[-1])
                self._made[storage_key(output)] = _Made(module, output)
            return output

        return forward

    def _weighing(self, module: Any) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if result[1] is not None:
                self.weighing[module] = None
                made = self._made[storage_key(result[1])] = _Made(module, result[1])
                made.taken = True
            return result

        return forward

    def _given(self, module: nn.Module, tensor: Tensor) -> Optional[_Made]:
        """What the module was given, if it is what the module may take: a norm a convolution's output, ..."""
        made = self._made.get(storage_key(tensor))
        if made is None or made.ref() is not tensor or made.taken or made.maker in self.next:
            return None
        return made if isinstance(made.maker, nn.Conv2d) or not isinstance(module, _BatchNorm) else None

    def _summand(self, func: Any, args: Any, kwargs: Any) -> Optional[_Made]:
        """The norm's output in a sum of two tensors of its shape, if that is what this operation is."""
        if self._inside is not None or func not in SUMS or kwargs or len(args) != 2 or not all(
                isinstance(arg, Tensor) for arg in args) or args[0].shape != args[1].shape:
            return None
        for arg in args:
            made = self._made.get(storage_key(arg))
            if made is not None and made.ref() is arg and not made.taken and made.maker not in self.next and (
                    isinstance(made.maker, _BatchNorm)):
                return made
        return None

    def _sum(self, made: _Made, args: Any, output: Tensor) -> None:
        own, other = args if made.ref() is args[0] else args[::-1]
        total = self.next[made.maker] = _Sum(other)
        self._open.append(total)
        if output is own:
            self._made.pop(storage_key(own), None)
        else:
            made.taken = True
        if output is other or total.key == storage_key(own):
            self.held.add(total)
        self._made[storage_key(output)] = _Made(total, output)

    def _settle(self) -> None:
        self._open = [total for total in self._open if total.other() is not None]
        for key, made in list(self._made.items()):
            if made.ref() is None:
                del self._made[key]
            elif made.taken:
                self.refused.add(made.maker)  # somebody still holds it
                del self._made[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside is None:
            self._settle()
        summand = self._summand(func, args, kwargs)
        keys = {storage_key(leaf) for leaf in walk((args, kwargs))}
        self.held.update(total for total in self._open if total.key in keys)
        for key in keys:
            made = self._made.get(key)
            if made is not None and made is not self._inside and made is not summand:
                self.refused.add(made.maker)
                del self._made[key]
        output = func(*args, **(kwargs or {}))
        if summand is not None:
            self._sum(summand, args, output)
        return output

    @property
    def attentions(self) -> List[nn.MultiheadAttention]:
        """Those that return weights which nothing used."""
        return [module for module in self.weighing if module not in self.refused]

    def pairs(self, input_shape: Tuple[int, int]) -> List[Pair]:
        """What was proven.

        Args:
            input_shape: (H, W) of the images of the pass.
        """
        found = []
        for layer, norm in self.next.items():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer in self.refused or self.calls[layer] != 1:
                continue
            stride, last, total = 1, norm, None
            if isinstance(norm, _BatchNorm):
                if self.calls[norm] != 1:
                    continue
                height, width = self.size[layer]
                stride = max(1, round((input_shape[0] * input_shape[1] / (height * width))**0.5))
                last = None if norm in self.refused else self.next.get(norm)
            if isinstance(last, _Sum):
                total = last
                last = None if total in self.refused or total in self.held else self.next.get(total)
            found.append(Pair(layer, norm if isinstance(norm, _BatchNorm) else None, last, self.names[layer], stride,
                              total is not None and total not in self.held))
        return found


def watch_flow(model: nn.Module) -> Flow:
    """A :class:`Flow` for one pass of ``model``."""
    assert not torch.is_grad_enabled()  # a graph would keep what nobody uses
    return Flow(model)
