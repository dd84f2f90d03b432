"""Check a distillation config before training it: every problem at once, then one training step on random images.

    kd-mm check configs/det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py
    kd-mm check CONFIG --teacher-random --shape 256 256
    kd-mm check CONFIG --plot weights.png
    kd-mm check CONFIG --data 20

Opens no data set without --data or --plot (which count that of a training by epochs), needs no GPU and downloads
nothing: teacher weights that are not on this machine are replaced by random ones, and the report says so.  The exit
status is 1 if there is a problem.
"""

import argparse
import os
import sys
from typing import Optional, Sequence

from mmengine.config import Config

from kd_mm.engine.hook import guesses
from kd_mm.hosts.growing import COPY
from kd_mm.lab import check as inspection
from kd_mm.lab.commands import REFUSALS, program, words
from kd_mm.lab.configs import ASSUMED_EPOCH, Options, hook_entries, read_config, training_length
from kd_mm.lab.curves import check_file, curves_of, plot
from kd_mm.lab.data import look_at_data, training_samples
from kd_mm.lab.labels import draw_labels
from kd_mm.lab.models import check_device
from kd_mm.lab.observe import shape_text
from kd_mm.lab.step import StepReport, parameter_count

#: Where the share of a term is so large or so small, a measured weight is offered.
STRONG, WEAK = 10.0, 0.01
#: So many images are drawn with the labels of teachers.
LABELLED = 4


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the name of an installed one (mmdet::..., kd_mm::NAME)')
    parser.add_argument('--cfg-options', nargs='+', action=Options, default={},
                        help='change settings of the config: KEY=VALUE ...')
    parser.add_argument('--teacher-random', action='store_true', help='random teacher weights, whatever the config has')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 256), metavar=('H', 'W'),
                        help='size of the random images. Default: 256 256')
    parser.add_argument('--batch', type=int, default=2, help='number of random images. Default: 2')
    parser.add_argument('--device', default='cpu', help='cpu, cuda, ... Default: cpu')
    parser.add_argument('--data', type=int, default=0, metavar='N', help='also load N samples of each data set through '
                        'its pipeline: damaged pictures, missing keys of annotations, labels beyond the classes')
    parser.add_argument('--plot', metavar='FILE', help='draw the weights of all losses over the training into this '
                        'file (.png, .pdf, .svg); with labels= also some training images (--data of them, default '
                        f'{LABELLED}) with the labels that teachers add, into FILE with _labels in its name (.png)')
    args = parser.parse_args(argv)
    if args.batch < 1 or args.data < 0:
        parser.error('--batch must be at least 1, and --data at least 0')
    return args


def print_row(name: str, text: str) -> None:
    print(f'{name:<12}{text}')


def print_models(cfg: Config, report: inspection.Report) -> None:
    student, distiller = report.student, report.distiller
    assert student is not None and distiller is not None
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    print_row('student', f'{type(student).__name__}, {millions:.2f} M parameters, of which '
              f'{parameter_count(student) / 1e6:.2f} M are trained')
    if not distiller.teachers:
        print_row('teacher', "the student itself (teacher='self')")
    for name, teacher in distiller.teachers.items():
        millions = sum(parameter.numel() for parameter in teacher.model.parameters()) / 1e6
        weights = report.weights.get(name) if isinstance(report.weights, dict) else report.weights
        if weights is None:
            weights = 'those that its source gives (no teacher_ckpt)'
        print_row(name, f'{teacher.name}: {type(teacher.model).__name__}, {millions:.2f} M parameters, '
                  f'weights: {weights}')
        print_row('inputs', "the teacher takes the student's normalised images as they are" if teacher.same_input
                  else 'are re-normalised for the teacher, whose mean, std, channel order or padding differ')
    print_row('extras', f'{parameter_count(distiller)} trainable parameters in adapters and losses')
    print_row('inherit', ', '.join(path if way == COPY else f'{path} ({way})'
                                   for path, way in distiller.inherit.items()) or 'nothing')
    for note in distiller.grown:
        print_row('', note)
    print_row('task losses', f'times {distiller.task_loss_weight:g}')
    for note in guesses(distiller):
        print_row('found', note)


