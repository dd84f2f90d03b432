#!/usr/bin/env python3
"""What distillation is expected to cost on 8 to 64 GPUs: COMPUTED from a measurement in one process, not measured.

    kd-mm profile CONFIG --device cuda --batch 2 --shape 800 1344 --json cost.json
    python tools/studies/scaling.py cost.json [more.json ...] [--gpus 8 16 32 64] [--per-node 8]

Measured and taken from the file: the plain step and its backward part, the distilled step, the bytes of the student's
gradients and of the extras' (adapters, generators).  Assumed, and to be given for your machines: the bandwidth inside a
node and between nodes, and the latency of a message.

Every GPU has the batch of the measurement.  The gradients of B bytes on n nodes of g GPUs, summed inside the nodes and
then between them:

    T(B) = 2 (g - 1) / g * B / inner + 2 (n - 1) / n * B / outer + 2 ((g - 1) + (n - 1)) * latency

DDP sends the student's gradients while the backward pass goes on, so that only what is longer than that shows; the
extras' are one message after it:

    plain(n, g)     = plain step + max(0, T(student) - hidden * backward)
    distilled(n, g) = KD step    + max(0, T(student) - hidden * backward) + T(extras)

Not in it: waiting for the slowest rank, the data, SyncBN, what some losses gather from all ranks.  Teachers send
nothing.  A file that was measured on a CPU has steps so long that no message shows: --faster K divides its times by K,
which is one more assumption, and the table says so.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent))


def all_reduce_ms(size: float, nodes: int, per_node: int, inner: float, outer: float, latency: float) -> float:
    """Milliseconds for summing ``size`` bytes over all GPUs.

    Args:
        size: bytes of a rank.
        nodes: number of machines.
        per_node: GPUs in each.
        inner: GB/s between the GPUs of a node.
        outer: GB/s of a node to the others.
        latency: microseconds of a message.

    Example:
        >>> all_reduce_ms(1e9, 1, 1, 100, 10, 20)
        0.0
        >>> all_reduce_ms(1e9, 2, 2, 100, 10, 0)  # 10 ms inside, 100 ms between
        110.0
    """
    inside = 2 * (per_node - 1) / per_node * size / (inner * 1e6)
    between = 2 * (nodes - 1) / nodes * size / (outer * 1e6)
    return inside + between + 2 * (per_node - 1 + nodes - 1) * latency / 1e3


def expected(result: Dict[str, Any], gpus: int, args: argparse.Namespace) -> Dict[str, float]:
    """One row: milliseconds of a step on ``gpus`` GPUs.

    Raises:
        ValueError: the file is of an earlier version, or the GPUs fill no whole nodes.
    """
    if 'gradient_bytes' not in result or 'plain_parts_ms' not in result:
        raise ValueError('the file has no gradient_bytes and plain_parts_ms: write it anew with kd-mm profile --json')
    per_node = min(args.per_node, gpus)
    if gpus % per_node:
        raise ValueError(f'{gpus} GPUs are no whole number of nodes with {per_node} each; change --gpus or --per-node')
    nodes = gpus // per_node
    faster = args.faster
    plain, kd, backward = (value / faster for value in (
        result['plain_step_ms'], result['kd_step_ms'], result['plain_parts_ms']['backward']))
    student, extras = (all_reduce_ms(result['gradient_bytes'][name], nodes, per_node, args.inner, args.outer,
                                     args.latency) if result['gradient_bytes'][name] else 0.0
                       for name in ('student', 'extras'))
    shown = max(0.0, student - args.hidden * backward)
    return dict(gpus=gpus, nodes=nodes, plain=plain + shown, kd=kd + shown + extras, student_message=student,
                student_shown=shown, extras_message=extras, ratio=(kd + shown + extras) / (plain + shown),
                ratio_of_one=kd / plain, efficiency=kd / (kd + shown + extras))


def table(results: Dict[str, Dict[str, Any]], args: argparse.Namespace) -> str:
    """All files as Markdown."""
    lines = ['**Computed, not measured**: one process was measured, the messages follow from assumed '
             f'{args.inner:g} GB/s inside a node of {args.per_node}, {args.outer:g} GB/s between nodes, '
             f'{args.latency:g} us a message, {args.hidden:.0%} of the backward pass hiding the student\'s.']
    for name, result in results.items():
        rows = [expected(result, gpus, args) for gpus in args.gpus]
        sizes = {key: value / 2**20 for key, value in result['gradient_bytes'].items()}
        divided = f' divided by {args.faster:g} (assumed)' if args.faster != 1 else ''
        lines += ['', f'{name}: {result["batch"]} images of {"x".join(map(str, result["input_shape"]))} a GPU, step '
                  f'times of {result["device"]}{divided}; gradients {sizes["student"]:.1f} MiB of the student, '
                  f'{sizes["extras"]:.2f} MiB of the extras.',
                  '', '| GPUs | plain step ms | KD step ms | KD / plain | on one GPU | student\'s message ms, shown | '
                  'extras\' message ms | share of the KD step that computes |', '|---|---|---|---|---|---|---|---|']
        for row in rows:
            lines.append(f'| {row["gpus"]} | {row["plain"]:.1f} | {row["kd"]:.1f} | {row["ratio"]:.3f} | '
                         f'{row["ratio_of_one"]:.3f} | {row["student_message"]:.2f}, {row["student_shown"]:.2f} | '
                         f'{row["extras_message"]:.2f} | {row["efficiency"]:.1%} |')
    return '\n'.join(lines) + '\n'


#: What a table needs of a profile.
NEEDED = ('config', 'batch', 'input_shape', 'device', 'threads', 'plain_step_ms', 'kd_step_ms', 'plain_parts_ms',
          'gradient_bytes')


def record(results: Dict[str, Dict[str, Any]], args: argparse.Namespace) -> Dict[str, Any]:
    """What was read and assumed, with the commands that make it again."""
    import torch
    from machine import provenance

    shapes = {name: ' '.join(map(str, result['input_shape'])) for name, result in results.items()}
    commands = [f'kd-mm profile {name} --batch {result["batch"]} --shape {shapes[name]} --steps {result["steps"]} '
                '--json FILE' for name, result in results.items()]
    options = {name: value for name, value in vars(args).items() if name not in ('files', 'record')}
    return dict(made=provenance('; '.join(commands), os.cpu_count() or 1, torch.get_num_threads()), options=options,
                results={name: {key: result[key] for key in NEEDED if key in result}
                         for name, result in results.items()})


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', type=Path, help='of kd-mm profile --json')
    parser.add_argument('--gpus', nargs='+', type=int, default=[8, 16, 32, 64], help='default: 8 16 32 64')
    parser.add_argument('--per-node', type=int, default=8, help='GPUs of a node (default 8)')
    parser.add_argument('--inner', type=float, default=200.0, help='GB/s inside a node (default 200, assumed)')
    parser.add_argument('--outer', type=float, default=25.0, help='GB/s of a node to others (default 25, assumed)')
    parser.add_argument('--latency', type=float, default=20.0, help='us of a message (default 20, assumed)')
    parser.add_argument('--hidden', type=float, default=0.8, help='share of the backward pass beside which messages '
                        'run (default 0.8, assumed)')
    parser.add_argument('--faster', type=float, default=1.0, help='divide the measured times by this (default 1)')
    parser.add_argument('--record', type=Path, metavar='FILE',
                        help='also write there what was read and assumed, for the table of docs/several_gpus.md')
    args = parser.parse_args(argv)
    for name in ('inner', 'outer', 'faster'):
        if not getattr(args, name) > 0:
            parser.error(f'--{name} must be above 0')
    if min(*args.gpus, args.per_node) < 1 or args.latency < 0 or not 0 <= args.hidden <= 1:
        parser.error('--gpus and --per-node must be at least 1, --latency from 0, --hidden from 0 to 1')
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    try:
        names: List[str] = [str(path) for path in args.files]
        results = {name: json.loads(Path(name).read_text()) for name in names}
        results = {result.get('config', name): result for name, result in results.items()}
        print(table(results, args), end='')
        if args.record:
            args.record.write_text(json.dumps(record(results, args), indent=1) + '\n')
    except (OSError, ValueError) as error:
        print(f'scaling.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
