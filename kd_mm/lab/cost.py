"""What distillation costs: time and memory of a training step with and without it, and of every term by itself.

``tools/measure.py`` and ``tools/studies/cost.py`` are command lines over this module.
"""

import copy
import gc
import itertools
import os
import statistics
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.term import STUDENT, Term, need_masks
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.swap import swapped
from kd_mm.hosts.taps import StopForward, Tap
from kd_mm.lab.configs import hook_arguments, hook_entries
from kd_mm.lab.meters import _bytes, allocation_peak, count_flops, memory_rise
from kd_mm.lab.models import build_student, make_distiller, probe_step, random_batch, scope_of
from kd_mm.lab.recording import Recording
from kd_mm.losses.base.loss import opponents_of
from kd_mm.ops.problems import Problems
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.sources import SELF
from kd_mm.teachers.spec import RANDOM

#: Rounds before the measured ones: the allocator, the kernels' caches and the taps settle.
WARMUP = 3
#: What is short is repeated until so many milliseconds are full, but at most so many times as often as asked for.
ENOUGH_MS, MOST = 1000.0, 5


def _is_model(teacher: Any) -> bool:
    return not (isinstance(teacher, str) and teacher == SELF)


class Bench:
    """The student of a config with its optimizer and one batch; the distiller comes with :meth:`distil`.

    Args:
        cfg: a config of :func:`kd_mm.lab.configs.read_config`.
        batch: number of random images.
        shape: (H, W) of the images.
        device: where everything runs.
        augment: let the data preprocessor's batch augmentations change the size. Default True.
    """

    distiller: Distiller
    teacher: Teacher

    def __init__(self, cfg: Config, batch: int, shape: Tuple[int, int], device: Any, augment: bool = True):
        self.cfg, self.device = cfg, torch.device(device)
        self.student: Any = build_student(cfg, self.device).train()
        self._given = batch, shape, augment
        self.data = self._random_data(masks=False)
        self.optim_wrapper = build_optim_wrapper(self.student, copy.deepcopy(cfg.optim_wrapper))
        self._freeze_rates()

    def _random_data(self, masks: bool) -> Dict[str, Any]:
        batch, shape, augment = self._given
        preprocessor: Any = self.student.data_preprocessor
        changes = not augment and getattr(preprocessor, 'batch_augments', None) is not None
        with swapped(preprocessor, 'batch_augments', None) if changes else nullcontext():
            return random_batch(self.student, batch, shape, self.device, masks=masks)

    def _freeze_rates(self) -> None:
        # A rate of 0 costs as much as any other; with a larger one a random teacher could drive the weights to NaN,
        # whose arithmetic has another speed.
        for group in self.optim_wrapper.optimizer.param_groups:
            group['lr'] = 0.0

    def distil(self, arguments: Dict[str, Any], trained: bool = True) -> None:
        """Build the distiller with a random teacher, and give its extras to the optimizer as the hook does.

        Args:
            arguments: of the hook.
            trained: whether the optimizer gets the extras; without, no step with distillation can be timed.
        """
        if arguments.get('teachers') is not None or not _is_model(arguments.get('teacher')):
            raise ValueError('the cost is measured for one teacher with a model of its own; this config has several '
                             "teachers, or teacher='self'")
        self.distiller = make_distiller(self.cfg, self.student, dict(
            arguments, teacher_ckpt=RANDOM, agreement=0))  # measured by itself: not in every step
        if self.distiller.peers:
            raise ValueError('the cost is measured for a fixed teacher; a peer (PeerTeacher) makes a whole training '
                             'step of its own. Compare the times of two short trainings, with and without it')
        self.distiller.train()
        if need_masks(self.distiller.all_terms()):
            self.data = self._random_data(masks=True)
        self.distiller.step = probe_step(self.distiller)
        assert self.distiller.teacher is not None
        self.teacher = self.distiller.teacher
        parameters = [parameter for parameter in self.distiller.parameters() if parameter.requires_grad]
        if parameters and trained:
            self.optim_wrapper.optimizer.add_param_group({'params': parameters})
            self._freeze_rates()
        self._find_last_tap()

    def _find_last_tap(self) -> None:
        """Which teacher tap fires last, and at which of its calls: so far the teacher has to run, and no further."""
        self.batch = self.distiller.current.batch_of(self.data['inputs'], self.data['data_samples'])
        self.teacher_paths = paths_of(self.distiller.active_terms(), 'teacher')
        #: paths in the order in which the taps of the teacher fire.
        self.order: List[str] = []
        self._stops: Dict[Tuple[str, ...], Tuple[Tap, int]] = {}
        taps = [Tap(self.teacher.model, path, 'teacher', keep=lambda tap: self.order.append(tap.path))
                for path in self.teacher_paths]
        try:
            for tap in taps:
                tap.arm(tuple(self.data['inputs'].shape[-2:]))
            self.full_teacher(self.fresh())
        finally:
            for tap in taps:
                tap.clear()
        self.last_path, self.last_calls = self.stop_of(self.teacher_paths)

    def stop_of(self, paths: Sequence[str]) -> Tuple[str, int]:
        """Which of these teacher taps fires last, and at which of its calls."""
        fired = [path for path in self.order if path in paths]
        return fired[-1], fired.count(fired[-1])

    def fresh(self) -> Any:
        """Data samples that no earlier step has touched; made outside of what is timed."""
        return copy.deepcopy(self.data['data_samples'])

    # ------------------------------------------------------------------ what is timed

    def step(self, samples: Any) -> None:
        """Forward with losses, backward, optimizer step: what the model's own ``train_step`` does."""
        with self.optim_wrapper.optim_context(self.student):
            losses = self.student(self.data['inputs'], samples, mode='loss')
        total, _ = self.student.parse_losses(losses)  # type: ignore[operator]
        self.optim_wrapper.update_params(total)

    def kd_step(self, samples: Any) -> None:
        """The same with what an attached distiller does after it."""
        self.step(samples)
        self.distiller.after_step(rate=0.0)

    @torch.no_grad()
    def full_teacher(self, samples: Any, paths: Optional[Sequence[str]] = None) -> None:
        """The bare teacher to the end of its heads."""
        with self.optim_wrapper.optim_context(self.student):
            images, samples = self.teacher.prepare(self.data['inputs'], samples, self.batch)
            forward_tensor(self.teacher.model, images, samples, self.teacher_paths if paths is None else paths)

    def needed_teacher(self, samples: Any, paths: Optional[Sequence[str]] = None) -> None:
        """The bare teacher up to the last tap: no record, no counting of other taps, no check of flags.

        Args:
            samples: of :meth:`fresh`.
            paths: of the teacher's taps; None for those of all terms.
        """
        chosen = tuple(self.teacher_paths if paths is None else paths)
        if chosen not in self._stops:
            path, calls = self.stop_of(chosen)
            self._stops[chosen] = Tap(self.teacher.model, path, 'teacher'), calls
            self._stops[chosen][0]._copy = False  # it stands for the bare model, which copies nothing
        stopper, left = self._stops[chosen]

        def stop(_: Tap) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise StopForward

        stopper.keep = stop
        stopper.arm(tuple(self.data['inputs'].shape[-2:]))
        try:
            self.full_teacher(samples, chosen)
        except StopForward:
            pass
        finally:
            stopper.clear()

    def fast_teacher(self, samples: Any, paths: Optional[Sequence[str]] = None) -> None:
        """The same in the form that training uses (``speed=``), with the taps that it fills.

        Args:
            samples: of :meth:`fresh`.
            paths: of the teacher's taps; None for those of all terms.
        """
        taps = [tap for (name, path), tap in self.distiller.current.taps.items()
                if name in self.distiller.teachers and path in (self.teacher_paths if paths is None else paths)]
        with self.optim_wrapper.optim_context(self.student):
            self.teacher.run(self.data['inputs'], samples, taps, self.batch)
        for tap in taps:
            tap.clear()

    # ------------------------------------------------------------------ measurements

    def times(self, steps: int) -> Dict[str, List[float]]:
        """Milliseconds of every round, in turns that start with another of the five each time."""
        calls: Dict[str, Callable[[Any], None]] = {
            'plain_step': self.step, 'needed_teacher': self.needed_teacher, 'fast_teacher': self.fast_teacher,
            'full_teacher': self.full_teacher, 'kd_step': self.kd_step}
        names = list(calls)
        found: Dict[str, List[float]] = {name: [] for name in names}
        for turn in range(WARMUP + steps):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples = self.fresh()
                if name == 'kd_step':
                    self.distiller.attach()
                try:
                    elapsed = self._time(calls[name], samples)
                finally:
                    self.distiller.detach()
                if turn >= WARMUP:
                    found[name].append(elapsed)
        return found

    def _time(self, call: Callable[..., Any], *args: Any) -> float:
        self._synchronize()
        start = time.perf_counter()
        call(*args)
        self._synchronize()
        return (time.perf_counter() - start) * 1e3

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def _medians(self, turn: Callable[[], Sequence[float]], steps: int) -> List[float]:
        """Medians of what ``turn`` returns, of ``steps`` turns or more."""
        rounds: List[Sequence[float]] = []
        while len(rounds) < steps or (
                len(rounds) < MOST * steps and sum(map(sum, rounds)) < ENOUGH_MS):
            rounds.append(turn())
        return [statistics.median(values) for values in zip(*rounds)]

    def plain_parts(self, steps: int) -> List[float]:
        """Median milliseconds of the plain step's forward, backward and optimizer."""
        wrapper = self.optim_wrapper

        def turn() -> Sequence[float]:
            samples, totals = self.fresh(), []

            def forward() -> None:
                with wrapper.optim_context(self.student):
                    losses = self.student(self.data['inputs'], samples, mode='loss')
                totals.append(wrapper.scale_loss(self.student.parse_losses(losses)[0]))

            def update() -> None:
                wrapper.step()
                wrapper.zero_grad()

            return self._time(forward), self._time(lambda: wrapper.backward(totals.pop())), self._time(update)

        return self._medians(turn, steps)

    def plain_cost(self, steps: int) -> Dict[str, Any]:
        """The plain step: median milliseconds of its parts, FLOPs, peak memory (see :meth:`peak_memory`)."""
        flops = count_flops(lambda: self.step(self.fresh()))  # the warm-up too: it creates the optimizer's state
        forward_ms, backward_ms, optimizer_ms = self.plain_parts(steps)
        return dict(forward_ms=forward_ms, backward_ms=backward_ms, optimizer_ms=optimizer_ms, flops=flops,
                    peak_bytes=self.peak_memory(with_kd=False))

    def teacher_cost(self, steps: int, paths: Optional[Sequence[str]] = None) -> Dict[str, Any]:
        """The needed part of the teacher: median milliseconds as the host runs it (``ms``) and as training does
        (``fast_ms``, in the form ``form``), FLOPs, and the tap at which it stops."""
        flops = count_flops(lambda: self.needed_teacher(self.fresh(), paths))
        self.fast_teacher(self.fresh(), paths)  # checks the form
        needed, fast = self._medians(lambda: (self._time(self.needed_teacher, self.fresh(), paths),
                                              self._time(self.fast_teacher, self.fresh(), paths)), steps)
        return dict(ms=needed, fast_ms=fast, form=self.teacher.fast.used.words, flops=flops,
                    until=self.stop_of(self.teacher_paths if paths is None else paths)[0])

    def record(self) -> Recording:
        """What the taps of all active terms give in one step of the student; no term is computed."""
        step = self.distiller.current
        with self.optim_wrapper.optim_context(self.student), step.open(self.data['inputs'], self.fresh()):
            self.student(self.data['inputs'], self.fresh(), mode='loss')
            step.hear()
            assert step.batch is not None
            return Recording(step.records, step.batch).fresh(0)

    def terms_cost(self, names: Sequence[str], recording: Recording, steps: int) -> Dict[str, Any]:
        """What some terms cost together, after the passes of student and teacher.

        It is all that the distiller does with what the taps have recorded: views and second passes (another head on
        the same proposals or features), adapter, region, loss; the backward pass as far as the taps; the step of an
        opponent.

        Args:
            names: of terms.
            recording: of :meth:`record`.
            steps: measured turns, more for short ones.

        Returns:
            dict: ``forward_ms``, ``backward_ms``, ``opponent_ms`` (medians); ``flops`` and ``peak_bytes`` (see
            :func:`memory_rise`) of one turn; ``own_bytes`` of the terms' parameters and buffers; ``tapped_bytes`` of
            the largest tensor that they tap in the student.
        """
        distiller = self.distiller
        terms: List[Term] = [distiller.terms[name] for name in names]  # type: ignore[misc]
        opponents = [opponent for term in terms for opponent in opponents_of(term.loss)]
        touched = [*self.student.parameters(), *(parameter for term in terms for parameter in term.parameters())]
        numbers = itertools.count()

        def forward(given: Recording) -> Tensor:
            total: Any = 0
            with self.optim_wrapper.optim_context(self.student):
                for comparison in distiller.current.read(terms, given.records, given.batch):
                    total = total + distiller.current.evaluate(comparison).total
            return total

        def learn() -> None:
            for opponent in opponents:
                opponent.learn(rate=0.0)

        def whole(given: Recording) -> None:
            forward(given).backward()
            learn()

        def clean() -> None:
            for parameter in touched:
                parameter.grad = None

        def turn() -> Sequence[float]:
            given, totals = recording.fresh(next(numbers)), []
            spent = [self._time(lambda: totals.append(forward(given))), self._time(lambda: totals.pop().backward()),
                     self._time(learn) if opponents else 0.0]
            clean()
            return spent

        def outside(measure: Callable[[Callable[[], Any]], Any]) -> Any:
            given = recording.fresh(next(numbers))
            found = measure(lambda: whole(given))
            clean()
            return found

        clean()
        flops = outside(count_flops)  # the warm-up too
        forward_ms, backward_ms, opponent_ms = self._medians(turn, steps)
        peak = outside(lambda call: memory_rise(call, self.device))
        kept = [tensor for term in terms for tensor in (*term.parameters(), *term.buffers())]
        tapped = [tensor for path in paths_of(terms, 'student') for tensor in recording.records[STUDENT][path]]
        return dict(forward_ms=forward_ms, backward_ms=backward_ms, opponent_ms=opponent_ms, flops=flops,
                    peak_bytes=peak, own_bytes=sum(map(_bytes, kept)), tapped_bytes=max(map(_bytes, tapped)))

    def term_costs(self, steps: int) -> List[Dict[str, Any]]:
        """:meth:`terms_cost` of every active term by itself, on the features of one step."""
        recording = self.record()
        return [dict(name=term.name, method=type(term.loss).__name__, **self.terms_cost([term.name], recording, steps))
                for term in self.distiller.active_terms()]

    def agreement_ms(self, steps: int) -> float:
        """Median milliseconds of one measurement of how alike both models are (``kd_agree_...`` of the log)."""
        recording, likeness = self.record(), self.distiller.likeness
        found = self.distiller.current.read(self.distiller.active_terms(), recording.records, recording.batch)
        likeness.measure(found)  # the warm-up
        return self._medians(lambda: [self._time(likeness.measure, found)], steps)[0]

    def peak_memory(self, with_kd: bool) -> Optional[int]:
        """Highest number of bytes held by tensors during one step; None where it cannot be measured.

        CUDA: ``torch.cuda.max_memory_allocated``.  CPU: what is held between the steps, and on top of it the highest
        sum of allocations less releases that torch's profiler saw in a step.
        """
        samples = self.fresh()
        step = self.kd_step if with_kd else self.step
        gc.collect()
        if with_kd:
            self.distiller.attach()
        try:
            if self.device.type == 'cuda':
                self._synchronize()
                torch.cuda.reset_peak_memory_stats(self.device)
                step(samples)
                self._synchronize()
                return torch.cuda.max_memory_allocated(self.device)
            risen = allocation_peak(lambda: step(samples))
        finally:
            if with_kd:
                self.distiller.detach()
        return None if risen is None else risen + self._resident(with_kd)

    def step_memory(self) -> Dict[str, int]:
        """What one step allocates at its highest, beyond what is held between the steps; CPU, bytes.

        Returns:
            dict: ``plain`` (a step without distillation), ``teacher`` (its forward as far as the last tap), ``kd`` (a
            step with distillation), ``taps`` (what the taps of all models recorded), ``extras`` (gradients of the
            terms' own parameters), and ``limit``: ``max(plain, teacher) + 2.5 * taps + extras``.

        Raises:
            RuntimeError: this torch does not tell what it allocates.
        """
        def highest(call: Callable[[Any], None]) -> int:
            samples = self.fresh()
            found = allocation_peak(lambda: call(samples))
            if found is None:
                raise RuntimeError('this version of torch does not report allocations on the CPU')
            return found

        self.step(self.fresh())  # the optimizer makes its state
        plain, teacher = highest(self.step), highest(self.needed_teacher)
        self.distiller.attach()
        try:
            for _ in range(2):  # a tap copies in its first step
                self.kd_step(self.fresh())
            kd = highest(self.kd_step)
        finally:
            self.distiller.detach()
        held = {tensor.data_ptr(): _bytes(tensor) for records in self.record().records.values()
                for record in records.values() for tensor in record}
        taps, extras = sum(held.values()), sum(map(_bytes, self.distiller.parameters()))
        return dict(plain=plain, teacher=teacher, kd=kd, taps=taps, extras=extras,
                    limit=int(max(plain, teacher) + 2.5 * taps + extras))

    def _resident(self, with_kd: bool) -> int:
        tensors = [*self.student.parameters(), *self.student.buffers(), self.data['inputs']]
        optimizers = [self.optim_wrapper.optimizer]
        if with_kd:
            optimizers += [opponent.optimizer for opponent in self.distiller.opponents()]
        for state in (state for optimizer in optimizers for state in optimizer.state.values()):
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        if with_kd:
            tensors += [*self.distiller.parameters(), *self.distiller.buffers(), *self.teacher.model.parameters(),
                        *self.teacher.model.buffers()]
        return sum(map(_bytes, tensors))


