"""Batch norms as part of the convolutions before them, for the length of a forward.

``norm(conv(x))`` with ``y = g (x - m) / sqrt(v + eps) + b`` a channel is one convolution with the weights ``W g /
sqrt(v + eps)`` and the bias ``b + (c - m) g / sqrt(v + eps)``, where c is the convolution's own bias.  These weights
are made when the convolution runs and freed after it: no second copy is kept, and the model's own weights are never
touched.  Of a fixed teacher the factors of the channels are kept until torch has counted a change of the norm; what is
changed past that count (``.data``) is found by a look at one pair in each pass, in turn.  It pays where the output is
larger than the weights.
"""

import weakref
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_mm.hosts.swap import swapped
from kd_mm.ops.modes import autocast_dtype
from kd_mm.teachers.flow import ACTIVATIONS, Pair, unhooked


class FlowChanged(Exception):  # noqa: N818  (a signal: the pass is done again without the pair)
    """The output of a folded convolution went elsewhere than in the pass that was watched.

    Args:
        pair: whose it is.
    """

    def __init__(self, pair: Pair):
        super().__init__(pair.name)
        self.pair = pair


class Folded:
    """One pair in its folded form.

    Args:
        pair: see :func:`kd_mm.teachers.flow.Flow.pairs`.
        fixed: whether the teacher's weights stay as they are; then the factors of the channels are kept.
    """

    def __init__(self, pair: Pair, fixed: bool):
        self.pair, self.fixed = pair, fixed
        self._kept: Optional[Tuple[Any, Tensor, Tensor]] = None
        self._out: Any = None  # weak reference to what the norm is to be given

    def pays(self, images: Tensor) -> bool:
        """Whether the output is larger than the weights, for images (N, C, Hin, Win)."""
        cells = images.shape[0] * images.shape[-2] * images.shape[-1] // self.pair.stride**2
        return cells * self.pair.conv.out_channels >= self.pair.conv.weight.numel()

    def factors(self) -> Tuple[Tensor, Tensor]:
        """(C, ) factors of the convolution's weights, and (C, ) its bias."""
        norm, conv = self.pair.norm, self.pair.conv
        parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.bias)
        state = tuple((part.data_ptr(), part._version) for part in parts if part is not None)
        if self._kept is not None and self._kept[0] == state:
            return self._kept[1], self._kept[2]
        scale, shift = self._made()
        if self.fixed:
            self._kept = state, scale, shift
        return scale, shift

    def stale(self) -> Optional[Tensor]:
        """Whether what is kept is not what the norm says now; None where nothing is kept."""
        if self._kept is None:
            return None
        found = [(new != old).any() for new, old in zip(self._made(), self._kept[1:])]
        return found[0] | found[1]

    def _made(self) -> Tuple[Tensor, Tensor]:
        norm, conv = self.pair.norm, self.pair.conv
        assert norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale

    @contextmanager
    def on(self, fused: bool) -> Iterator[None]:
        """Both modules in the folded form inside; ``fused``: the activation too."""
        pair = self.pair
        self._out = None
        with ExitStack() as stack:
            stack.enter_context(swapped(pair.conv, 'forward', self._conv(fused)))
            stack.enter_context(swapped(pair.norm, 'forward', self._norm(pair.norm.forward, fused)))
            yield
        self._out = None

    def _conv(self, fused: bool) -> Any:
        conv, activation = self.pair.conv, self.pair.activation

        def forward(images: Tensor) -> Tensor:
            self.settled()
            scale, shift = self.factors()
            weight = conv.weight * scale.view(-1, 1, 1, 1)
            if fused and activation is not None:
                scalars = [activation.negative_slope] if isinstance(activation, nn.LeakyReLU) else []
                output = torch.ops.mkldnn._convolution_pointwise(
                    images, weight, shift, conv.padding, conv.stride, conv.dilation, conv.groups,
                    ACTIVATIONS[type(activation)], scalars, '')
            else:
                output = conv._conv_forward(images, weight, shift)
            self._out = weakref.ref(output)
            return output

        return forward

    def _norm(self, original: Any, fused: bool) -> Any:
        activation: Any = self.pair.activation if fused else None

        def forward(given: Tensor) -> Tensor:
            if self._out is None or self._out() is not given:
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
        self._waiting: Optional[Tuple[Folded, Any]] = None

    def expect(self, folded: Folded, output: Tensor) -> None:
        """The next input is ``output``, of this pair."""
        self.settled()
        self._waiting = folded, weakref.ref(output)

    def settled(self) -> None:
        """Raise if something that has the activation already was not given to it.

        Raises:
            FlowChanged: it was not.
        """
        if self._waiting is not None:
            raise FlowChanged(self._waiting[0].pair)

    def __call__(self, given: Tensor) -> Tensor:
        if self._waiting is not None and self._waiting[1]() is given:
            self._waiting = None
            return given
        return self.original(given)


class Folding:
    """All proven pairs of a teacher.

    Args:
        pairs: see :mod:`kd_mm.teachers.flow`.
        fixed: whether the teacher's weights stay as they are.
    """

    def __init__(self, pairs: Sequence[Pair], fixed: bool):
        self.pairs = [Folded(pair, fixed) for pair in pairs]
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
            part.fixed, part._kept = False, None
        print_log('kd_mm: numbers of a batch norm of the teacher were changed through `.data`, which torch does not '
                  'count; from now on they are read anew in every pass', 'current', level=30)

    @contextmanager
    def on(self, images: Tensor, kept: Set[int]) -> Iterator[None]:
        """The pairs in their folded form inside, where it pays for these images.

        Args:
            images: of the pass.
            kept: ``id`` of every module that is to run as it is: its own output is recorded, or it is compiled.

        Raises:
            FlowChanged: at the end or inside, if an output went elsewhere than in the pass that was watched.
        """
        self._look()
        passed: Dict[int, Passed] = {}
        folded: List[Folded] = []
        with ExitStack() as stack:
            for part in self.pairs:
                pair = part.pair
                if (id(pair.conv) in kept or not unhooked(pair.conv) or not unhooked(pair.norm)
                        or not part.pays(images)):
                    continue
                fused = self._fuses(pair, images, kept, passed)
                if fused and id(pair.activation) not in passed:
                    assert pair.activation is not None
                    passed[id(pair.activation)] = Passed(pair.activation.forward)
                    stack.enter_context(swapped(pair.activation, 'forward', passed[id(pair.activation)]))
                stack.enter_context(part.on(fused))
                folded.append(part)
            yield
            for part in folded:
                part.settled()
            for waiting in passed.values():
                waiting.settled()

    @staticmethod
    def _fuses(pair: Pair, images: Tensor, kept: Set[int], passed: Dict[int, Passed]) -> bool:
        """Whether the activation becomes part of the convolution: the processor's library has it in float32."""
        activation, conv = pair.activation, pair.conv
        return bool(
            activation is not None and images.device.type == 'cpu' and images.dtype == torch.float32
            and conv.weight.dtype == torch.float32 and autocast_dtype('cpu') is None
            and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
            and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
            and not {id(pair.norm), id(activation)} & kept
            and (id(activation) in passed or unhooked(activation)))
