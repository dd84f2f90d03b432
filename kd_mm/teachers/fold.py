"""Batch norms as part of the convolutions before them, for the length of a forward.

``norm(conv(x))`` with ``y = g (x - m) / sqrt(v + eps) + b`` a channel is one convolution with the weights ``W g /
sqrt(v + eps)`` and the bias ``b + (c - m) g / sqrt(v + eps)``, where c is the convolution's own bias.  These weights
are made when the convolution runs and freed after it, unless the map is small and the teacher fixed
(:mod:`kd_mm.teachers.packed`); the model's own weights are never touched.  Of a fixed teacher the factors of the
channels are kept until torch has counted a change of the norm; what is changed past that count (``.data``) is found by
a look at one pair in each pass, in turn.  It pays where the output is larger than the weights, or these are kept.

On a CPU an activation, and the sum of a residual block, become part of the convolution too
(:mod:`kd_mm.teachers.kernels`).
"""

import weakref
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_mm.hosts.swap import swapped
from kd_mm.ops.live import counted, storage_key
from kd_mm.teachers import kernels
from kd_mm.teachers.flow import Pair, plain_activation, plain_layer, plain_norm
from kd_mm.teachers.late import Late, spend
from kd_mm.teachers.layout import usual
from kd_mm.teachers.maps import far, laid_out
from kd_mm.teachers.packed import Packing


class FlowChanged(Exception):  # noqa: N818  (a signal: the pass is done again without the pair)
    """The output of a folded convolution went elsewhere than in the pass that was watched.

    Args:
        pair: whose it is.
    """

    def __init__(self, pair: Pair):
        super().__init__(pair.name)
        self.pair = pair


class _Given:
    """What a module gave, as it was then."""

    def __init__(self, tensor: Tensor):
        # of one whose convolution waits to ask for anything makes it run; it is never written over
        self._ref, self._version = weakref.ref(tensor), None if isinstance(tensor, Late) else tensor._version

    def same(self, tensor: Tensor) -> bool:
        """Whether this is that very tensor, and nothing has written over it."""
        return self._ref() is tensor and (self._version is None or tensor._version == self._version)


