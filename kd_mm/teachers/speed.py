"""``speed=`` of a teacher: in which form it runs."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch

from kd_mm.ops.checks import boolean, one_of, whole
from kd_mm.ops.modes import autocast_dtype
from kd_mm.ops.words import count

#: A fixed rule by model and device chooses the form, and each part must hold on the first batch.
AUTO = 'auto'
#: The host's own forward, bit for bit.
EXACT = 'exact'
#: Forms are tried in turn in the first steps, and the fastest is kept.
TUNE = 'tune'
#: ``precision`` by name.
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
#: How far a tap may be from the exact forward, relative to its largest value, for a form to be taken by itself.
TOLERANCE = 1e-4
#: From how many pixels of a batch on maps are laid out with the channels innermost by themselves: R101 took 0.8 of the
#: time of the host's layout with 31 thousand pixels already (one thread of a CPU), but the library lays out a copy of a
#: convolution's weights for it, which is more memory than such small maps need.
LARGE = 2**16


@dataclass(frozen=True)
class Speed:
    """In which form a teacher runs; the defaults are the host's own forward.

    Attributes:
        fold: batch norms in eval mode become part of the convolution before them, as do the residual sum and the
            activation after them where the processor's library has one operation for all.
        attention: an attention whose weights nobody looks at does not make them, which lets torch use its fused kernel;
            on a CPU deformable attention reads and sums its samples by one operation.
        onednn: on a CPU convolutions and linear layers in float32 run by the processor's library where torch would take
            something slower.
        pack: with ``onednn`` and ``channels_last``, weights of convolutions with small maps are kept in the library's
            own layout: a second copy of them, for the time that this takes in each pass; of a teacher whose weights
            stay as they are.
        channels_last: images and maps are laid out with the channels innermost.
        precision: ``'fp32'``, ``'bf16'`` or ``'fp16'``; None for that of the training.
        chunk: how many images it sees at a time; None for all, ``'auto'`` for as many as need no more memory than the
            student.
        compile: the parts in which nothing is tapped go through ``torch.compile``, which takes its time in the first
            steps, and no norm is folded there; True, or the name of a backend.
        stream: on CUDA it runs on a stream of its own, beside the student's forward; both need their memory at once.
        chosen: whether the form was chosen by itself: then what does not hold is dropped.
        tune: whether it is chosen by trying.
    """

    fold: bool = False
    attention: bool = False
    onednn: bool = False
    pack: bool = False
    channels_last: bool = False
    precision: Optional[str] = None
    chunk: Any = None
    compile: Any = False
    stream: bool = False
    chosen: bool = False
    tune: bool = False

    @property
    def exact(self) -> bool:
        """Whether this is the host's own forward."""
        return not (self.fold or self.attention or self.onednn or self.channels_last or self.precision or self.chunk
                    or self.compile or self.stream)

    @property
    def words(self) -> str:
        """The form in words, for the log."""
        parts = [word for word, taken in (
            ('norms folded', self.fold), ('fused attention', self.attention),
            ('by oneDNN', self.onednn), ('weights packed', self.onednn and self.pack),
            ('channels last', self.channels_last), (str(self.precision), self.precision),
            (f'{count(self.chunk, "image")} at a time' if isinstance(self.chunk, int) else '',
             self.chunk not in (None, AUTO)),
            ('parts compiled', self.compile), ('on a stream of its own', self.stream)) if taken]
        return ', '.join(parts) or 'as the host runs it'

    @property
    def says(self) -> str:
        """What a line of the log says that it does.

        Example:
            >>> Speed(fold=True).says, Speed(onednn=True).says, Speed().says
            ('runs with norms folded', 'runs with layers by oneDNN', 'runs as the host runs it')
        """
        words = self.words
        return f'runs {words}' if words.startswith(('as ', 'on ')) else (
            f'runs with {"layers " if words.startswith("by ") else ""}{words}')

    def idle(self, used: 'Speed') -> List[str]:
        """What is asked for by name, and is not in the form that is used."""
        return [] if self.chosen else [
            name for name in ('fold', 'attention', 'onednn', 'pack') if getattr(self, name) > getattr(used, name)]


