"""Taps: collect what one module (or method) of a model returns, and leave no trace.

A tap replaces the ``forward`` (or another method) of *one instance* by a closure that calls the original and notes
what came out.  A forward hook would not do: mmseg's ``decode_head.loss`` and mmdet's ``_forward`` call ``.forward()``
directly, past every hook, and methods such as ``bbox_head.get_targets`` have no hooks at all.

The closure is there only while the tap is armed.  A Distiller arms its taps at the start of a training forward and
disarms them at its end, so that validation, the recomputation of activation checkpointing during the backward pass,
and copies of the model made between two steps know nothing of it.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kd_mm.hosts.paths import PRE_RELU, resolve
from kd_mm.hosts.swap import Swap
from kd_mm.hosts.tokens import (
    MAX_EXTRA,
    TokenSize,
    TokenSizeError,
    _sizes_in,
    fitting_sizes,
    guess_sizes,
    stride_sizes,
    token_size,
    tokens_to_map,
)
from kd_mm.types.records import Call, Recorded


class StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """Raised by the last tap of a teacher: nothing after it is needed."""


def tensors_in(output: Any) -> List[Tensor]:
    """Floating-point tensors of a (nested) output, in order: items of tuples and lists, values of dicts."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def edges_of(output: Any) -> List[Any]:
    """The edges in the graph of the tensors of an output that have a gradient; none where no graph is made."""
    if not torch.is_grad_enabled():  # a view that was made here has no node, though it says that it needs a gradient
        return []
    return [get_gradient_edge(tensor) for tensor in tensors_in(output) if tensor.requires_grad]


def _frozen(output: Any, copy: bool) -> Any:
    """An output in containers of its own (a host may replace items of its lists later); tensors cloned on demand."""
    if isinstance(output, Tensor):
        return output.clone() if copy and output.is_floating_point() else output
    if type(output) in (tuple, list):
        return type(output)(_frozen(item, copy) for item in output)
    if type(output) is dict:
        return {key: _frozen(item, copy) for key, item in output.items()}
    return output


