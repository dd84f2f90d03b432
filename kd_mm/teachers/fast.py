"""A frozen teacher in its fastest correct form.

The form is a fixed rule by model and device (:mod:`kd_mm.teachers.speed`), not a clock: the same seed gives the same
numbers, and a cut run equals the uncut one.  Before a tap is used in another form than the host's own, the form is
checked: on the first real batch that the tap sees in it, both run in float32 and are compared.
"""

import dataclasses
import time
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_mm.hosts.swap import swapped
from kd_mm.hosts.taps import Tap
from kd_mm.ops import distributed
from kd_mm.ops.live import LiveBytes
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.words import count
from kd_mm.teachers import chunk, kernels
from kd_mm.teachers.attention import without_weights
from kd_mm.teachers.compiled import Compiled
from kd_mm.teachers.flow import Flow, Pair, plain_attention, plain_layer, watch_flow
from kd_mm.teachers.fold import FlowChanged, Folding
from kd_mm.teachers.layout import operators, slow, usual_in
from kd_mm.teachers.packed import Packing, WeightsChanged
from kd_mm.teachers.recorded import as_host, distance, put_back
from kd_mm.teachers.sampling import namespaces, sampling_in
from kd_mm.teachers.shared import Shared
from kd_mm.teachers.side_stream import SideStream
from kd_mm.teachers.speed import AUTO, LARGE, TOLERANCE, Speed, dtype_around, in_precision
from kd_mm.teachers.tune import Tuning, candidates
from kd_mm.types.records import Recorded

#: A pass of the host's model that fills the taps.
Forward = Callable[[Tensor, Any, Sequence[Tap]], None]