def print_step(step: StepReport) -> None:
    print_row('dry step', f'{step.images} random images of {step.shape[0]}x{step.shape[1]}, as step {step.step} of '
              'the training, random student')
    print_row('', ', '.join(f'{name} {value:.4g}' for name, value in step.task.items()))
    print_row('', f'total loss {step.total:.4g}, gradient norm on the student {step.gradient:.4g}')
    for term in step.terms:
        print(f'\n{term.name}: {term.method}')
        print_row('  student', ', '.join(term.student_at))
        print_row('  teacher', ', '.join(term.teacher_at))
        print_row('  adapter', f'{term.adapter}; region: {term.region}; {term.extras} trainable extras')
        if term.loss is None:
            print_row('  loss', 'not computed: its weight is 0 at this step')
            continue
        columns = [('level', 'student', 'teacher', 'weight', 'weighted loss')]
        columns += [(str(index), shape_text([level.student]), shape_text([level.teacher]),
                     f'{level.weight:g}', f'{level.loss:.4g}') for index, level in enumerate(term.levels)]
        widths = [max(len(row[column]) for row in columns) for column in range(len(columns[0]))]
        for row in columns:
            print('  ' + '  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
        print_row('  sum', f'loss {term.loss:.4g}, gradient norm on the student {term.gradient:.4g}'
                  + (f', on its extras {term.extras_gradient:.4g}' if term.extras else ''))
        if term.share is not None:
            print_row('  share', f"{term.share:.3g} of the task's gradient at its taps" + (
                ", held there by loss_weight='auto'" if term.measured else
                " with this random student; loss_weight='auto' holds it at 1"
                if term.share > STRONG or term.share < WEAK else ''))


def draw(file: str, cfg: Config, report: inspection.Report, samples: Optional[int]) -> None:
    """Draw the weights over the training, and say them in a line each.

    Args:
        file: to write.
        cfg: the config.
        report: of the check.
        samples: of the training set; None where it cannot be opened, or is not needed.

    Raises:
        ValueError: nothing is known of the length of the training, or the file cannot be written.
    """
    assert report.distiller is not None
    length, guessed = training_length(cfg, samples)
    epochs = (cfg.get('train_cfg') or {}).get('max_epochs')
    if not length:
        raise ValueError('--plot: the config does not say how long it trains (train_cfg with max_iters or max_epochs)')
    found = curves_of(list(report.distiller.terms.values()), length)  # type: ignore[arg-type]
    plot(file, found, os.path.basename(str(cfg.filename)), length // int(epochs) if epochs else None, guessed)
    print()
    if guessed:
        print_row('length', f'{length} iterations: the training set cannot be opened here, so an epoch is taken as '
                  f'{ASSUMED_EPOCH}')
    for curve in found:
        marks = [curve.steps[min(range(len(curve.steps)), key=lambda i: abs(curve.steps[i] - part * length / 4))]
                 for part in range(5)]
        values = dict(zip(curve.steps, curve.values))
        print_row('weights', f'{curve.label}: ' + ', '.join(f'{values[step]:.4g} at {step}' for step in marks))
    print_row('curves', file)


def draw_added(file: str, cfg: Config, report: inspection.Report, count: int) -> None:
    """Draw some training images with the labels that teachers add, and say them in a line each.

    Args:
        file: of the curves.
        cfg: the config.
        report: of the check.
        count: of images.

    Raises:
        ValueError: the data cannot be opened, or the file not be written.
    """
    assert report.distiller is not None and report.whole is not None
    name = f'{os.path.splitext(file)[0]}_labels.png'
    print()
    for line in draw_labels(name, cfg, report.whole, report.distiller, count):
        print_row('labels', line)
    print_row('pictures', name)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    try:
        check_device(args.device)
        if args.plot is not None:
            check_file(args.plot)
        cfg = read_config(args.config, args.cfg_options)
    except REFUSALS as error:
        print(f'{program()}: {words(error)}', file=sys.stderr)
        return 1
    counted = (args.plot or args.data > 0) and training_length(cfg)[1]
    samples = training_samples(cfg) if counted else None
    report = inspection.check(cfg, tuple(args.shape), args.batch, args.device, args.teacher_random,
                              plain=args.data > 0, samples=samples)
    data = look_at_data(cfg, args.data, report.student) if args.data > 0 else None
    if data is not None:
        report.problems += data.problems
        report.warnings += data.warnings
    print_row('config', args.config)
    if report.distiller is not None:
        print_models(cfg, report)
    if report.step is not None:
        print_step(report.step)
    for note in data.notes if data is not None else ():
        print_row('data', note)
    for warning in report.warnings:
        print(f'\nWARNING: {warning}')
    if report.problems:
        print(f'\n{len(report.problems)} problem(s):')
        for number, problem in enumerate(report.problems, 1):
            print(f'  {number}. {problem}')
        if report.instead is not None:
            print(f'\n{report.instead[0].upper()}{report.instead[1:]}')
        return 1
    if args.plot and report.distiller is None:
        print('\nNothing to draw for --plot: there are no losses')
    elif args.plot:
        try:
            if report.distiller is not None and report.distiller.terms:
                draw(args.plot, cfg, report, samples)
            if report.distiller is not None and report.distiller.labelling:
                draw_added(args.plot, cfg, report, args.data or LABELLED)
        except REFUSALS as error:
            print(f'{program()}: {words(error)}', file=sys.stderr)
            return 1
    print('\nok')
    if hook_entries(cfg):
        print(f'Next: kd-mm train {args.config}')
    return 0
