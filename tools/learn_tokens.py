#!/usr/bin/env python3
"""Learn from the teacher what some losses need before they distil: MasKD's tokens, the auto-encoder of KTAAD.

    python tools/learn_tokens.py configs/seg/maskd/maskd_pspnet_r18_from_r101_80k_cityscapes.py
    python tools/learn_tokens.py CONFIG --iters 500 --cfg-options data_root=/data/cityscapes
    python tools/learn_tokens.py CONFIG --train     then train the student with it: both stages by one command

The teacher of the distillation config is frozen; the data are those that the config trains on.  What is learned goes
into the files that the losses name (tokens='work_dirs/learned/NAME.pth').  One process, on the GPU if there is one.
"""

import argparse
import os
import time
from typing import Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kd_mm.engine.hook import folder_of
from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
from kd_mm.lab import learning
from kd_mm.lab.commands import train
from kd_mm.lab.configs import Options, hook_arguments, hook_entries
from kd_mm.lab.models import scope_of
from kd_mm.ops.problems import Problems


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='distillation config')
    parser.add_argument('--iters', type=int, help='steps. Default: what the method asks for')
    parser.add_argument('--lr', type=float, help='first learning rate. Default: the method\'s')
    parser.add_argument('--out', help='folder for the files, NAME_OF_LOSS.pth. Default: the paths in the config')
    parser.add_argument('--overwrite', action='store_true', help='replace files that are there')
    parser.add_argument('--seed', type=int, default=0, help='of the first values and of the order of the images')
    parser.add_argument('--device', help='cpu, cuda, ... Default: cuda if there is one')
    parser.add_argument('--train', action='store_true', help='train the student afterwards, as tools/train.py does')
    parser.add_argument('--work-dir', help='with --train: folder for logs and checkpoints of the student')
    parser.add_argument('--cfg-options', nargs='+', action=Options, help=train.CFG_OPTIONS_HELP)
    args = parser.parse_args(argv)
    if args.out is not None and args.train:
        parser.error('--train reads the files that the config names: leave --out away')
    args.launcher = 'none'
    return args


def learn(args: argparse.Namespace, cfg: Config) -> List[str]:
    """Train and save; returns the files."""
    entries = hook_entries(cfg)
    if not entries:
        train.fail('custom_hooks of this config has no kd_mm.DistillHook')
    problems = Problems()
    arguments = hook_arguments(entries[0], problems)
    try:
        problems.raise_any()
        lessons = learning.find_lessons(arguments['losses'] or {}, args.out)
    except ValueError as error:
        train.fail(error)
    there = [lesson.target for lesson in lessons if os.path.exists(lesson.target)]
    if there and not args.overwrite:
        train.fail(f'{", ".join(there)} is there already. Use it, or learn anew with --overwrite')
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(args.seed)
    with scope_of(cfg):
        try:
            teacher = learning.frozen_teacher(arguments, cfg.get('default_scope'), device, folder_of(cfg))
            data = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
            steps = args.iters if args.iters is not None else max(lesson.learner.iters for lesson in lessons)
            print(f'{", ".join(lesson.name for lesson in lessons)}: {steps} steps with {teacher.name}', flush=True)
            start = time.time()

            def report(step: int, steps: int, losses: Dict[str, float]) -> None:
                values = '  '.join(f'{name} {value:.4g}' for name, value in losses.items())
                print(f'{step:6d}/{steps}  {values}  {time.time() - start:.0f} s', flush=True)

            learning.learn(teacher.model, lessons, data, steps, args.lr, report)
        except (FileNotFoundError, FloatingPointError, KeyError, ValueError) as error:
            train.fail(error.args[0])
    for lesson in lessons:
        learning.save(lesson, steps, teacher.name)
        print(f'wrote {lesson.target}')
    return [lesson.target for lesson in lessons]


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = train.load_config(args)
    train.check_data(cfg, ('train', ))
    allow_mmengine_checkpoints()
    learn(args, cfg)
    if args.train:
        train.set_start(cfg, None, False)
        train.build_runner(cfg).train()


if __name__ == '__main__':
    main()