def speed_of(owner: str, value: Any, device: torch.device) -> Speed:
    """What ``speed=`` says, for a device.

    Args:
        owner: word for messages.
        value: ``'auto'``, ``'exact'``, ``'tune'`` or a dict of the fields of :class:`Speed`; what it leaves out is as
            the host runs it.
        device: where the teacher is.

    Raises:
        ValueError: another word, an unknown key or a wrong value.

    Example:
        >>> speed_of('teacher', dict(fold=True, precision='bf16'), torch.device('cpu')).words
        'norms folded, bf16'
    """
    if isinstance(value, Speed):
        return value
    if not isinstance(value, Mapping):
        word = one_of(owner, 'speed', value, (AUTO, EXACT, TUNE)) if isinstance(value, str) else None
        if word is None:
            raise ValueError(f'{owner}: speed={value!r} must be {AUTO!r}, {EXACT!r}, {TUNE!r} or a dict of '
                             f'{", ".join(_CHECKS)}')
        if word == TUNE:
            return replace(automatic(device), channels_last=True, tune=True)
        return automatic(device) if word == AUTO else Speed()
    unknown = sorted(set(value) - set(_CHECKS))
    if unknown:
        raise ValueError(f'{owner}: speed has no {unknown[0]!r}; it takes {", ".join(_CHECKS)}')
    checked: Dict[str, Any] = {key: _CHECKS[key](f'{owner}: speed', key, entry) for key, entry in value.items()}
    if checked.get('stream') and device.type != 'cuda':
        raise ValueError(f'{owner}: speed: stream=True is for CUDA, and it is on {device.type}. Leave it out')
    if checked.get('pack') and not (checked.get('onednn') and checked.get('channels_last')):
        raise ValueError(f'{owner}: speed: pack=True keeps weights for onednn=True and channels_last=True: say '
                         'both, or leave it out')
    return Speed(**checked)


def dtype_around(device: torch.device) -> torch.dtype:
    """The dtype of the training: that of an autocast around, else float32."""
    return autocast_dtype(device.type) or torch.float32


def in_precision(device: torch.device, precision: Optional[str]) -> Any:
    """A context of a precision by name; None for what is around."""
    if precision is None:
        return nullcontext()
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, enabled=dtype != torch.float32,
                          dtype=None if dtype == torch.float32 else dtype)


def automatic(device: torch.device) -> Speed:
    """The rule of ``'auto'``: what was measured to be faster on this kind of device."""
    cpu = device.type == 'cpu'
    return Speed(fold=True, attention=True, onednn=cpu, pack=cpu, channels_last=cpu, chunk=AUTO, chosen=True)


def _backend(owner: str, name: str, value: Any) -> Any:
    """A truth value, or one of the backends of ``torch.compile``."""
    if not isinstance(value, str):
        return boolean(owner, name, value)
    known = torch._dynamo.list_backends(exclude_tags=())
    return value if value in known else one_of(owner, name, value, (True, False, *torch._dynamo.list_backends()))


def _chunk(owner: str, name: str, value: Any) -> Any:
    """A number of images, or what stands for one."""
    if value is None or isinstance(value, str) and value == AUTO:
        return value
    try:
        return whole(owner, name, value)
    except ValueError as error:
        raise ValueError(f'{error} (images at a time), or {AUTO!r}') from None


_CHECKS: Dict[str, Callable[[str, str, Any], Any]] = dict(
    fold=boolean, attention=boolean, onednn=boolean, pack=boolean, channels_last=boolean,
    precision=lambda owner, name, value: value if value is None else one_of(owner, name, value, tuple(PRECISIONS)),
    stream=boolean, compile=_backend,
    chunk=_chunk)
