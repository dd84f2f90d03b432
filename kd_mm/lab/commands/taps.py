"""List the modules of a model that a distillation loss can tap, with the shapes of what they return.

    kd-mm taps mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --filter neck
    kd-mm taps CONFIG --teacher --filter 'backbone.layer?'

The model runs once on one random image, in eval mode and without losses.  One line a module, in model order: its path
(what `at` takes), type, number of calls, and one shape for each tensor that a tap there records.  Modules that only
run while losses are computed are not called in this pass, and Dropout and the like hand on what they get; --all lists
them too.  Below stand the places that `at` takes for any model ('@neck') and the paths that they are here.
"""

import argparse
import sys
from typing import List, Optional, Sequence, Tuple

from mmengine.config import Config
from torch import nn

from kd_mm.engine.hook import folder_of
from kd_mm.engine.step import Step
from kd_mm.hosts.models import scope_of_config
from kd_mm.hosts.places import PLACES, find
from kd_mm.lab.commands import REFUSALS, program, words
from kd_mm.lab.configs import Options, all_random, hook_arguments, hook_entries, read_config
from kd_mm.lab.models import build_student, random_batch, scope_of
from kd_mm.lab.observe import Output, matches, observe, shape_text
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.teachers.sources import SELF, build_teachers

#: Types of modules that give what they get when a model does not train.
HANDING_ON = ('Identity', 'Dropout', 'Dropout2d', 'DropPath')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the name of an installed one (mmdet::..., kd_mm::NAME)')
    parser.add_argument('--filter', help="only paths with this in them; with wildcards, paths that fit: 'neck.*'")
    parser.add_argument('--teacher', nargs='?', const='', metavar='NAME',
                        help="the teacher of the config's distillation hook; of several the one of this name")
    parser.add_argument('--all', action='store_true', help='also modules that were not called or return no tensor')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 256), metavar=('H', 'W'),
                        help='size of the random image. Default: 256 256')
    parser.add_argument('--cfg-options', nargs='+', action=Options, default={},
                        help='change settings of the config: KEY=VALUE ...')
    return parser.parse_args(argv)


def teacher_rows(cfg: Config, wanted: str, shape: Tuple[int, int]) -> Tuple[nn.Module, List[Output]]:
    """A teacher, and what its modules give, whatever its source, for an image as the student's pipeline makes it.

    Args:
        cfg: config with a distillation hook.
        wanted: name of one of several teachers; '' for the only one.
        shape: (H, W) of the student's image.

    Raises:
        ValueError: there is no hook or no such teacher, or it cannot be built.
    """
    entries = hook_entries(cfg)
    if not entries or not (entries[0].get('teacher') or entries[0].get('teachers')):
        raise ValueError("--teacher: custom_hooks has no kd_mm.DistillHook with a teacher. Give the teacher's config "
                         'itself, without --teacher')
    problems = Problems()
    arguments = all_random(hook_arguments(entries[0], problems))
    student = build_student(cfg)
    if arguments['teacher'] == SELF and arguments['teachers'] is None:
        print("teacher='self': the student teaches itself, its own modules are listed\n")
        return student, observe(student, shape)
    built = build_teachers(student, arguments['teacher'], arguments['teacher_ckpt'], True, arguments['teachers'],
                           problems, scope_of_config(cfg), folder=folder_of(cfg), speed='exact',
                           view=arguments['view'], input_key=arguments['input_key'])
    if problems.found and not (wanted and wanted in built):
        raise ValueError('; '.join(problems.found))
    if wanted and wanted not in built:
        raise ValueError(f'--teacher {wanted}: no teacher of that name; there {"is" if len(built) == 1 else "are"} '
                         f'{", ".join(built)}')
    if not wanted and len(built) > 1:
        raise ValueError(f'--teacher: there are several, say which one: {", ".join(built)}')
    name = wanted or next(iter(built))
    teacher = built[name]
    with preserved_random_state(0):
        data = random_batch(student, 1, shape, training=False)
    batch = Step(student, built, []).batch_of(data['inputs'], data['data_samples'])
    print(f'{name}: {teacher.name} ({type(teacher.model).__name__})\n')
    images, samples = teacher.prepare(data['inputs'], data['data_samples'], batch)
    return teacher.model, observe(teacher.model, shape, dict(inputs=images, data_samples=samples))


def print_table(rows: Sequence[Output]) -> None:
    table = [('path', 'type', 'calls', 'shapes')]
    table += [(row.path, row.type, str(row.calls), shape_text(row.shapes) or '-') for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print('  '.join([*(text.ljust(width) for text, width in zip(line, widths)), line[3]]))


def print_places(model: nn.Module) -> None:
    """The places that stand for paths of any model, as far as this one has them."""
    print('\nplaces:')
    for name in PLACES:
        try:
            found = find(model, name).paths
        except (AttributeError, KeyError, ValueError):  # it has none
            continue
        print(f'  {name:<10} {", ".join(filter(None, found)) or "the output"}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    try:
        cfg = read_config(args.config, args.cfg_options)
        with scope_of(cfg):
            shape = tuple(args.shape)
            if args.teacher is None:
                model = build_student(cfg)
                rows = observe(model, shape)
            else:
                model, rows = teacher_rows(cfg, args.teacher, shape)
    except REFUSALS as error:
        print(f'{program()}: {words(error)}', file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f'{program()}: the model fails on an image of {args.shape[0]}x{args.shape[1]}: {error}. '
              'Give another size with --shape H W', file=sys.stderr)
        return 1
    found = [row for row in rows if matches(row.path, args.filter)]
    shown = found if args.all else [row for row in found if row.shapes and (args.filter or row.type not in HANDING_ON)]
    if shown:
        print_table(shown)
    hidden = len(found) - len(shown)
    if hidden:
        print(f'\n{hidden} more were not called in this pass, return no tensor or hand on what they get (Dropout); '
              '--all lists them')
    if found and not args.filter:
        print_places(model)
    if not found:
        print(f'no path with {args.filter!r}; without --filter all are listed', file=sys.stderr)
        return 1
    return 0