class Tap:
    """Records the outputs of one module or method while armed; between the steps the model is untouched.

    Args:
        model: the model that holds the module.
        path: see :func:`resolve`.
        side: ``'student'`` or ``'teacher'``, for messages.
        keep: called with the tap after every recorded call; a teacher counts with it how far it must run.
        structured: keep also every call's arguments and its result as it was: :meth:`read` then has ``calls``.
        tokens: what map (N, L, C) tokens make. (H, W): cells, for inputs of one size. A whole number: the stride of
            the map in pixels of the input, for inputs of any size; edges may be padded or cut. Up to 16 more tokens in
            front (class token, registers) are dropped. Default None: see below.

    A tuple, list or dict output gives one tensor an item; repeated calls (a head shared by the levels) one a call.
    (N, L, C) tokens become maps when the size is known: from ``tokens``; else from an (H, W) pair among the arguments
    or results of the call, an exact one before one that leaves 1 to 16 tokens over; else, below a ``backbone`` and for
    a model as a whole, from the input's shape, by a stride from 1 to 64, with or without a class token.

    At ``'...:pre_relu'`` it is what the block's ``relu`` was given the last time: the sum with the shortcut.

    Attributes:
        token_size_note: a sentence that says which tokens were taken for which maps in the first pass that was read,
            and why; None if there were none.

    Raises:
        KeyError: see :func:`resolve`.
        ValueError: ``tokens`` is no size.
    """

    def __init__(self, model: nn.Module, path: str, side: str = 'model',
                 keep: Optional[Callable[['Tap'], None]] = None, structured: bool = False,
                 tokens: Optional[TokenSize] = None):
        self.path, self.side, self.keep, self.structured = path, side, keep, structured
        self.optional = False  # whether it may stay silent: then it reads as empty
        self.owner, self.name = resolve(model, path, side)
        self.tokens = token_size(tokens)
        self.token_size_note: Optional[str] = None
        self.calls = 0
        self._input_shape: Optional[Tuple[int, int]] = None
        self._swap: Optional[Swap] = None
        self._copy = True
        self._watch = True  # whether to look if originals are overwritten; not any more once one was
        self._records: List[Tuple[Tensor, Optional[Tensor], int]] = []  # value, what is watched, its version
        self._calls: List[Call] = []
        # Of the graph, noted at once: an in-place operation later changes those that a tensor knows itself.
        self._edges: List[Any] = []
        self._given: List[Any] = []
        self._replaced: Optional[Recorded] = None  # of put()
        self._taken: Dict[str, None] = {}  # what the note will say, each once
        # Texts, not exceptions: those would hold the frames of the model's forward.
        self._ambiguous: Optional[str] = None
        self._misfit: Optional[str] = None

    def move(self, model: nn.Module) -> None:
        """Go over to another instance of the same model."""
        self.clear()
        self.owner, self.name = resolve(model, self.path, self.side)

    def arm(self, input_shape: Optional[Tuple[int, int]] = None) -> None:
        """Start recording, from nothing.

        Raises:
            RuntimeError: the module already has an armed tap; share one tap between the losses instead.
        """
        self.clear()
        self.calls, self._input_shape = 0, input_shape
        original = getattr(self.owner, self.name)
        if hasattr(original, '_kd_mm_tap'):
            raise RuntimeError(f'{self.side}: two taps at {self.path!r} are armed at once')

        def tapped(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self._record(args, kwargs, output)
            return output

        def before(given: Tensor) -> Tensor:
            held = given.clone()  # the ReLU works in place
            edges = edges_of(given)
            output = original(given)
            self._records = []
            self._record((given, ), {}, held)
            self._edges = edges
            return output

        closure: Any = before if self.path.endswith(PRE_RELU) else tapped
        closure._kd_mm_tap = True
        self._swap = Swap(self.owner, self.name, closure).on()

    def disarm(self) -> None:
        """Restore the module; what was recorded stays until :meth:`read` or :meth:`clear`."""
        if self._swap is not None:
            self._swap.off()
            self._swap = None

    def clear(self) -> None:
        """Restore the module and forget what was recorded; doing it twice is harmless."""
        self.disarm()
        self._records, self._calls, self._edges, self._given, self._taken = [], [], [], [], {}
        self._replaced = None
        self._ambiguous = self._misfit = None

    @property
    def fired(self) -> bool:
        """Whether it has recorded a tensor since it was armed; with structure, a call."""
        return bool(self._records or self._calls or self._replaced)

    def put(self, recorded: Recorded) -> None:
        """Let the next :meth:`read` give this: what was read before, in another form."""
        self._replaced = recorded

    def peek(self) -> List[Tensor]:
        """The recorded tensors as they are; the tap keeps them."""
        return list(self._replaced) if self._replaced is not None else [value for value, _, _ in self._records]

    def read(self) -> Recorded:
        """The recorded tensors, which the tap then forgets.

        Values are those at the tap, even if a later in-place activation overwrote the tensor: the first time a tap
        fires it keeps copies and looks whether the originals were changed; if so it goes on copying, if not it stops.

        Raises:
            RuntimeError: the tap did not fire; or a tensor that had never been overwritten in place was.
            TokenSizeError: without ``tokens``, more than one (H, W) fits.  Not at a structured tap, whose calls are
                read as they were: there they stay tokens.
            ValueError: ``tokens`` does not fit, or is a stride and leaves two sizes possible.
        """
        if self._replaced is not None:
            replaced, self._replaced = self._replaced, None
            return replaced
        records, calls, taken = self._records, tuple(self._calls), self._taken
        edges, given = tuple(self._edges), tuple(self._given)
        ambiguous, misfit = self._ambiguous, self._misfit
        self.clear()
        if not records and not calls and self.optional:
            # nothing was seen of what becomes of its outputs: look when it fires
            nothing = Recorded()
            nothing.owner, nothing.memo = self.owner, {}
            return nothing
        if not records and not calls:
            raise RuntimeError(f'{self.side}: the tap {self.path!r} did not fire in this forward pass. The module is '
                               'not used in this mode (training loss); tap another one')
        if misfit is not None:
            raise ValueError(misfit)
        if ambiguous is not None:
            raise TokenSizeError(ambiguous, [tuple(value.shape) for value, _, _ in records])
        overwritten = any(watched is not None and watched._version != version for _, watched, version in records)
        if overwritten and not self._copy:
            self._copy, self._watch = True, False
            raise RuntimeError(f'{self.side}: the output of {self.path!r} was overwritten in place in this step but '
                               'not in the steps before; tap the activation after it instead')
        if self._watch:
            self._copy, self._watch = overwritten, not overwritten
        if self.token_size_note is None and taken:
            self.token_size_note = f'{self.side} {self.path!r}: {"; ".join(taken)}'
        recorded = Recorded(value for value, _, _ in records)
        recorded.calls, recorded.owner, recorded.memo = calls, self.owner, {}
        recorded.edges, recorded.given = edges, given
        return recorded

    def _record(self, args: Tuple[Any, ...], kwargs: Any, output: Any) -> None:
        self.calls += 1
        self._edges += edges_of(output)
        if self.structured:
            self._given += edges_of([args, kwargs])
            self._calls.append(Call(args, kwargs, _frozen(output, self._copy)))
        named: Optional[List[Tuple[int, int]]] = None
        for tensor in tensors_in(output):
            value = tensor
            if tensor.dim() == 3:
                if named is None:
                    named = _sizes_in([*args, *kwargs.values(), *(output if isinstance(output, tuple) else ())])
                size = self._map_size(tensor.shape[1], named)
                if size is not None:
                    value = tokens_to_map(tensor, size)
            # A part of a larger tensor would keep all of it, and without a gradient nothing else does.
            part = not tensor.requires_grad and tensor.untyped_storage().nbytes() >= 2 * tensor.nbytes
            if self._copy or part:
                value = value.clone()
            watched = tensor if self._watch and (self._copy or not part) else None
            self._records.append((value, watched, tensor._version))
        if self.keep is not None:
            self.keep(self)

    def _map_size(self, tokens: int, named: List[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
        """(H, W) of a number of tokens; None where they stay as they are, or where :meth:`read` will say why not."""
        given, seen = self.tokens, self._input_shape
        source = 'named by its call'
        if given is not None:
            source = f'tokens={given}'
            candidates = [given] if isinstance(given, tuple) else stride_sizes(seen, [given]) if seen else []
            sizes = fitting_sizes(tokens, candidates)
            if not sizes and self._misfit is None:
                shapes = ' or '.join(f'{height}x{width}' for height, width in candidates) or 'unknown'
                inputs = f' of an input of {seen[0]}x{seen[1]}' if seen else ''
                self._misfit = (f'{self.side}: the tap {self.path!r} gives {tokens} tokens{inputs}, and {source} makes '
                                f'a map of {shapes} (and up to {MAX_EXTRA} tokens in front of it). Give tokens=(H, W), '
                                'the cells of the map, if all inputs have one size, else tokens=STRIDE in pixels')
        else:
            sizes = fitting_sizes(tokens, named)
            if not sizes and ('backbone' in self.path or not self.path):
                source = f"by the input's {seen[0]}x{seen[1]}" if seen else ''
                sizes = guess_sizes(tokens, seen)
        if len(sizes) > 1:
            shapes = ' or '.join(f'{height}x{width}' for height, width in sizes)
            if self.structured:
                self._taken[f'{tokens} tokens are left as they are: {shapes}, {source}'] = None
            else:
                text = (f'{self.side}: the tap {self.path!r} gives {tokens} tokens, and their map could be {shapes} '
                        f'({source}). Say in the loss which: tokens=(H, W), the cells of the map, or tokens=STRIDE in '
                        'pixels where inputs differ in size')
                if given is None:
                    self._ambiguous = self._ambiguous or text
                else:
                    self._misfit = self._misfit or text  # of this input; the stride may tell more of another
            return None
        if not sizes:
            return None
        height, width = sizes[0]
        extra = tokens - height * width
        dropped = f' after the first {extra}' if extra else ''
        self._taken[f'{tokens} tokens are a map of {height}x{width}{dropped} ({source})'] = None
        return sizes[0]


def read_taps(taps: Sequence['Tap']) -> Dict[str, Recorded]:
    """What each of the taps recorded, by path."""
    return {tap.path: tap.read() for tap in taps}


def image_size(images: Tensor) -> Tuple[int, int]:
    """(H, W) of a batch of images."""
    return images.shape[-2], images.shape[-1]
