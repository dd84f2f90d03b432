#!/usr/bin/env python3
"""A step of kd_mm beside one of MMRazor 1.0: the same student, teacher, taps (five levels of the neck) and loss (CWD).

    pip install --no-deps mmrazor        # in an environment that has mmdet; not needed for anything else
    python tools/studies/against_mmrazor.py --shape 256 320 --batch 2 --turns 15

In one process, in turns that start with another one each time, medians and quartiles: a plain step, kd_mm with
``speed='auto'`` and ``'exact'``, MMRazor's ``SingleTeacherDistill`` (the whole teacher with its losses) and its
``FpnTeacherDistill`` (the teacher to its neck).  Every step is forward, backward and optimizer, with a rate of 0;
student and teacher have random weights, the same for all.  Memory is counted in the same way for all: the highest sum
of allocations less releases that torch's profiler sees in one step.

MMRazor 1.0 asks for names of torch's quantization that newer versions of torch do not have; its quantization modules,
which distillation does not use, are then replaced by empty ones in this process.
"""

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

from machine import provenance  # noqa: E402
from others import need  # noqa: E402

CONFIG = 'det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py'
LEVELS = 5
CLOCKS: Dict[str, Callable[[], float]] = dict(wall=time.perf_counter, cpu=time.process_time)
#: Modules of MMRazor that quantize (its loops import them too), and what others import from them.
QUANTIZATION = {
    'structures.quantization': (), 'models.algorithms.quantization': ('MMArchitectureQuant', 'MMArchitectureQuantDDP'),
    'models.fake_quants': (), 'models.observers': (), 'models.quantizers': (), 'engine': ()}


def import_mmrazor() -> str:
    """Import it, without its quantization where that fails; how, in words.

    Raises:
        SystemExit: it is not installed.
    """
    need('against_mmrazor', ('mmrazor', ), 'Install it beside mmdet, without its own requirements: '
         'pip install --no-deps mmrazor==1.0.0')
    importlib.import_module('mmrazor')
    try:
        importlib.import_module('mmrazor.models')
        return 'as it is'
    except (ImportError, AttributeError, KeyError):
        pass
    for name in [name for name in sys.modules if name.startswith('mmrazor.models')]:
        del sys.modules[name]
    for registry in vars(sys.modules['mmrazor.registry']).values():  # the second time all is registered again
        getattr(registry, 'module_dict', {}).clear()
    for name, classes in QUANTIZATION.items():
        stub: Any = types.ModuleType(f'mmrazor.{name}')
        stub.__all__ = list(classes)
        for word in classes:
            setattr(stub, word, type(word, (), {}))
        sys.modules[stub.__name__] = stub
    importlib.import_module('mmrazor.models')
    return 'with empty quantization modules'