class Folded:
    """One pair in its folded form.

    Args:
        pair: see :func:`kd_mm.teachers.flow.Flow.pairs`.
        fixed: whether the teacher's weights stay as they are; then the factors of the channels are kept.
    """

    def __init__(self, pair: Pair, fixed: bool):
        self.pair, self.fixed = pair, fixed
        self._kept: Optional[Tuple[Any, Tensor, Tensor]] = None
        self._made_of: Any = ()
        self._out: Optional[_Given] = None  # what the norm is to be given
        self.folding: Any = None

    def pays(self, images: Tensor) -> bool:
        """Whether the output is larger than the weights, or these are kept; for images (N, C, H, W) of the model."""
        conv = self.pair.conv
        if self.pair.norm is None:
            return True
        cells = images.shape[0] * images.shape[-2] * images.shape[-1] // self.pair.stride**2
        if laid_out(images) and kernels.takes(conv) and self.folding.packing.takes(conv, cells):
            return True
        return cells * conv.weight.shape[0] >= conv.weight.numel()

    def factors(self) -> Tuple[Tensor, Tensor]:
        """(C, ) factors of the convolution's weights, and (C, ) its bias."""
        state, kept = self._state(), self._kept
        if kept is not None and kept[0] == state:
            return kept[1], kept[2]
        scale, shift = self._made()
        if self.fixed:
            self._kept = state, scale, shift
            # both tensor and memory: neither becomes another's, which would have the same state, while they are held
            self._made_of = [(part, part.detach()) for part in self._parts() if part is not None]
        return scale, shift

    def _parts(self) -> Sequence[Optional[Tensor]]:
        norm, conv = self.pair.norm, self.pair.conv
        assert norm is not None
        return norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.bias

    def _state(self) -> Any:
        """What torch counts of the numbers that the factors are made of."""
        assert self.pair.norm is not None
        return (self.pair.norm.eps, *(part if part is None else counted(part) for part in self._parts()))

    def stale(self) -> Optional[Tensor]:
        """Whether what is kept is not what the norm says now, though torch has counted no change; None where nothing is
        kept or a change was counted."""
        if self._kept is None or self._kept[0] != self._state():
            return None
        found = [(new != old).any() for new, old in zip(self._made(), self._kept[1:])]
        return found[0] | found[1]

    def _made(self) -> Tuple[Tensor, Tensor]:
        norm, conv = self.pair.norm, self.pair.conv
        assert norm is not None and norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale

    @contextmanager
    def on(self, fused: bool, summed: bool, direct: bool) -> Iterator[None]:
        """Both modules in the folded form inside.

        Args:
            fused: the activation too.
            summed: a residual sum too.
            direct: by the library, whatever follows.
        """
        pair = self.pair
        self._out = None
        with ExitStack() as stack:
            stack.enter_context(swapped(pair.conv, 'forward', self._conv(pair.conv.forward, fused, summed, direct)))
            if pair.norm is not None:
                stack.enter_context(swapped(pair.norm, 'forward', self._norm(pair.norm.forward, fused and not summed)))
            yield
        self._out = None

    def _weights(self) -> Tuple[Tensor, Optional[Tensor]]:
        layer = self.pair.conv
        if self.pair.norm is None:
            return layer.weight, layer.bias
        scale, shift = self.factors()
        return layer.weight * scale.view(-1, 1, 1, 1), shift

    def _for_library(self, images: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Weights and bias as the processor's library takes them."""
        layer, norm = self.pair.conv, self.pair.norm
        if not isinstance(layer, nn.Conv2d):
            return self._weights()
        kind = kernels.kind_of(images, layer)
        assert kind is not None

        def source() -> List[Tensor]:
            return [layer.weight] if norm is None else [layer.weight, self.factors()[0]]

        weight = self.folding.packing.weight(layer, images, kind, source, lambda: self._weights()[0])
        return weight, layer.bias if norm is None else self.factors()[1]

    def _conv(self, original: Any, fused: bool, summed: bool, direct: bool) -> Any:
        layer = self.pair.conv
        activation: Any = self.pair.activation if fused and not summed else None

        def run(images: Tensor) -> Tensor:
            # In the usual layout the library takes two to three times as long for a convolution of one cell.
            if (activation is not None or direct) and kernels.kind_of(images, layer) is not None and (
                    isinstance(layer, nn.Linear) or laid_out(images)):
                return kernels.apply(layer, images, *self._for_library(images), activation)
            if isinstance(layer, nn.Conv2d) and self.pair.norm is not None:
                convolve = usual(layer._conv_forward) if images.device.type == 'cpu' and far(
                    layer) else layer._conv_forward
                output = convolve(images, *self._weights())
            else:
                output = original(images)
            return output if activation is None else activation.forward.original(output)

        def forward(images: Tensor) -> Tensor:
            self.settled()
            if summed and laid_out(images) and kernels.kind_of(images, layer) is not None:
                output: Tensor = self._late(images, run, fused)
            else:
                output = run(images)
            self._out = _Given(output)
            if self.pair.norm is None and activation is not None:
                self._out = None
                activation.forward.expect(self, output)
            return output

        return forward

    def _late(self, images: Tensor, run: Any, fused: bool) -> Tensor:
        """What the convolution will give, alone or in a sum."""
        layer: Any = self.pair.conv
        activation: Any = self.pair.activation if fused else None
        size = [(edge + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for edge, pad, step, kernel, stride in zip(
            images.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride)]
        shape = (images.shape[0], layer.out_channels, *size)
        kind, version = kernels.kind_of(images, layer), images._version

        def make() -> Tensor:
            if images._version != version:  # written over while the convolution waited
                raise FlowChanged(self.pair)
            return run(images)

        def add(other: Tensor) -> Optional[Tensor]:
            if (tuple(other.shape) != shape or other.dtype != kind or not laid_out(other)
                    or storage_key(other) in (self.folding.guarded(), storage_key(images))  # it reads what it adds to
                    or images._version != version):
                return None
            output = spend(kernels.add_into(layer, images, *self._for_library(images), other, activation is not None),
                           FlowChanged(self.pair))
            if activation is not None:
                activation.forward.expect(self, output)
            return output

        assert kind is not None
        return Late(kind, shape, make, add, FlowChanged(self.pair))

    def _norm(self, original: Any, fused: bool) -> Any:
        activation: Any = self.pair.activation if fused else None

        def forward(given: Tensor) -> Tensor:
            if self._out is None or not self._out.same(given):
                return original(given)
            self._out = None
            if activation is not None:
                activation.forward.expect(self, given)
            return given

        return forward

    def settled(self) -> None:
        """Raise if the norm was not given what the convolution gave.

        Raises:
            FlowChanged: it was not.
        """
        if self._out is not None:
            raise FlowChanged(self.pair)


class Passed:
    """The forward of an activation that lets through what it was applied to already.

    Args:
        original: its own forward.
    """

    def __init__(self, original: Any):
        self.original = original
        self._waiting: Optional[Tuple[Folded, _Given]] = None

    def expect(self, folded: Folded, output: Tensor) -> None:
        """The next input is ``output``, of this pair."""
        self.settled()
        self._waiting = folded, _Given(output)

    def settled(self) -> None:
        """Raise if something that has the activation already was not given to it.

        Raises:
            FlowChanged: it was not.
        """
        if self._waiting is not None:
            raise FlowChanged(self._waiting[0].pair)

    def __call__(self, given: Tensor) -> Tensor:
        if self._waiting is not None and self._waiting[1].same(given):
            self._waiting = None
            return given
        return self.original(given)


def _of_one_kind(pair: Pair) -> bool:
    """Whether convolution and norm have one dtype; a norm in float32 after a convolution in bfloat16 is legal."""
    assert pair.norm is not None and pair.norm.running_var is not None
    return pair.conv.weight.dtype == pair.norm.running_var.dtype


class Folding:
    """All proven pairs of a teacher.

    Args:
        pairs: see :mod:`kd_mm.teachers.flow`.
        fixed: whether the teacher's weights stay as they are.
        packing: keeps weights of convolutions.
    """

    def __init__(self, pairs: Sequence[Pair], fixed: bool, packing: Packing):
        self.packing = packing
        self.pairs = [Folded(pair, fixed) for pair in pairs]
        for folded in self.pairs:
            folded.folding = self
        #: gives the memory that no sum may be written over.
        self.guarded: Callable[[], Optional[int]] = lambda: None
        self._turn = 0
        self._stale: Optional[Tensor] = None

    @property
    def names(self) -> List[str]:
        """Paths of the convolutions."""
        return [folded.pair.name for folded in self.pairs]

    def drop(self, pair: Pair) -> None:
        """Leave a pair as the host runs it from now on."""
        self.pairs = [folded for folded in self.pairs if folded.pair is not pair]

    def _look(self) -> None:
        """Look whether one pair is stale; on an accelerator at the next pass, when the answer is there."""
        self._thaw(self._stale)
        self._stale = None
        if self.pairs:
            self._turn = (self._turn + 1) % len(self.pairs)
            self._stale = self.pairs[self._turn].stale()
            if self._stale is not None and self._stale.device.type == 'cpu':
                self._thaw(self._stale)

    def _thaw(self, stale: Optional[Tensor]) -> None:
        """Keep no factors any more, if some were stale."""
        if stale is None or not any(part.fixed for part in self.pairs) or not bool(stale):
            return
        for part in self.pairs:
            part.fixed, part._kept, part._made_of = False, None, ()
        self.packing.drop(told=True)
        print_log('kd_mm: numbers of a batch norm of the teacher were changed through `.data`, which torch does not '
                  'count; from now on they are read anew in every pass', 'current', level=30)

    @contextmanager
    def on(self, images: Tensor, kept: Set[int], sums: bool, direct: bool) -> Iterator[None]:
        """The pairs in their folded form inside, where it pays for these images.

        Args:
            images: of the pass.
            kept: ``id`` of every module that is to run as it is: its own output is recorded, or it is compiled.
            sums: residual sums too, which write over what is known not to be recorded.
            direct: by the processor's library wherever it can.

        Raises:
            FlowChanged: at the end or inside, if an output went elsewhere than in the pass that was watched.
        """
        self._look()
        passed: Dict[int, Passed] = {}
        folded: List[Folded] = []
        with ExitStack() as stack:
            for part in self.pairs:
                pair = part.pair
                if (id(pair.conv) in kept or not plain_layer(pair.conv) or not part.pays(images)
                        or pair.norm is not None and not (plain_norm(pair.norm) and _of_one_kind(pair))):
                    continue
                summed = sums and self._sums(pair, images, kept)
                fused = self._fuses(pair, images, kept, passed) and (not pair.summed or summed)
                if pair.norm is None and not fused:
                    continue
                if fused and id(pair.activation) not in passed:
                    assert pair.activation is not None
                    passed[id(pair.activation)] = Passed(pair.activation.forward)
                    stack.enter_context(swapped(pair.activation, 'forward', passed[id(pair.activation)]))
                stack.enter_context(part.on(fused, summed, direct and kernels.takes(pair.conv)))
                folded.append(part)
            yield
            for part in folded:
                part.settled()
            for waiting in passed.values():
                waiting.settled()

    @staticmethod
    def _fuses(pair: Pair, images: Tensor, kept: Set[int], passed: Dict[int, Passed]) -> bool:
        """Whether the activation becomes part of the layer."""
        activation = pair.activation
        return bool(
            activation is not None and kernels.kind_of(images, pair.conv) is not None and kernels.takes(pair.conv)
            and not {id(pair.norm), id(activation)} & kept and (not pair.summed or isinstance(activation, nn.ReLU))
            and (id(activation) in passed or plain_activation(activation)))

    @staticmethod
    def _sums(pair: Pair, images: Tensor, kept: Set[int]) -> bool:
        """Whether a residual sum becomes part of the convolution: with the channels innermost, so that the sum can be
        written over what is added."""
        return bool(pair.summed and pair.conv.weight.dim() == 4 and pair.conv.groups == 1  # type: ignore[union-attr]
                    and id(pair.norm) not in kept and laid_out(images) and kernels.takes(pair.conv)
                    and kernels.kind_of(images, pair.conv) is not None)
