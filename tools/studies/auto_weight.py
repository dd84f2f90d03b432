#!/usr/bin/env python3
"""What ``loss_weight='auto'`` costs: a step that measures against one that does not.

    python tools/studies/auto_weight.py configs/profile/retinanet_cwd.py --batch 8 --shape 256 320

Every term of the config gets a measured weight.  In one process, on one random batch, in turns, medians; the cost of a
training is the difference divided by the number of steps from one measurement to the next (``every``).
"""

import argparse
import statistics
import sys
from typing import Dict, List, Optional, Sequence

from mmengine.config import DictAction

from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
from kd_mm.lab.cost import WARMUP, Bench
from kd_mm.lab.models import scope_of
from kd_mm.ops.problems import Problems
from kd_mm.ops.schedules import AutoWeight


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file with a kd_mm.DistillHook')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 256), metavar=('H', 'W'),
                        help='size of the random images. Default: 256 256')
    parser.add_argument('--batch', type=int, default=2, help='number of random images. Default: 2')
    parser.add_argument('--steps', type=int, default=20, help='measured rounds. Default: 20')
    parser.add_argument('--device', default='cpu', help='cpu or cuda. Default: cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={},
                        help='change settings of the config: KEY=VALUE ...')
    return parser.parse_args(argv)


def times(bench: Bench, steps: int) -> Dict[str, List[float]]:
    """Milliseconds of each round with and without a measurement."""
    found: Dict[str, List[float]] = {'measured': [], 'plain': []}
    every = AutoWeight().every
    bench.distiller.attach()
    for turn in range(WARMUP + steps):
        for name in sorted(found, reverse=bool(turn % 2)):
            for state in bench.distiller.balance._states.values():
                state.steps = every if name == 'measured' else every + 1
            samples = bench.fresh()
            elapsed = bench._time(bench.kd_step, samples)
            if turn >= WARMUP:
                found[name].append(elapsed)
    bench.distiller.detach()
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    entry = hook_entries(cfg)[0]
    for loss in entry['losses'].values():
        loss['loss_weight'] = 'auto'
    problems = Problems()
    arguments = hook_arguments(entry, problems)
    problems.raise_any()
    with scope_of(cfg):
        bench = Bench(cfg, args.batch, tuple(args.shape), args.device)
        bench.distil(arguments)
        found = times(bench, args.steps)
    plain, measured = (statistics.median(found[name]) for name in ('plain', 'measured'))
    every = AutoWeight().every
    print(f"{args.config}: {args.batch} images of {args.shape[0]}x{args.shape[1]} on {args.device}, {args.steps} "
          "rounds")
    print(f'step {plain:.1f} ms, step that measures {measured:.1f} ms ({100 * (measured / plain - 1):+.0f} %); '
          f'every {every} steps: {100 * (measured - plain) / plain / every:+.2f} % of a training')
    return 0


if __name__ == '__main__':
    sys.exit(main())
