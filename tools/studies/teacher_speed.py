#!/usr/bin/env python3
"""How fast a teacher runs in each form of ``speed=``, beside the host's own forward, and what that does to a step.

    python tools/studies/teacher_speed.py --size half
    python tools/studies/teacher_speed.py --pairs retinanet-r50 segformer-b0 --size quarter --turns 15 --json out.json

For each pair one process.  In turns that start with another form each time, so that a busy machine slows all alike:
the host's own forward to the last tap, ``speed='auto'``, the forms by themselves (``--forms``), a plain step, and
distilled steps whose teacher runs as ``'auto'`` or in other forms (``--steps``).  Random weights, random images,
nothing is fetched.

Every number is the median over the turns of what was measured in the same turn, with quartiles:

  auto, ...   that form's forward / the host's own
  peak        what the host's own operations (FLOPs) would take at the rate of a product of two large matrices in
              float32 / the host's own: no form in float32 that computes all of them can be much below
  teacher share  the host's own forward / (plain step + host's own forward)
  step        step with distillation / (plain step + host's own forward)
  implied     (plain step + auto) / (plain step + host's own forward): what the saving of the teacher alone would give
  step, bf16  both with the teacher in that form (``--steps auto bf16``), and its implied

Step and implied differ by what the loss does.  For nearly all of these pairs that is little; DETRDistill runs the
student's decoder once more, with gradients, and a decoder's cost does not shrink with the images.

``--clock wall`` (default) is the time that passes, ``--clock cpu`` that of the processor in this process, which others
disturb less; take it with one thread (OMP_NUM_THREADS=1).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

from machine import provenance  # noqa: E402

CLOCKS: Dict[str, Callable[[], float]] = dict(wall=time.perf_counter, cpu=time.process_time)
SIZES = dict(full=1.0, half=0.5, quarter=0.25)
#: Forms besides ``'auto'``, by the name that the table has for them.
FORMS: Dict[str, Any] = {
    'auto': 'auto', 'fold': dict(fold=True), 'channels_last': dict(channels_last=True),
    'both': dict(fold=True, channels_last=True), 'onednn': dict(onednn=True), 'attention': dict(attention=True),
    'bf16': dict(fold=True, attention=True, onednn=True, channels_last=True, pack=True, precision='bf16'),
    'compile': dict(fold=True, channels_last=True, compile=True)}
HOST, PLAIN, STEP, PEAK = 'host', 'plain step', 'KD step', 'peak'
#: Edge of the matrices of which the peak is taken.
EDGE = 2048


def of(word: str, form: str) -> str:
    """What a step is called in which the teacher runs in a form."""
    return word if form == 'auto' else f'{word}, {form}'


class Pair(NamedTuple):
    """A config of configs/, its stock size, and what is changed."""

    config: str
    shape: Tuple[int, int]
    options: Dict[str, Any] = {}


COCO = (800, 1344)
PAIRS = {
    'retinanet-r50': Pair('det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py', COCO),
    'retinanet-r18': Pair('det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py', COCO, {
        'model.backbone.depth': 18, 'model.neck.in_channels': [64, 128, 256, 512]}),
    'rtmdet-s': Pair('det/cwd/cwd_rtmdet_s_from_m_300e_coco.py', (640, 640)),
    'faster-rcnn-r50': Pair('det/pkd/pkd_faster_rcnn_r50_from_r101_2x_coco.py', COCO),
    'pspnet-r18': Pair('seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes.py', (512, 1024)),
    'segformer-b0': Pair('seg/cwd/cwd_segformer_b0_from_b4_160k_cityscapes.py', (1024, 1024)),
    'deformable-detr-r50': Pair(
        'det/fitnet/fitnet_deformable_detr_r50_from_refine_twostage_r50_50e_coco.py', COCO),
    'deformable-detr-detrdistill': Pair(
        'det/detrdistill/detrdistill_deformable_detr_r50_from_refine_r50_50e_coco.py', COCO)}


def scaled(shape: Tuple[int, int], factor: float) -> Tuple[int, int]:
    """A size in multiples of 32."""
    height, width = (max(32, round(edge * factor / 32) * 32) for edge in shape)
    return height, width


def quartiles(values: Sequence[float]) -> Dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [values[0]] * 3
    return dict(median=round(middle, 4), low=round(low, 4), high=round(high, 4))


def measure(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """All of one pair."""
    import torch

    from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
    from kd_mm.lab.cost import Bench
    from kd_mm.lab.meters import count_flops
    from kd_mm.lab.models import scope_of
    from kd_mm.ops.problems import Problems
    from kd_mm.teachers import kernels

    pair, shape = PAIRS[name], scaled(PAIRS[name].shape, SIZES[args.size])
    cfg, problems = read_config(str(ROOT / 'configs' / pair.config), pair.options), Problems()
    arguments = dict(hook_arguments(hook_entries(cfg)[0], problems), inherit=(), speed='auto')
    problems.raise_any()
    clock = CLOCKS[args.clock]
    with scope_of(cfg):
        torch.manual_seed(0)
        bench = Bench(cfg, args.batch, shape, 'cpu', augment=False)
        bench.distil(arguments)
        fasts = {'auto': bench.teacher.fast, **{form: prepared(bench, FORMS[form]) for form in args.forms}}
        bench.teacher.fast = fasts['auto']

        def in_form(form: str, call: Callable[[Any], None]) -> Callable[[Any], None]:
            def run(samples: Any) -> None:
                bench.teacher.fast = fasts[form]
                try:
                    call(samples)
                finally:
                    bench.teacher.fast = fasts['auto']
            return run

        calls: Dict[str, Callable[[Any], Any]] = {
            HOST: bench.needed_teacher, **{form: in_form(form, bench.fast_teacher) for form in fasts}}
        steps = {of(STEP, form): in_form(form, bench.kd_step) for form in args.steps}
        if steps:
            calls.update({PLAIN: bench.step, **steps})
        flops, square = count_flops(lambda: bench.needed_teacher(bench.fresh())), torch.ones(EDGE, EDGE)
        product: Callable[..., Any] = kernels.linear if kernels.available() else torch.nn.functional.linear
        calls[PEAK] = lambda samples: product(square, square, None)
        found: Dict[str, List[float]] = {call: [] for call in calls}
        names = list(calls)
        for turn in range(args.warmup + args.turns):
            first = turn % len(names)
            for call in names[first:] + names[:first]:
                samples = bench.fresh()
                if call in steps:
                    bench.distiller.attach()
                try:
                    start = clock()
                    calls[call](samples)
                    spent = clock() - start
                finally:
                    bench.distiller.detach()
                if turn >= args.warmup:
                    found[call].append(spent * 1e3 * (flops / (2 * EDGE**3) if call == PEAK else 1))
    return dict(pair=name, config=pair.config, batch=args.batch, shape=list(shape), clock=args.clock, turns=args.turns,
                threads=torch.get_num_threads(), load_average=[round(load, 2) for load in os.getloadavg()],
                torch=torch.__version__, form=fasts['auto'].used.words,
                made=provenance(command(args, [name]), os.cpu_count() or 1, torch.get_num_threads()),
                ms={call: quartiles(values) for call, values in found.items()}, ratios=ratios(found, args.steps))


def prepared(bench: Any, form: Any) -> Any:
    """The teacher in another form, after its dry pass and its first step."""
    from kd_mm.engine.step import Step

    step: Step = bench.distiller.current
    bench.teacher.go(form)
    taps = [tap for (name, _), tap in step.taps.items() if name in step.teachers]
    bench.teacher.run(bench.data['inputs'], bench.fresh(), taps, bench.batch, full=True)
    for tap in taps:
        tap.clear()
    bench.fast_teacher(bench.fresh())
    return bench.teacher.fast


def ratios(found: Dict[str, List[float]], steps: Sequence[str] = ('auto', )) -> Dict[str, Dict[str, float]]:
    """Of every turn, then the median of them; ``steps``: the forms that steps were measured in."""
    host = found[HOST]
    result = {form: quartiles([own / theirs for own, theirs in zip(times, host)])
              for form, times in found.items() if form != HOST and not form.startswith((PLAIN, STEP))}
    if steps:
        base = [plain + own for plain, own in zip(found[PLAIN], host)]
        for form in steps:
            result[of('step', form)] = quartiles([step / both for step, both in zip(found[of(STEP, form)], base)])
            result[of('implied', form)] = quartiles([
                (plain + own) / both for plain, own, both in zip(found[PLAIN], found[form], base)])
        result['teacher share'] = quartiles([own / both for own, both in zip(host, base)])
    return result


def table(results: Sequence[Dict[str, Any]]) -> str:
    """In Markdown."""
    columns = list(dict.fromkeys(column for result in results for column in result['ratios']))
    lines = ['| pair | input | threads, clock | load | host, ms | ' + ' | '.join(columns) + ' |',
             '|---' * (5 + len(columns)) + '|']
    for result in results:
        cells = [result['pair'], 'x'.join(map(str, (result['batch'], *result['shape']))),
                 f'{result["threads"]}, {result["clock"]}', f'{result["load_average"][0]:.1f}',
                 f'{result["ms"][HOST]["median"]:.0f}']
        for column in columns:
            value = result['ratios'].get(column)
            cells.append('' if value is None else f'{value["median"]:.3f} ({value["low"]:.3f} to {value["high"]:.3f})')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', nargs='+', choices=tuple(PAIRS), default=list(PAIRS), help='default: all')
    parser.add_argument('--size', choices=tuple(SIZES), default='full', help='of the stock size. Default: full')
    parser.add_argument('--forms', nargs='*', choices=tuple(FORMS)[1:],
                        default=['fold', 'channels_last', 'both', 'bf16'],
                        help="besides 'auto'. Default: fold channels_last both bf16")
    parser.add_argument('--batch', type=int, default=2, help='images. Default: 2')
    parser.add_argument('--turns', type=int, default=9, help='measured turns. Default: 9')
    parser.add_argument('--warmup', type=int, default=1, help='turns before them. Default: 1')
    parser.add_argument('--clock', choices=tuple(CLOCKS), default='wall', help='see above. Default: wall')
    parser.add_argument('--steps', nargs='*', choices=('auto', *list(FORMS)[1:]), default=['auto'],
                        help='steps with the teacher in these forms, besides a plain one. Default: auto')
    parser.add_argument('--no-steps', dest='steps', action='store_const', const=[], help='only the teacher')
    parser.add_argument('--json', type=Path, metavar='FILE',
                        help='write all numbers there; what it has of other pairs, sizes, threads, clocks or '
                             'processors stays')
    parser.add_argument('--alone', action='store_true', help=argparse.SUPPRESS)  # this very process
    args = parser.parse_args(argv)
    if min(args.batch, args.turns) < 1 or args.warmup < 0:
        parser.error('--batch and --turns must be at least 1')
    args.forms += [form for form in args.steps if form not in ('auto', *args.forms)]
    return args


def command(args: argparse.Namespace, pairs: Sequence[str]) -> str:
    """What measures these pairs in the same way."""
    return ' '.join([
        'python tools/studies/teacher_speed.py --pairs', *pairs, '--size', args.size, '--forms', *args.forms,
        '--batch', str(args.batch), '--turns', str(args.turns), '--warmup', str(args.warmup), '--clock', args.clock,
        *(['--steps', *args.steps] if args.steps else ['--no-steps'])])


def together(old: Sequence[Dict[str, Any]], new: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Results of two runs; what was measured again on the same kind of processor replaces what stood there."""
    def key(result: Dict[str, Any]) -> Tuple[str, ...]:
        processor = result['made']['machine']['processor']
        return tuple(map(str, (*map(result.get, ('pair', 'batch', 'shape', 'threads', 'clock')), processor)))

    merged = {key(result): result for result in (*old, *new)}
    return [merged[name] for name in sorted(merged)]


def in_a_process(name: str, args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """One pair; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'out.json'
        script, *options = command(args, [name]).split()[1:]
        if subprocess.run([sys.executable, str(ROOT / script), *options, '--alone', '--json', str(out)],
                          cwd=ROOT).returncode:
            return None
        result: Dict[str, Any] = json.loads(out.read_text())[0]
        return result


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    results: List[Dict[str, Any]] = []
    failed = []
    old = json.loads(args.json.read_text()) if args.json and args.json.is_file() else []
    for name in args.pairs:
        result = measure(name, args) if args.alone else in_a_process(name, args)
        if result is None:
            failed.append(name)
            continue
        results.append(result)
        if args.json:  # as it comes: a long run may be cut
            args.json.write_text(json.dumps(together(old, results), indent=1) + '\n')
        if not args.alone:
            print(f'\n{table(results[-1:])}\n', flush=True)
    if not args.alone and len(results) > 1:
        print(f'{table(results)}')
    for name in failed:
        print(f'{name}: not measured', file=sys.stderr)
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
