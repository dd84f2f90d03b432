"""What distillation costs: time and memory of a training step with and without it.

    kd-mm profile configs/profile/retinanet_cwd.py --batch 8 --shape 256 320
    kd-mm profile CONFIG --device cuda --batch 2 --shape 800 1344 --json cost.json

In one process, on one random batch, in turns (so that a busy machine slows all alike), medians of:

  plain step      the student's forward with its losses, backward, optimizer step
  needed teacher  the teacher as far as the last tap, as the host runs it: what any engine has to run
  fast teacher    the same in the form that training uses (`speed=` of the hook), with its taps
  full teacher    the teacher to the end of its heads
  KD step         the plain step with the distiller attached: the same code as in training

The ratio is KD step / (plain step + needed teacher): what is above 1 is the losses and the engine.  On a busy machine
look at the ratios of the single rounds too.

Peak memory is that of tensors: on CUDA torch.cuda.max_memory_allocated(), on CPU the weights, optimizer state and
batch plus the peak of the allocations that torch's profiler sees in one step.  The teacher has random weights and
every learning rate is 0, so that all steps are alike.  No data set, no download.

For each term: what it does after the passes of both models, on the features of one step (second passes of a head,
adapter, region, loss; the step of an opponent), the most memory that this takes on top, and its FLOPs (matrix products
and convolutions alone).
"""

import argparse
import json
import os
import sys
from typing import Any, Dict, Optional, Sequence

from kd_mm.lab.commands import REFUSALS, program, words
from kd_mm.lab.configs import Options, read_config
from kd_mm.lab.cost import profile_config
from kd_mm.lab.models import check_device, hint_of
from kd_mm.ops.words import count

#: Rows of the table, and what each is.
ROWS = {'plain_step': 'the training without distillation', 'needed_teacher': 'to the last tap, as the host runs it',
        'fast_teacher': 'the same in the form that speed= gives it', 'full_teacher': 'to the end of its heads',
        'kd_step': 'the training with distillation'}
#: From this share of the host's own form on, the fast form of a teacher is said to be slower.
SLOWER = 1.05


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file with a kd_mm.DistillHook')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 256), metavar=('H', 'W'),
                        help='size of the random images. Default: 256 256')
    parser.add_argument('--batch', type=int, default=2, help='number of random images. Default: 2')
    parser.add_argument('--steps', type=int, default=20, help='measured rounds. Default: 20')
    parser.add_argument('--device', default='cpu', help='cpu or cuda. Default: cpu')
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')
    parser.add_argument('--cfg-options', nargs='+', action=Options, default={},
                        help='change settings of the config: KEY=VALUE ...')
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch < 1:
        parser.error('--steps and --batch must be at least 1')
    return args


def print_result(result: Dict[str, Any]) -> None:
    print(f'{result["config"]}: {count(result["batch"], "image")} of {"x".join(map(str, result["input_shape"]))} on '
          f'{result["device"]}, {result["threads"]} thread(s), load {result["load_average"]}, torch {result["torch"]}')
    print(f'\n{"":<16}{"median ms":>10}{"fastest":>10}   ({result["steps"]} rounds)')
    for name, what in ROWS.items():
        label = name.replace('_', ' ').replace('kd', 'KD')
        print(f'{label:<16}{result[f"{name}_ms"]:>10.2f}{result["fastest_ms"][name]:>10.2f}   {what}')
    print(f'{"ratio":<16}{result["ratio"]:>10.3f}{result["ratio_of_fastest"]:>10.3f}   KD step / (plain step + needed '
          f'teacher), {result["overhead_ms"]:+.2f} ms')
    rounds = result['ratio_of_rounds']
    print(f'{"  by rounds":<16}{rounds["median"]:>10.3f}{"":>10}   half of the rounds lie between '
          f'{rounds["low"]:.3f} and {rounds["high"]:.3f}: the noise of this machine')
    print(f'{"fast / needed":<16}{result["teacher_ratio"]:>10.3f}{"":>10}   {result["teacher_form"]}')
    if result['teacher_ratio'] > SLOWER:
        print(f"{'':<39}slower here than the host's own form, as may be with small models: try speed='exact', or\n"
              f"{'':<39}speed='tune', which measures in the first steps of the training")
    print(f'\n{"term":<16}{"forward ms":>10}{"backward":>10}{"opponent":>10}{"peak MiB":>10}{"GFLOP":>10}   after the '
          'passes of both models')
    for term in result['terms']:
        peak = '-' if term['peak_bytes'] is None else f'{term["peak_bytes"] / 2**20:.1f}'
        print(f'{term["name"]:<16}{term["forward_ms"]:>10.2f}{term["backward_ms"]:>10.2f}{term["opponent_ms"]:>10.2f}'
              f'{peak:>10}{term["flops"] / 1e9:>10.2f}   {term["method"]}')
    alike = result['agreement']
    print(f'\nagreement       {alike["ms"]:.2f} ms to measure how alike the models are, '
          + (f'every {alike["every"]} steps: {100 * alike["share"]:.3f} % of a KD step' if alike['every'] else
             'which this config never does (agreement=0)'))
    memory = result['peak_memory']
    texts = ['not measured' if memory[key] is None else f'{memory[key] / 2**20:.1f} MiB'
             for key in ('plain_bytes', 'kd_bytes')]
    print(f'peak memory     {texts[0]} without, {texts[1]} with distillation ({memory["what"]})')


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    folder = os.path.dirname(os.path.abspath(args.json or ''))
    if args.json and (os.path.isdir(args.json) or not os.access(folder, os.W_OK)):
        print(f'{program()}: --json {args.json} cannot be written: give the name of a file in a folder that is there '
              f'(looked at {folder})', file=sys.stderr)
        return 1
    try:
        check_device(args.device)
        cfg = read_config(args.config, args.cfg_options)
        result = profile_config(cfg, args.batch, tuple(args.shape), args.steps, args.device)
    except REFUSALS as error:
        more = f' ({hint_of(error)})' if 'per channel' in str(error) else ''
        print(f'{program()}: {words(error)}{more}', file=sys.stderr)
        return 1
    print_result(result)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as stream:
            json.dump(result, stream, indent=1)
            stream.write('\n')
    return 0