def razor_model(kind: str, student: Any, teacher: Any) -> Any:
    """MMRazor's algorithm on these very models."""
    from mmrazor.registry import MODELS

    names = [f'loss_cwd_{level}' for level in range(LEVELS)]
    recorder = dict(fpn=dict(type='ModuleOutputs', source='neck'))
    distiller = dict(
        type='ConfigurableDistiller', student_recorders=recorder, teacher_recorders=copy.deepcopy(recorder),
        distill_losses={name: dict(type='ChannelWiseDivergence', tau=1, loss_weight=10) for name in names},
        loss_forward_mappings={name: dict(
            preds_S=dict(from_student=True, recorder='fpn', data_idx=level),
            preds_T=dict(from_student=False, recorder='fpn', data_idx=level)) for level, name in enumerate(names)})
    model = MODELS.build(dict(type=f'mmrazor.{kind}', architecture=student, teacher=teacher, distiller=distiller,
                              _scope_='mmrazor'))
    model.train()  # gives nothing back
    return model


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    import torch
    from mmengine.optim import build_optim_wrapper

    from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
    from kd_mm.lab.cost import Bench
    from kd_mm.lab.meters import allocation_peak
    from kd_mm.lab.models import scope_of
    from kd_mm.ops.problems import Problems

    how = import_mmrazor()
    cfg, problems = read_config(str(ROOT / 'configs' / args.config), {}), Problems()
    arguments = dict(hook_arguments(hook_entries(cfg)[0], problems), inherit=(), losses=dict(
        loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0)))
    problems.raise_any()
    clock = CLOCKS[args.clock]
    with scope_of(cfg):
        benches = {}
        for speed in ('auto', 'exact'):
            torch.manual_seed(0)
            benches[speed] = Bench(cfg, args.batch, tuple(args.shape), 'cpu', augment=False)
            benches[speed].distil(dict(arguments, speed=speed))
        bench = benches['auto']

        def razor_step(kind: str) -> Callable[[Any], None]:
            own = copy.deepcopy(bench.student)
            model = razor_model(kind, own, copy.deepcopy(bench.teacher.model))
            wrapper = build_optim_wrapper(own, copy.deepcopy(cfg.optim_wrapper))
            for group in wrapper.optimizer.param_groups:
                group['lr'] = 0.0

            def step(samples: Any) -> None:
                with wrapper.optim_context(own):
                    losses = model(bench.data['inputs'], samples, mode='loss')
                total, _ = own.parse_losses(losses)
                wrapper.update_params(total)
                for recorders in (model.distiller.student_recorders, model.distiller.teacher_recorders):
                    for recorder in recorders.recorders.values():
                        recorder.reset_data_buffer()

            return step

        calls: Dict[str, Callable[[Any], None]] = {
            'plain': bench.step, 'kd_mm auto': bench.kd_step, 'kd_mm exact': benches['exact'].kd_step,
            'MMRazor single': razor_step('SingleTeacherDistill'), 'MMRazor fpn': razor_step('FpnTeacherDistill')}
        attached = {'kd_mm auto': benches['auto'], 'kd_mm exact': benches['exact']}

        def run(name: str) -> None:
            samples = bench.fresh()
            own = attached.get(name)
            if own is not None:
                own.distiller.attach()
            try:
                start = clock()
                calls[name](samples)
                found[name].append((clock() - start) * 1e3)
            finally:
                if own is not None:
                    own.distiller.detach()

        names = list(calls)
        found: Dict[str, List[float]] = {name: [] for name in calls}
        for turn in range(args.warmup + args.turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                run(name)
        peaks = {name: allocation_peak(partial(run, name)) for name in names}
    times = {name: values[args.warmup:args.warmup + args.turns] for name, values in found.items()}
    return dict(config=args.config, mmrazor=how, batch=args.batch, shape=list(args.shape), turns=args.turns,
                clock=args.clock, threads=torch.get_num_threads(), load_average=round(os.getloadavg()[0], 2),
                torch=torch.__version__, peak_bytes=peaks, ms=times, made=provenance(' '.join([
                    'python tools/studies/against_mmrazor.py --config', args.config, '--shape', *map(str, args.shape),
                    '--batch', str(args.batch), '--turns', str(args.turns), '--warmup', str(args.warmup), '--clock',
                    args.clock]), os.cpu_count() or 1, torch.get_num_threads()))


def show(result: Dict[str, Any]) -> None:
    height, width = result['shape']
    print(f'{result["batch"]} images of {height}x{width}, {result["threads"]} thread(s), {result["clock"]} clock, load '
          f'{result["load_average"]}, torch {result["torch"]}, MMRazor {result["mmrazor"]}\n')
    print('| step | ms (quartiles) | of MMRazor fpn | peak, MiB |\n|---|---|---|---|')
    base = result['ms']['MMRazor fpn']
    for name, values in result['ms'].items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        ratio = statistics.median(own / other for own, other in zip(values, base))
        peak = result['peak_bytes'][name]
        memory = '-' if peak is None else f'{peak / 2**20:.1f}'
        print(f'| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {ratio:.3f} | {memory} |')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=CONFIG, help=f'below configs/; a detector with {LEVELS} levels. Default: '
                        f'{CONFIG}')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 320), metavar=('H', 'W'),
                        help='of the images. Default: 256 320')
    parser.add_argument('--batch', type=int, default=2, help='images. Default: 2')
    parser.add_argument('--turns', type=int, default=9, help='measured turns. Default: 9')
    parser.add_argument('--warmup', type=int, default=2, help='turns before them. Default: 2')
    parser.add_argument('--clock', choices=tuple(CLOCKS), default='wall',
                        help='the time that passes (default), or that of the processor in this process (one thread)')
    parser.add_argument('--json', type=Path, metavar='FILE',
                        help='write the numbers there, in the list that it has, in place of those of this size')
    args = parser.parse_args(argv)
    if min(args.batch, args.turns) < 1 or args.warmup < 0:
        parser.error('--batch and --turns must be at least 1')
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    result = measure(args)
    show(result)
    if args.json:
        old = json.loads(args.json.read_text()) if args.json.is_file() else []
        kept = [other for other in old if any(other[key] != result[key] for key in ('config', 'shape', 'batch'))]
        args.json.write_text(json.dumps([*kept, result], indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
