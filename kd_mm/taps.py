"""Taps: collect what one module (or method) of a model returns, and leave no trace.

A tap replaces the ``forward`` (or another method) of *one instance* by a closure that calls the original and notes
what came out.  A forward hook would not do: mmseg's ``decode_head.loss`` and mmdet's ``_forward`` call ``.forward()``
directly, past every hook, and methods such as ``bbox_head.get_targets`` have no hooks at all.

The closure is there only while the tap is armed.  A Distiller arms its taps at the start of a training forward and
disarms them at its end, so that validation, the recomputation of activation checkpointing during the backward pass,
and copies of the model made between two steps know nothing of it.
"""

import difflib
import fnmatch
import math
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from kd_mm.swap import Swap

#: After the path of a residual block: the sum that its last ReLU takes, which no module returns.
PRE_RELU = ':pre_relu'
#: Tokens that a map does not show: a class token, registers.
MAX_EXTRA = 16
#: ``tokens=``: (H, W) in cells, or the stride in pixels.
TokenSize = Union[int, Tuple[int, int]]


class StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """Raised by the last tap of a teacher: nothing after it is needed."""


class TokenSizeError(ValueError):
    """More than one (H, W) fits the tokens of a tap.

    Attributes:
        shapes: of the tensors that the tap recorded, tokens as they came.
    """

    def __init__(self, message: str, shapes: Sequence[Tuple[int, ...]] = ()):
        super().__init__(message)
        self.shapes = list(shapes)


class Call(NamedTuple):
    """One recorded call: its arguments and its result with the structure that the module gave it."""

    args: Tuple[Any, ...]
    kwargs: Any
    output: Any


class Recorded(Tuple[Tensor, ...]):
    """The tensors that a tap has recorded, and the calls they came from where the tap keeps structure.

    Attributes:
        calls: the calls, in order; empty for a tap without structure.
        owner: the instance whose method was tapped.
        memo: what several losses have made of this record in this step, so that it is made once.
    """

    calls: Tuple[Call, ...] = ()
    owner: Any = None
    memo: Dict[Any, Any]


def expand_paths(model: nn.Module, path: Any) -> List[str]:
    """Module paths for ``at``: a path, a list of paths, or a pattern such as ``neck.fpn_convs.*`` (in model order)."""
    paths: List[str] = []
    for part in [path] if isinstance(path, str) else list(path):
        if any(letter in part for letter in '*?['):
            suffix = PRE_RELU if part.endswith(PRE_RELU) else ''
            pattern = part.removesuffix(PRE_RELU)
            depth = pattern.count('.')
            found = [name + suffix for name, _ in model.named_modules()
                     if name.count('.') == depth and fnmatch.fnmatchcase(name, pattern)]
            paths.extend(found or [part])
        else:
            paths.append(part)
    return paths


def resolve(model: nn.Module, path: str, side: str = 'model') -> Tuple[Any, str]:
    """The instance and the method name behind a tap path.

    Args:
        model: the student or the teacher.
        path: ``'neck'``, ``'backbone.layer4.2'`` (a module: its ``forward``), ``'bbox_head.get_targets'`` (a method) or
            ``'backbone.layer4.2:pre_relu'`` (the ``relu`` of a residual block, see :data:`PRE_RELU`).
        side: word for the message.

    Raises:
        KeyError: nothing of that name; the closest paths are listed.
    """
    if path.endswith(PRE_RELU):
        relu = getattr(resolve(model, path.removesuffix(PRE_RELU), side)[0], 'relu', None)
        if not isinstance(relu, nn.Module):
            raise KeyError(f'{side}: {path!r} is the sum that the last ReLU of a residual block takes, and '
                           f'{path.removesuffix(PRE_RELU)!r} has no `relu`. Tap its last norm')
        return relu, 'forward'
    owner: Any = model
    parts = path.split('.')
    for position, part in enumerate(parts):
        child = getattr(owner, part, None) if part else None
        if child is None and isinstance(owner, (nn.ModuleList, nn.Sequential)) and part.lstrip('-').isdigit():
            child = owner[int(part)] if -len(owner) <= int(part) < len(owner) else None
        if isinstance(child, nn.Module):
            owner = child
        elif callable(child) and position == len(parts) - 1:
            return owner, part
        else:
            names = [name for name, _ in model.named_modules() if name]
            close = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
            parent = '.'.join(parts[:position])
            children = [name for name, _ in owner.named_children()] if isinstance(owner, nn.Module) else []
            hint = f' Closest: {", ".join(map(repr, close))}.' if close else ''
            inside = f' {parent or type(model).__name__} has: {", ".join(children)}.' if children else ''
            raise KeyError(f'{side} has no module {path!r}.{hint}{inside} '
                           'List all: python tools/list_taps.py CONFIG')
    return owner, 'forward'


def module_at(model: nn.Module, path: str, side: str = 'model') -> Any:
    """The module that a tap path names: for ``':pre_relu'`` the residual block."""
    return resolve(model, path.removesuffix(PRE_RELU), side)[0]