class Fast:
    """Runs a teacher's forward in another form than the host's own.

    Args:
        model: of the teacher.
        speed: the form that is asked for.
        forward: a pass of the model as the host runs it, as far as the last tap.
        name: of the teacher, for the log.
        fixed: whether the weights stay as they are.

    Attributes:
        speed: the form that is used: what did not hold is gone.
        checked: paths of the taps that were compared, with the word of the layout where that depends on the batch.
    """

    def __init__(self, model: nn.Module, speed: Speed, forward: Forward, name: str, fixed: bool):
        self.model, self.speed, self.asked = model, speed, speed
        self.forward, self.name = forward, name
        self.checked: Set[str] = set()
        self.dropped: Set[str] = set()
        self._told = ''  # the form that the log has last
        self.used = speed  # what of it changes something in this model
        self.packing = Packing(fixed)
        self.folding = Folding([], fixed, self.packing)
        self.attentions: List[nn.MultiheadAttention] = []
        self.layers: List[kernels.Layer] = []
        self.usual, self.slow = operators(model), slow(model)  # what does not know of channels last, or is slow with it
        self.spaces = namespaces(model)  # where it finds the host's function for samples
        self._dry: Set[str] = set()  # paths of the taps that were there in every watched pass
        self._fixed, self._watched = fixed, False
        #: bytes that one image needs for a while in the dry pass, and that the student keeps of one; 0: not known.
        self.needed = self.budget = 0.0
        #: pixels of such an image; and bytes of the student's gradients, of which none is there while the teacher runs.
        self._area, self.gradients = 0, 0.0
        #: how the records of parts are joined, by path; and why that is not possible.
        self.plans: Dict[str, Sequence[chunk.Dimension]] = {}
        self.refusal: Optional[str] = None
        #: why the precision that is asked for is not possible.
        self.fault: Optional[str] = None
        self.side: Optional[SideStream] = None
        self.compiled: Optional[Compiled] = None
        self.shared: Optional[Shared] = None
        self.tuning = Tuning(candidates(speed)) if speed.tune else None
        #: whether the next pass has to be the first one again.
        self.unseen = False

    def anew(self, model: nn.Module) -> 'Fast':
        """The same form for a model that is made of other modules than before."""
        fast = Fast(model, self.asked, self.forward, self.name, self._fixed)
        fast.budget, fast.gradients, fast.unseen = self.budget, self.gradients, True
        if self.shared is not None:
            fast.shared = Shared(self.shared.student, model)
        return fast

    # ------------------------------------------------------------------ before the training

    def dry(self, images: Tensor, samples: Any, taps: Sequence[Tap], whole: Forward) -> None:
        """The first pass: find what can be folded, what it needs, and how a batch in parts is joined.

        Args:
            images, samples, taps: see :meth:`run`.
            whole: a pass to the end of the model, which counts the calls of the taps.
        """
        self.unseen = False
        looking = self.shared.looking(images) if self.shared is not None else nullcontext()
        if self.speed.exact:
            with looking:
                whole(images, samples, taps)
            return
        try:
            with self._watching(images, {tap.path for tap in taps}), looking:
                whole(images, samples, taps)
        except Exception:  # the model's own error comes again
            whole(images, samples, taps)
        if all(tap.fired for tap in taps):
            if self.speed.chunk:
                self._learn_parts(images, samples, taps)
            if self.speed.precision:
                self._try_precision(images, samples, taps)

    def _try_precision(self, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """Whether every operation of the model is there in the precision that is asked for."""
        with put_back(taps):
            try:
                with in_precision(images.device, self.speed.precision):
                    self.forward(images, samples, taps)
                self.fault = None
            except Exception as error:  # operators of a host's own have float32 only
                self.fault = f'{type(error).__name__}: {error}'

    @contextmanager
    def _watching(self, images: Tensor, paths: Set[str]) -> Iterator[None]:
        flow: Flow = watch_flow(self.model)
        with flow.watching():
            yield
        pairs, attentions = flow.pairs((images.shape[-2], images.shape[-1])), flow.attentions
        if self._watched:  # a second pass leaves what was proven in both
            before = {folded.pair.name: folded.pair for folded in self.folding.pairs}
            pairs = [both for pair in pairs if (both := _proven_twice(pair, before.get(pair.name))) is not None]
            attentions = [module for module in attentions if module in self.attentions]
        self._dry = self._dry & paths if self._watched else paths
        self.folding, self.attentions, self._watched = Folding(pairs, self._fixed, self.packing), attentions, True
        layers: List[Any] = [module for module in self.model.modules() if plain_layer(module)]
        self.layers = [layer for layer in layers if flow.calls.get(layer)]

    def _learn_parts(self, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """Find how the records of parts are joined, from the whole (in the taps) and one part an image."""
        if images.shape[0] < 2:
            self.refusal = 'the first pass had one image, from which nothing is known of several'
            return
        with put_back(taps) as whole:
            try:
                self._join_parts(images, samples, taps, whole)
            except Exception as error:  # a model may need what only whole batches have
                self.refusal = f'{type(error).__name__}: {error}' if not isinstance(error, ValueError) else str(error)

    def _join_parts(self, images: Tensor, samples: Any, taps: Sequence[Tap], whole: Mapping[str, Recorded]) -> None:
        parts, self._area = [], images.shape[-2] * images.shape[-1]
        for part in chunk.slices(images.shape[0], 1):
            with LiveBytes() as made:
                self.forward(images[part], chunk.part_of(samples, part), taps)
            self.needed = max(made.peak - made.held, 1)  # what is held at the end is what was tapped
            parts.append({tap.path: tap.read() for tap in taps})
        for path, record in whole.items():
            found = [part[path] for part in parts]
            self.plans[path] = chunk.plan(record, found)
            far = distance(chunk.join(found, self.plans[path]), record)
            if far > TOLERANCE:
                raise ValueError(f'{path!r} differs by {far:.1e}: its images depend on each other')

    def parts(self, count: int, area: int = 0) -> int:
        """How many of ``count`` images of ``area`` pixels (0: as in the dry pass) it sees at a time.

        The plain step needs the memory of what the student keeps when its backward pass begins, and that of all
        gradients when it ends; while the teacher runs neither is there (the gradients are where they are accumulated),
        and it may have the larger of both.
        """
        size = self.speed.chunk
        if size == AUTO:
            scale = area / self._area if area and self._area else 1.0
            room = max(count * self.budget * scale, self.gradients)
            # 0: the needs are not known
            size = max(1, int(room / (self.needed * scale))) if self.budget and self.needed else None
        return count if size is None or self.refusal else min(size, count)

    def _size(self, images: Tensor) -> int:
        return self.parts(images.shape[0], images.shape[-2] * images.shape[-1])

    # ------------------------------------------------------------------ a step

    def run(self, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """One pass that fills the taps.

        Args:
            images: (N, C, Hin, Win), as the teacher wants them.
            samples: data samples of the host.
            taps: of this step.
        """
        if not self.speed.exact and any(key not in self.checked for key in self._keys(taps, images)):
            self._check(images, samples, taps)
        elif self.tuning is not None:
            self._tune(self.tuning, images, samples, taps)
        elif self.speed.exact and self.shared is None:
            self.forward(images, samples, taps)
        elif self.speed.stream:
            self.side = self.side or SideStream(images.device)
            with self.side.running([images]):
                self._run(self.speed, images, samples, taps)
        else:
            self._run(self.speed, images, samples, taps)

    def _tune(self, tuning: Tuning, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """One step with one of the forms; after the last the fastest is kept."""
        number = tuning.next()
        form = tuning.forms[number]
        self._wait(images.device)
        start = time.perf_counter()
        failed = tuning.fails(number)
        if not failed:
            try:
                self._run(form, images, samples, taps)
            except Exception as error:
                if number == 0:
                    raise
                failed = True
                self._say(f'{form.words} fails ({type(error).__name__}: {error}); this form is left out', 30)
        if failed:
            tuning.leave_out(number)
            self._run(tuning.forms[0], images, samples, taps)
        else:
            self._wait(images.device)
            tuning.note(number, time.perf_counter() - start, images.numel())
        if tuning.done:
            self.speed, table = tuning.result(images.device)
            self.tuning, self.used = None, self._for(self.speed, images)
            self._say(f'{self.speed.says} from now on\n{table}')

    @staticmethod
    def _wait(device: torch.device) -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    def join(self, records: Iterable[Recorded]) -> None:
        """Before anything looks at what was recorded: let it be there."""
        if self.side is not None:
            self.side.join(tensor for record in records for tensor in chunk.tensors_of(record))

    def _run(self, form: Speed, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        known = all(tap.path in self.plans for tap in taps)  # of a tap that comes later nothing was learned
        size = self._size(images) if form.chunk and known else images.shape[0]
        form = self._for(form, images)
        if size >= images.shape[0]:
            self._shared(form, images, samples, taps)
            return
        found: Dict[str, List[Recorded]] = {tap.path: [] for tap in taps}
        for part in chunk.slices(images.shape[0], size):
            self._pass(form, images[part], chunk.part_of(samples, part), taps)
            for tap in taps:
                found[tap.path].append(tap.read())
        for tap in taps:
            tap.put(chunk.join(found.pop(tap.path), self.plans[tap.path]))

    def _shared(self, form: Speed, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """The whole batch in one pass, whose start the student may share."""
        shared = self.shared
        if shared is None or form.compile or form.stream or form.precision or self.tuning is not None or any(
                key not in self.checked for key in self._keys(taps, images) if not self.speed.exact):
            self._pass(form, images, samples, taps)
        else:
            self._pass(form, images, samples, taps, shared if shared.start() else None)

    def _for(self, form: Speed, images: Tensor) -> Speed:
        """What of a form is used for these images, and changes something in this model."""
        small = images.shape[0] * images.shape[-2] * images.shape[-1] < LARGE
        cpu = images.device.type == 'cpu'
        library = form.onednn and cpu and kernels.available() and bool(self.layers or self.attentions)
        innermost = form.channels_last and not (small and form.chosen and not form.tune)
        return dataclasses.replace(
            form, fold=form.fold and bool(self.folding.pairs), onednn=library, channels_last=innermost,
            attention=form.attention and bool(self.attentions or cpu and self.spaces),
            pack=form.pack and library and innermost and bool(self.layers) and self.packing.fixed)

    def _keys(self, taps: Sequence[Tap], images: Tensor) -> List[str]:
        """What is checked once: each tap, and once more where a larger batch takes another layout.

        With several ranks both layouts are checked at once: the larger batch may come on one rank alone, and what
        holds is decided by all.
        """
        layout = ' (channels last)' if distributed.world_size() == 1 and self._for(
            self.speed, images).channels_last else ''
        return [f'{tap.path}{layout}' for tap in taps]

    def _layouts(self, form: Speed, images: Tensor) -> List[Speed]:
        """A form in each layout that is to be checked on these images; the last one is theirs."""
        if distributed.world_size() == 1 or not form.chosen or not form.channels_last:
            return [form]
        own = self._for(form, images).channels_last
        return [dataclasses.replace(form, channels_last=innermost, tune=innermost) for innermost in (not own, own)]

    def _pass(self, form: Speed, images: Tensor, samples: Any, taps: Sequence[Tap],
              shared: Optional[Shared] = None) -> None:
        precision = in_precision(images.device, form.precision)
        wanted = dtype_around(images.device)
        given = images.contiguous(memory_format=torch.channels_last) if form.channels_last else images
        with precision, ExitStack() as stack:
            kept = {id(tap.owner) for tap in taps}  # modules that are to be as they are
            usual = self.usual if form.channels_last else []
            if form.compile:
                self.compiled = self.compiled or Compiled(
                    self.model, 'inductor' if form.compile is True else str(form.compile))
                kept |= stack.enter_context(self.compiled.on(taps, usual))
            stack.enter_context(usual_in(usual))
            for module in self.attentions if form.attention else ():
                if plain_attention(module) and id(module) not in kept:
                    stack.enter_context(swapped(module, 'forward', without_weights(
                        module, module.forward, form.onednn)))
            if shared is not None:
                kept |= shared.modules
                stack.enter_context(shared.teaching(images, given))
            for space in self.spaces if form.attention and images.device.type == 'cpu' else ():
                stack.enter_context(sampling_in(space))
            self.packing.look()
            self.folding.guarded = lambda: None if shared is None else shared.held
            self._folded(form, given, samples, taps, kept)
        if form.channels_last or form.precision:
            for tap in taps:
                if tap.fired:
                    tap.put(as_host(tap.read(), wanted if form.precision else None))

    def _folded(self, form: Speed, images: Tensor, samples: Any, taps: Sequence[Tap], kept: Set[int]) -> None:
        """The pass with its layers in their form; again where the flow is another than the one that was watched."""
        recorded = {id(tap.owner) for tap in taps} - (set() if self.shared is None else self.shared.modules)
        self.packing.on = form.pack
        try:
            with ExitStack() as stack:
                if form.fold:
                    stack.enter_context(self.folding.on(
                        images, kept, {tap.path for tap in taps} <= self._dry, form.onednn))
                for layer in self.layers if form.onednn else ():
                    # what is recorded is its result, however it was made
                    if kernels.takes(layer) and plain_layer(layer) and (
                            id(layer) not in kept or id(layer) in recorded):
                        stack.enter_context(swapped(layer, 'forward', kernels.direct(
                            layer, layer.forward, self.packing)))
                stack.enter_context(usual_in([
                    layer for layer in self.slow if form.channels_last and images.device.type == 'cpu'
                    and plain_layer(layer) and (id(layer) not in kept or id(layer) in recorded)]))
                self.forward(images, samples, taps)
        except FlowChanged as change:
            self._drop(change.pair.name)
            self._folded(form, images, samples, taps, kept)
        except WeightsChanged:  # nothing is kept now: it comes once
            self._folded(form, images, samples, taps, kept)

    def _drop(self, name: str) -> None:
        self.dropped.add(name)
        for folded in list(self.folding.pairs):
            if folded.pair.name == name:
                self.folding.drop(folded.pair)
        self._say(f'the norm after {name} is not folded any more: in this step something else used what is before it',
                  30)

    def _say(self, text: str, level: int = 20) -> None:
        print_log(f'kd_mm: {self.name}: {text}', 'current', level=level)

    # ------------------------------------------------------------------ the check

    def _check(self, images: Tensor, samples: Any, taps: Sequence[Tap]) -> None:
        """Compare the form with the host's own forward, drop what does not hold, and fill the taps."""
        mixed = dtype_around(images.device) != torch.float32
        with in_precision(images.device, 'fp32'):
            with preserved_random_state(device=images.device):
                self._run(Speed(chunk=self.speed.chunk), images, samples, taps)
            exact = {tap.path: tap.read() for tap in taps}
            found: Optional[Dict[str, Recorded]] = exact
            tried: Dict[Any, str] = {}
            for form in self._candidates():
                layouts = self._layouts(form, images)
                every = [self._for(each, images) for each in layouts]
                used, key = every[-1], frozenset(every)
                self.used = used
                if form.idle(used) and not self.checked:
                    self._say(f'speed: {", ".join(form.idle(used))}: nothing is here that this is for')
                if all(each.exact for each in every):
                    found, self.speed = exact, form
                    break
                if key in tried:  # it differs from one that does not hold in what is not used here
                    continue
                for each in layouts:
                    error, found = self._difference(each, images, samples, taps, exact)
                    if found is None:
                        break
                if not distributed.everywhere(found is not None, images.device):
                    tried[key] = f'{form.words}: it does not hold on another rank' if found is not None else (
                        f'{self._for(each, images).words}: {error}')
                    continue
                self.speed = form
                if self.tuning is not None:  # what did not hold is not tried
                    self.tuning = Tuning(candidates(dataclasses.replace(
                        form, attention=used.attention, onednn=used.onednn, pack=used.pack)))
                    break
                words = f'{used.says}{self._count(used, images)}'
                if words != self._told:  # taps that come later in the training are checked as well
                    self._say(f'{words}; on this batch its taps are {error} of the exact forward'
                              f'{self._lower(images, samples, taps, exact)}')
                self._told = words
                break
        if tried:
            self._say(f'what is not within {TOLERANCE:g} of the exact forward on this batch is left out. '
                      f'{"; ".join(tried.values())}')
        self.checked.update(self._keys(taps, images))
        if mixed or self.speed.precision or found is None:
            self.run(images, samples, taps)
            return
        for tap in taps:
            tap.put(found[tap.path])

    def _count(self, form: Speed, images: Tensor) -> str:
        norms = sum(folded.pair.norm is not None for folded in self.folding.pairs)
        counts = [count(norms, 'norm')] if form.fold and norms else []
        counts += [count(len(self.attentions), 'attention')] if form.attention and self.attentions else []
        size = self._size(images) if form.chunk == AUTO else images.shape[0]  # else the form names it
        counts += [f'{count(size, "image")} at a time'] if size < images.shape[0] else []
        return f' ({", ".join(counts)})' if counts else ''

    def _lower(self, images: Tensor, samples: Any, taps: Sequence[Tap], exact: Mapping[str, Recorded]) -> str:
        """How far the precision that is asked for is from the exact forward; '' without one."""
        if self.speed.precision in (None, 'fp32') or self.fault is not None:
            return ''
        with preserved_random_state(device=images.device):
            self._run(self.speed, images, samples, taps)
        far = max(distance(tap.read(), exact[tap.path]) for tap in taps)
        return f' in float32, and within {far:.1e} in {self.speed.precision}'

    def _candidates(self) -> List[Speed]:
        """The form, and what to try where it does not hold."""
        if not self.speed.chosen:
            return [self.speed]
        forms = [self.speed, dataclasses.replace(self.speed, channels_last=False),
                 dataclasses.replace(self.speed, attention=False), dataclasses.replace(self.speed, onednn=False),
                 dataclasses.replace(self.speed, fold=False),
                 Speed(chunk=self.speed.chunk, chosen=True), Speed(chosen=True)]
        return list(dict.fromkeys(forms))

    def _difference(self, form: Speed, images: Tensor, samples: Any, taps: Sequence[Tap],
                    exact: Mapping[str, Recorded]) -> Tuple[str, Optional[Dict[str, Recorded]]]:
        """How far a form is from the exact forward, in words, and what it gave; None if that is too far."""
        try:
            with preserved_random_state(device=images.device):
                self._run(dataclasses.replace(form, precision=None), images, samples, taps)
            found = {tap.path: tap.read() for tap in taps}
        except Exception as error:  # a host's `view` of a map in another layout raises
            for tap in taps:
                tap.clear()
            if not form.chosen:
                raise
            return f'its forward fails ({type(error).__name__}: {error})', None
        far, path = max((distance(found[path], exact[path]), path) for path in exact)
        words = f'within {far:.1e}'
        if far <= TOLERANCE:
            return words, found
        words = f'{far:.1e} at {path!r}, relative to its largest value'
        if form.chosen:
            return f'it differs by {words}', None
        self._say(f'{form.words}: its taps differ from the exact forward by {words}', 30)
        return words, found

    # ------------------------------------------------------------------ a resume

    def state(self) -> Dict[str, Any]:
        """What was decided on real batches, for a resume."""
        return dict(asked=dataclasses.asdict(self.asked), form=dataclasses.asdict(self.speed),
                    checked=sorted(self.checked), dropped=sorted(self.dropped),
                    tuning=None if self.tuning is None else self.tuning.state())

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state` says, if the same was asked for."""
        asked, now = dict(state.get('asked', {})), dataclasses.asdict(self.asked)
        if not asked or any(now.get(key, value) != value for key, value in asked.items()):
            return
        self.speed = self.used = Speed(**state['form'])
        if state['tuning'] is None:
            if self.tuning is not None:
                self._say(f'{self.speed.says}, as the training that goes on has chosen')
            self.tuning = None
        elif self.tuning is not None:
            self.tuning.load(state['tuning'])
        self.checked = set(state['checked'])
        for folded in list(self.folding.pairs):
            if folded.pair.name in state['dropped']:
                self.folding.drop(folded.pair)
        self.dropped = set(state['dropped'])


def _proven_twice(pair: Pair, before: Optional[Pair]) -> Optional[Pair]:
    """What two passes have shown; None for nothing."""
    if before is None or before.norm is not pair.norm or before.activation is not pair.activation:
        return None
    return dataclasses.replace(pair, summed=pair.summed and before.summed)
