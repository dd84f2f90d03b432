"""What distillation costs: time and memory of a training step with and without it; ``tools/profile.py`` prints it."""

import copy
import gc
import os
import statistics
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor
from torch.profiler import ProfilerActivity

from kd_mm import inspection
from kd_mm.distiller import Distiller
from kd_mm.taps import StopForward, Tap
from kd_mm.teacher import RANDOM, Teacher, forward_tensor
from kd_mm.teacher_sources import SELF
from kd_mm.terms import Problems, Term

#: Rounds before the measured ones: the allocator, the kernels' caches and the taps settle.
WARMUP = 3


def _is_model(teacher: Any) -> bool:
    return not (isinstance(teacher, str) and teacher == SELF)


class Bench:
    """The student of a config with its optimizer and one batch; the distiller comes with :meth:`distil`.

    Args:
        cfg: a config of :func:`kd_mm.inspection.read_config`.
        batch: number of random images.
        shape: (H, W) of the images.
        device: where everything runs.
    """

    distiller: Distiller
    teacher: Teacher

    def __init__(self, cfg: Config, batch: int, shape: Tuple[int, int], device: Any):
        self.cfg, self.device = cfg, torch.device(device)
        self.student = inspection.build_student(cfg, self.device).train()
        self.data = inspection.random_batch(self.student, batch, shape, self.device)
        self.optim_wrapper = build_optim_wrapper(self.student, copy.deepcopy(cfg.optim_wrapper))
        self._freeze_rates()

    def _freeze_rates(self) -> None:
        # A rate of 0 costs as much as any other; with a larger one a random teacher could drive the weights to NaN,
        # whose arithmetic has another speed.
        for group in self.optim_wrapper.optimizer.param_groups:
            group['lr'] = 0.0

    def distil(self, arguments: Dict[str, Any]) -> None:
        """Build the distiller with a random teacher, and give its extras to the optimizer as the hook does."""
        if arguments.get('teachers') is not None or not _is_model(arguments.get('teacher')):
            raise ValueError('the cost is measured for one teacher with a model of its own; this config has several '
                             "teachers, or teacher='self'")
        self.distiller = inspection.make_distiller(self.cfg, self.student, dict(arguments, teacher_ckpt=RANDOM))
        self.distiller.train()
        self.distiller.step = inspection.probe_step(self.distiller)
        assert self.distiller.teacher is not None
        self.teacher = self.distiller.teacher
        parameters = [parameter for parameter in self.distiller.parameters() if parameter.requires_grad]
        if parameters:
            self.optim_wrapper.optimizer.add_param_group({'params': parameters})
            self._freeze_rates()
        self._find_last_tap()

    def _find_last_tap(self) -> None:
        """Which teacher tap fires last, and at which of its calls: so far the teacher has to run, and no further."""
        self.batch = self.distiller._batch(self.data['inputs'], self.data['data_samples'])
        self.teacher_paths = list(dict.fromkeys(
            path for term in self.distiller.active_terms() for path in term.teacher_paths))
        order: List[str] = []
        taps = [Tap(self.teacher.model, path, 'teacher', keep=lambda tap: order.append(tap.path))
                for path in self.teacher_paths]
        try:
            for tap in taps:
                tap.arm(tuple(self.data['inputs'].shape[-2:]))
            self.full_teacher(self.fresh())
        finally:
            for tap in taps:
                tap.clear()
        self.last_path, self.last_calls = order[-1], order.count(order[-1])

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
    def full_teacher(self, samples: Any) -> None:
        """The bare teacher to the end of its heads."""
        with self.optim_wrapper.optim_context(self.student):
            images = self.teacher.renormalise(self.data['inputs'], self.batch)
            forward_tensor(self.teacher.model, images, samples, self.teacher_paths)

    def needed_teacher(self, samples: Any) -> None:
        """The bare teacher up to the last tap: no record, no counting of other taps, no check of flags."""
        left = self.last_calls

        def stop(_: Tap) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise StopForward

        self.stopper.keep = stop
        self.stopper.arm(tuple(self.data['inputs'].shape[-2:]))
        try:
            self.full_teacher(samples)
        except StopForward:
            pass
        finally:
            self.stopper.clear()

    # ------------------------------------------------------------------ measurements

    def times(self, steps: int) -> Dict[str, List[float]]:
        """Milliseconds of every round, in turns that start with another of the four each time."""
        self.stopper = Tap(self.teacher.model, self.last_path, 'teacher')
        self.stopper._copy = False  # it stands for the bare model, which copies nothing
        calls: Dict[str, Callable[[Any], None]] = {
            'plain_step': self.step, 'needed_teacher': self.needed_teacher, 'full_teacher': self.full_teacher,
            'kd_step': self.kd_step}
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

    def term_times(self, steps: int) -> List[Dict[str, Any]]:
        """Median milliseconds of adapter and loss of every term, on the features of one step."""
        with inspection.recorded(self.distiller) as records:
            self.distiller.attach()
            try:
                self.step(self.fresh())
            finally:
                self.distiller.detach()
        rows = []
        for name, record in records.items():
            term = self.distiller.terms[name]
            assert isinstance(term, Term)
            weights = term.loss.weight.at(self.distiller.step, self.distiller.max_steps, len(record.levels))
            forward, backward = [], []
            for turn in range(WARMUP + steps):
                student = tuple(tensor.detach().clone().requires_grad_() for tensor in record.student)
                levels: List[Tensor] = []

                def compute(term: Term, student: Any, record: Any, levels: List[Tensor]) -> None:
                    levels.extend(term.per_level(student, record.teacher, record.batch))

                spent = self._time(compute, term, student, record, levels)
                total = torch.stack([level * weight for level, weight in zip(levels, weights)]).sum()
                back = self._time(total.backward)
                for parameter in term.parameters():
                    parameter.grad = None
                if turn >= WARMUP:
                    forward.append(spent)
                    backward.append(back)
            rows.append({'name': name, 'method': type(term.loss).__name__, 'forward_ms': statistics.median(forward),
                         'backward_ms': statistics.median(backward)})
        return rows

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
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing is written to the error stream inside: the profiler's native part prints lines that no option stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocation_peak(call: Callable[[], Any]) -> Optional[int]:
    """Highest sum of allocations less releases on the CPU during ``call()``; None on a torch that tells it otherwise.

    Example:
        >>> allocation_peak(lambda: torch.zeros(1024) + 1)
        8192
    """
    with _quiet_stderr(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    try:
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
        clock = 'start_ns' if hasattr(events[0], 'start_ns') else 'start_us'
        changes = [(getattr(event, clock)(), event.nbytes()) for event in events]
    except (AttributeError, IndexError):
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def profile_config(cfg: Config, batch: int, shape: Tuple[int, int], steps: int, device: Any = 'cpu') -> Dict[str, Any]:
    """Measure one config.

    Args:
        cfg: a config of :func:`kd_mm.inspection.read_config` with one distillation hook.
        batch: number of random images.
        shape: (H, W) of the images.
        steps: measured rounds.
        device: where everything runs.

    Returns:
        The numbers, ready for JSON; times are medians in milliseconds.

    Raises:
        ValueError: the config has no distillation hook, several, or a wrong one.
    """
    entries = inspection.hook_entries(cfg)
    if len(entries) != 1:
        raise ValueError(f'custom_hooks must have one kd_mm.DistillHook to profile, and has {len(entries)}')
    problems = Problems()
    arguments = inspection.hook_arguments(entries[0], problems)
    problems.raise_any()
    with inspection.scope_of(cfg):
        torch.manual_seed(0)
        bench = Bench(cfg, batch, shape, device)
        # Measured before there is a teacher, so that the device holds the student alone; the first step creates the
        # optimizer's state.
        bench.step(bench.fresh())
        plain_bytes = bench.peak_memory(with_kd=False)
        bench.distil(arguments)
        times = bench.times(steps)
        kd_bytes = bench.peak_memory(with_kd=True)
        terms = bench.term_times(steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    base = medians['plain_step'] + medians['needed_teacher']
    rounds = sorted(kd / (plain + needed) for kd, plain, needed in zip(
        times['kd_step'], times['plain_step'], times['needed_teacher']))
    cuda = bench.device.type == 'cuda'
    return {
        'config': str(cfg.filename), 'batch': batch, 'input_shape': list(bench.data['inputs'].shape[-2:]),
        'steps': steps, 'device': torch.cuda.get_device_name(bench.device) if cuda else 'cpu',
        'threads': torch.get_num_threads(), 'load_average': round(os.getloadavg()[0], 2), 'torch': torch.__version__,
        **{f'{name}_ms': value for name, value in medians.items()}, 'fastest_ms': fastest, 'rounds_ms': times,
        'ratio': medians['kd_step'] / base, 'overhead_ms': medians['kd_step'] - base,
        'ratio_of_rounds': {'median': statistics.median(rounds), 'low': rounds[len(rounds) // 4],
                            'high': rounds[(len(rounds) * 3) // 4]},
        'ratio_of_fastest': fastest['kd_step'] / (fastest['plain_step'] + fastest['needed_teacher']),
        'peak_memory': {
            'plain_bytes': plain_bytes, 'kd_bytes': kd_bytes,
            'what': 'torch.cuda.max_memory_allocated' if cuda else 'resident tensors and peak allocations of a step'},
        'terms': terms}
