"""List the modules of a model that a distillation loss can tap, with the shapes of what they return.

    kd-mm taps mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --filter neck
    kd-mm taps CONFIG --teacher --filter 'backbone.layer?'

The model runs once on one random image, in eval mode and without losses.  One line a module, in model order: its path
(what `at` takes), type, number of calls, and one shape for each tensor that a tap there records.  Modules that only
run while losses are computed are not called in this pass; --all lists them too.
"""

import argparse
import sys
from typing import Optional, Sequence

from mmengine.config import Config, DictAction
from torch import nn

from kd_mm.engine.hook import folder_of
from kd_mm.hosts.models import build_model, load_config, scope_of_config
from kd_mm.lab.commands import program
from kd_mm.lab.configs import hook_entries, read_config
from kd_mm.lab.models import build_student, scope_of
from kd_mm.lab.observe import Output, matches, observe, shape_text


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the name of an installed one (mmdet::...)')
    parser.add_argument('--filter', help="only paths with this in them; with wildcards, paths that fit: 'neck.*'")
    parser.add_argument('--teacher', action='store_true', help="the teacher of the config's distillation hook")
    parser.add_argument('--all', action='store_true', help='also modules that were not called or return no tensor')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 256), metavar=('H', 'W'),
                        help='size of the random image. Default: 256 256')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={},
                        help='change settings of the config: KEY=VALUE ...')
    return parser.parse_args(argv)


def build(cfg: Config, teacher: bool) -> nn.Module:
    """The model to list, with random weights: shapes do not depend on them."""
    if not teacher:
        return build_student(cfg)
    entries = hook_entries(cfg)
    if not entries or not entries[0].get('teacher'):
        raise ValueError("--teacher: custom_hooks has no kd_mm.DistillHook with a teacher. Give the teacher's config "
                         'itself, without --teacher')
    return build_model(load_config(entries[0]['teacher'], folder_of(cfg))[0], scope_of_config(cfg))


def print_table(rows: Sequence[Output]) -> None:
    table = [('path', 'type', 'calls', 'shapes')]
    table += [(row.path, row.type, str(row.calls), shape_text(row.shapes) or '-') for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print('  '.join([*(text.ljust(width) for text, width in zip(line, widths)), line[3]]))


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    try:
        cfg = read_config(args.config, args.cfg_options)
        with scope_of(cfg):
            rows = observe(build(cfg, args.teacher), tuple(args.shape))
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f'{program()}: {error.args[0] if isinstance(error, KeyError) else error}', file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f'{program()}: the model fails on an image of {args.shape[0]}x{args.shape[1]}: {error}. '
              'Give another size with --shape H W', file=sys.stderr)
        return 1
    found = [row for row in rows if matches(row.path, args.filter)]
    shown = found if args.all else [row for row in found if row.shapes]
    if shown:
        print_table(shown)
    hidden = len(found) - len(shown)
    if hidden:
        print(f'\n{hidden} more were not called in this pass or return no tensor; --all lists them')
    if not found:
        print(f'no path with {args.filter!r}; without --filter all are listed', file=sys.stderr)
        return 1
    return 0
