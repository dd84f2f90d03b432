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
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

#: After the path of a residual block: the sum that its last ReLU takes, which no module returns.
PRE_RELU = ':pre_relu'


class StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """Raised by the last tap of a teacher: nothing after it is needed."""


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


def _sizes_in(values: Sequence[Any]) -> List[Tuple[int, int]]:
    """Pairs of ints among the arguments or results of a call: the (H, W) that token modules pass along."""
    pairs = []
    for value in values:
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
                pairs.append((int(value[0]), int(value[1])))
            else:
                pairs.extend(_sizes_in(list(value)))
        elif isinstance(value, torch.Size) and len(value) == 2:
            pairs.append((int(value[0]), int(value[1])))
    return pairs


def guess_size(tokens: int, input_shape: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
    """(H, W) of ``tokens`` cells over an input, if some stride from 1 to 64 explains it."""
    if input_shape is None:
        return None
    height, width = input_shape
    for stride in range(1, 65):
        for rounding in (math.ceil, math.floor):
            size = (int(rounding(height / stride)), int(rounding(width / stride)))
            if size[0] * size[1] == tokens:
                return size
    return None


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

    A tuple, list or dict output gives one tensor an item; repeated calls (a head shared by the levels) one a call.
    (N, L, C) tokens become maps when the size is known: from an (H, W) pair among the arguments or results of the
    call, else, below a ``backbone``, from the input's shape.

    At ``'...:pre_relu'`` it is what the block's ``relu`` was given the last time: the sum with the shortcut.
    """

    def __init__(self, model: nn.Module, path: str, side: str = 'model',
                 keep: Optional[Callable[['Tap'], None]] = None, structured: bool = False):
        self.path, self.side, self.keep, self.structured = path, side, keep, structured
        self.owner, self.name = resolve(model, path, side)
        self.calls = 0
        self._input_shape: Optional[Tuple[int, int]] = None
        self._before: Any = None  # an instance attribute of that name that was there before us
        self._armed = False
        self._copy = True
        self._records: List[Tuple[Tensor, Tensor, int]] = []  # value, watched original, its version
        self._calls: List[Call] = []

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
        self._before = vars(self.owner).get(self.name)

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
        # Past nn.Module.__setattr__, which has no business with a function.
        object.__setattr__(self.owner, self.name, closure)
        self._armed = True

    def disarm(self) -> None:
        """Restore the module; what was recorded stays until :meth:`read` or :meth:`clear`."""
        if not self._armed:
            return
        self._armed = False
        if self._before is not None:
            object.__setattr__(self.owner, self.name, self._before)
            self._before = None
        else:
            object.__delattr__(self.owner, self.name)

    def clear(self) -> None:
        """Restore the module and forget what was recorded; doing it twice is harmless."""
        self.disarm()
        self._records, self._calls = [], []

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
        """
        records, calls = self._records, tuple(self._calls)
        self.clear()
        if not records:
            raise RuntimeError(f'{self.side}: the tap {self.path!r} did not fire in this forward pass. The module is '
                               'not used in this mode (training loss); tap another one')
        overwritten = any(original._version != version for _, original, version in records)
        if overwritten and not self._copy:
            self._copy = True
            raise RuntimeError(f'{self.side}: the output of {self.path!r} was overwritten in place in this step but '
                               'not in the steps before; tap the activation after it instead')
        self._copy = overwritten
        recorded = Recorded(value for value, _, _ in records)
        recorded.calls, recorded.owner, recorded.memo = calls, self.owner, {}
        return recorded

    def _record(self, args: Tuple[Any, ...], kwargs: Any, output: Any) -> None:
        self.calls += 1
        if self.structured:
            self._calls.append(Call(args, kwargs, _frozen(output, self._copy)))
        found = tensors_in(output)
        sizes = None
        for tensor in found:
            value = tensor
            if tensor.dim() == 3:
                if sizes is None:
                    sizes = _sizes_in([*args, *kwargs.values(), *(output if isinstance(output, tuple) else ())])
                size = next((pair for pair in sizes if 0 <= tensor.shape[1] - pair[0] * pair[1] <= 16), None)
                if size is None and 'backbone' in self.path:
                    size = guess_size(tensor.shape[1], self._input_shape) or guess_size(
                        tensor.shape[1] - 1, self._input_shape)
                if size is not None:
                    value = tokens_to_map(tensor, size)
            if self._copy and value.data_ptr() == tensor.data_ptr():
                value = value.clone()
            self._records.append((value, tensor, tensor._version))
        if self.keep is not None:
            self.keep(self)


def read_taps(taps: Sequence['Tap']) -> Dict[str, Recorded]:
    """What each of the taps recorded, by path."""
    return {tap.path: tap.read() for tap in taps}


def image_size(images: Tensor) -> Tuple[int, int]:
    """(H, W) of a batch of images."""
    return images.shape[-2], images.shape[-1]