def tensors_in(output: Any) -> List[Tensor]:
    """Floating-point tensors of a (nested) output, in order: items of tuples and lists, values of dicts."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def _frozen(output: Any, copy: bool) -> Any:
    """An output in containers of its own (a host may replace items of its lists later); tensors cloned on demand."""
    if isinstance(output, Tensor):
        return output.clone() if copy and output.is_floating_point() else output
    if type(output) in (tuple, list):
        return type(output)(_frozen(item, copy) for item in output)
    if type(output) is dict:
        return {key: _frozen(item, copy) for key, item in output.items()}
    return output


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes_in(values: Iterable[Any]) -> List[Tuple[int, int]]:
    """Pairs of ints among the arguments or results of a call: the (H, W) that token modules pass along."""
    pairs: List[Tuple[int, int]] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and all(map(_whole, value)):
                pairs.append((int(value[0]), int(value[1])))
            else:
                pairs.extend(_sizes_in(value))
    return pairs


def fitting_sizes(tokens: int, sizes: Iterable[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """The sizes that explain a number of tokens, each once: ``H * W == tokens``; if none does, with up to 16 more.

    Example:
        >>> fitting_sizes(65, [(8, 8), (2, 2), (8, 8)]), fitting_sizes(64, [(7, 7), (8, 8), (4, 16)])
        ([(8, 8)], [(8, 8), (4, 16)])
    """
    possible = [size for size in dict.fromkeys(sizes)
                if min(size) > 0 and 0 <= tokens - size[0] * size[1] <= MAX_EXTRA]
    return [size for size in possible if size[0] * size[1] == tokens] or possible


def stride_sizes(input_shape: Tuple[int, int], strides: Iterable[int]) -> List[Tuple[int, int]]:
    """(H, W) of the maps that these strides make of an input, edges padded or cut.

    Example:
        >>> stride_sizes((64, 100), [16])
        [(4, 7), (4, 6)]
    """
    height, width = input_shape
    return list(dict.fromkeys((int(rounding(height / stride)), int(rounding(width / stride)))
                              for stride in strides for rounding in (math.ceil, math.floor)))


def guess_sizes(tokens: int, input_shape: Optional[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """(H, W) of ``tokens`` cells, or of one cell fewer (a class token), by any stride from 1 to 64 of an input.

    Example:
        >>> guess_sizes(12, (48, 64)), guess_sizes(13, (48, 64)), guess_sizes(11, (48, 64))
        ([(3, 4)], [(3, 4)], [])
    """
    if input_shape is None:
        return []
    return [size for size in stride_sizes(input_shape, range(1, 65))
            if min(size) > 0 and tokens - size[0] * size[1] in (0, 1)]


def looks_like_token_size(value: Any) -> bool:
    """Whether ``tokens=`` of a loss speaks of its taps: numbers, or a dict of them by side.

    Some losses have an argument ``tokens`` of their own: a file, a state dict, tensors.
    """
    if hasattr(value, 'keys'):
        return bool(value) and set(value) <= {'student', 'teacher'}
    numbers = value if isinstance(value, (tuple, list)) else (value, )
    return bool(numbers) and all(isinstance(number, (int, float)) for number in numbers)


def token_size(value: Any) -> Optional[TokenSize]:
    """``tokens=`` of one tap, checked: None, a stride, or (H, W).

    Raises:
        ValueError: it is none of them.
    """
    if value is None or (_whole(value) and value > 0):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(_whole(edge) and edge > 0 for edge in value):
        return value[0], value[1]
    raise ValueError(f'tokens={value!r} must be (H, W), the cells of the map that the tokens make, or one whole '
                     'number, the stride of that map in pixels of the input')


def token_sizes(value: Any) -> Dict[str, Optional[TokenSize]]:
    """``tokens=`` of a loss by side: one value for both, or ``dict(student=..., teacher=...)``.

    Raises:
        ValueError: see :func:`token_size`.

    Example:
        >>> token_sizes(16), token_sizes(dict(teacher=[8, 16]))
        ({'student': 16, 'teacher': 16}, {'student': None, 'teacher': (8, 16)})
    """
    both = value if hasattr(value, 'keys') else {'student': value, 'teacher': value}
    return {side: token_size(both.get(side)) for side in ('student', 'teacher')}


def tokens_to_map(tokens: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, L, C) to (N, C, H, W); extra tokens in front (class token, registers) are dropped."""
    height, width = size
    extra = tokens.shape[1] - height * width
    return tokens[:, extra:].transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


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
    or results of the call, an exact one before one that leaves 1 to 16 tokens over; else, below a ``backbone``, from
    the input's shape, by a stride from 1 to 64, with or without a class token.

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
        self._taken: Dict[str, None] = {}  # what the note will say, each once
        # Texts, not exceptions: those would hold the frames of the model's forward.
        self._ambiguous: Optional[str] = None
        self._misfit: Optional[str] = None

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
            output = original(given)
            self._records = []
            self._record((given, ), {}, held)
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
        self._records, self._calls, self._taken = [], [], {}
        self._ambiguous = self._misfit = None

    @property
    def fired(self) -> bool:
        """Whether it has recorded a tensor since it was armed."""
        return bool(self._records)

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
        records, calls, taken = self._records, tuple(self._calls), self._taken
        ambiguous, misfit = self._ambiguous, self._misfit
        self.clear()
        if not records:
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
        return recorded

    def _record(self, args: Tuple[Any, ...], kwargs: Any, output: Any) -> None:
        self.calls += 1
        if self.structured:
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
            if not sizes and 'backbone' in self.path:
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