def paths_of(terms: Sequence[Term], side: str) -> List[str]:
    """Every path of one side that these terms read, once."""
    return list(dict.fromkeys(path for term in terms for path in getattr(term, f'{side}_paths')))


def profile_config(cfg: Config, batch: int, shape: Tuple[int, int], steps: int, device: Any = 'cpu') -> Dict[str, Any]:
    """Measure one config.

    Args:
        cfg: a config of :func:`kd_mm.lab.configs.read_config` with one distillation hook.
        batch: number of random images.
        shape: (H, W) of the images.
        steps: measured rounds.
        device: where everything runs.

    Returns:
        The numbers, ready for JSON; times are medians in milliseconds.

    Raises:
        ValueError: the config has no distillation hook, several, or a wrong one.
    """
    entries = hook_entries(cfg)
    if len(entries) != 1:
        mend = ("add dict(type='kd_mm.DistillHook', teacher=..., losses=...) to custom_hooks, or let kd-mm init write "
                'the config' if not entries else 'put all losses into one')
        raise ValueError(f'custom_hooks must have one kd_mm.DistillHook to profile, and has {len(entries)}: {mend}')
    problems = Problems()
    arguments = hook_arguments(entries[0], problems)
    problems.raise_any()
    with scope_of(cfg):
        torch.manual_seed(0)
        bench = Bench(cfg, batch, shape, device)
        # Measured before there is a teacher, so that the device holds the student alone; the first step creates the
        # optimizer's state.
        bench.step(bench.fresh())
        plain_bytes = bench.peak_memory(with_kd=False)
        bench.distil(arguments)
        parts = bench.plain_parts(min(steps, WARMUP))
        times = bench.times(steps)
        kd_bytes = bench.peak_memory(with_kd=True)
        terms = bench.term_costs(steps)
        every, alike = int(arguments['agreement']), bench.agreement_ms(steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    base = medians['plain_step'] + medians['needed_teacher']
    rounds = sorted(kd / (plain + needed) for kd, plain, needed in zip(
        times['kd_step'], times['plain_step'], times['needed_teacher']))
    cuda = bench.device.type == 'cuda'
    return {
        'config': str(cfg.filename), 'batch': batch, 'input_shape': list(bench.data['inputs'].shape[-2:]),
        'steps': steps, 'device': torch.cuda.get_device_name(bench.device) if cuda else 'cpu',
        'teacher_form': bench.teacher.fast.used.words,
        'threads': torch.get_num_threads(), 'load_average': round(os.getloadavg()[0], 2), 'torch': torch.__version__,
        # What many GPUs would have to sum, and beside what (tools/studies/scaling.py).
        'gradient_bytes': {name: sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
                           for name, model in (('student', bench.student), ('extras', bench.distiller))},
        'plain_parts_ms': dict(zip(('forward', 'backward', 'optimizer'), parts)),
        **{f'{name}_ms': value for name, value in medians.items()}, 'fastest_ms': fastest, 'rounds_ms': times,
        'ratio': medians['kd_step'] / base, 'overhead_ms': medians['kd_step'] - base,
        'ratio_of_rounds': {'median': statistics.median(rounds), 'low': rounds[len(rounds) // 4],
                            'high': rounds[(len(rounds) * 3) // 4]},
        'teacher_ratio': medians['fast_teacher'] / medians['needed_teacher'],
        'ratio_of_fastest': fastest['kd_step'] / (fastest['plain_step'] + fastest['needed_teacher']),
        'peak_memory': {
            'plain_bytes': plain_bytes, 'kd_bytes': kd_bytes,
            'what': 'torch.cuda.max_memory_allocated' if cuda else 'resident tensors and peak allocations of a step'},
        'agreement': {'every': every, 'ms': alike, 'share': alike / every / medians['kd_step'] if every else 0.0},
        'terms': terms}
