"""``kd-mm report``: where the student still loses against its teacher, as a page and as JSON."""

import json
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence, Tuple

import click
import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.commands.train import check_data, move_data_root
from kd_mm.lab.configs import apply_options
from kd_mm.lab.models import check_device
from kd_mm.lab.report import page, plots, show
from kd_mm.lab.report.examples import examples
from kd_mm.lab.report.gather import look
from kd_mm.lab.report.numbers import numbers
from kd_mm.lab.report.sources import ROLES, Source, add_teacher, from_files, from_work_dir, side, spread

#: What is written.
PAGE, JSON = 'report.html', 'report.json'
Pair = Optional[Tuple[str, str]]


def sources(work_dir: Optional[str], student: Pair, teacher: Pair, plain: Pair) -> Source:
    """The models of a command line.

    Raises:
        FileNotFoundError, ValueError: what is wrong and the mend.
    """
    if work_dir is None and student is None:
        raise ValueError('nothing to report on: give a WORK_DIR, or --student CONFIG CHECKPOINT')
    if work_dir is not None and student is not None:
        raise ValueError('WORK_DIR has a student already: leave it out, or leave --student out')
    source = from_work_dir(work_dir) if work_dir is not None else from_files(*student)  # type: ignore[misc]
    for role, given in (('teacher', teacher), ('plain', plain)):
        if given is not None:
            source.sides[role] = side(role, *given)
            source.notes = [note for note in source.notes if f'--{role} CONFIG' not in note]
    if teacher is None:
        add_teacher(source)
    return source


def change(source: Source, options: Sequence[str]) -> None:
    """Apply ``--cfg-options`` to the student's config, as ``kd-mm train`` does."""
    values = {}
    for option in options:
        key, equals, value = option.partition('=')
        if not equals:
            raise ValueError(f'--cfg-options {option}: write KEY=VALUE')
        values[key] = DictAction._parse_iterable(value)
    root = source.cfg.get('data_root')
    apply_options(source.cfg, values)
    if 'data_root' in values and isinstance(root, str):
        move_data_root(source.cfg, root, str(values['data_root']))


def summary(report: Any, console: Console) -> None:
    """The scores and what to try, on the console."""
    models = report['models']
    table = Table('model', f'{report["metric"]} in %', 'against the teacher')
    best = models.get('teacher', {}).get('score')
    for role, entry in models.items():
        table.add_row(ROLES[role], page.percent(entry['score']),
                      '' if role == 'teacher' else page.signed(page.difference(entry['score'], best)))
    console.print(table)
    for number, entry in enumerate(report['advice'], 1):
        there = f' In this training already: {", ".join(entry["there"])}.' if entry['there'] else ''
        console.print(f'{number}. {entry["seen"]} {entry["suggest"].replace("`", "")}{there}', highlight=False,
                      markup=False, soft_wrap=True)


@click.command('report')
@click.argument('work_dir', required=False, metavar='[WORK_DIR]')
@click.option('--student', nargs=2, metavar='CONFIG CKPT', help='The student, without a work dir.')
@click.option('--teacher', nargs=2, metavar='CONFIG CKPT', help='The teacher. Default: that of the distillation hook '
              "in the student's config.")
@click.option('--plain', nargs=2, metavar='CONFIG CKPT', help='A student that was trained without distillation. '
              'Default: that of kd-mm distill --baseline.')
@click.option('--out', help='Folder of the page and the JSON. Default: WORK_DIR, or work_dirs/report.')
@click.option('--split', type=click.Choice(['val', 'test']), default='val', show_default=True,
              help="Which data of the student's config.")
@click.option('--images', type=click.IntRange(1), help='So many images, spread over the data. Default: all.')
@click.option('--examples', 'shown', type=click.IntRange(0), default=6, show_default=True,
              help='Images where the teacher is right and the student wrong.')
@click.option('--checkpoints', type=click.IntRange(0), default=5, show_default=True,
              help='Earlier checkpoints of the work dir whose features are compared with the teacher.')
@click.option('--device', help='cpu, cuda, ... Default: cuda where there is one.')
@click.option('--cfg-options', multiple=True, metavar='KEY=VALUE', help="Change the student's config, for example "
              'data_root=/data/coco. May be repeated.')
def command(work_dir: Optional[str], student: Pair, teacher: Pair, plain: Pair, out: Optional[str], split: str,
            images: Optional[int], shown: int, checkpoints: int, device: Optional[str],
            cfg_options: Tuple[str, ...]) -> None:
    """Where the student still loses, and what to try next: one page and one JSON.

    WORK_DIR is that of kd-mm distill, kd-mm train or the host's tools/train.py. Without one:

    \b
        kd-mm report --student CONFIG CKPT --teacher CONFIG CKPT --plain CONFIG CKPT

    Teacher, student and, if there is one, the student without distillation predict the same images, those of the
    student's validation data. The page holds its pictures, and opens on a phone.
    """
    console = Console()
    try:
        plots.require('kd-mm report')
        if device is not None:
            check_device(device)
        folder = Path(out or work_dir or 'work_dirs/report')
        if out is not None and folder.is_file():
            raise ValueError(f'--out {folder} is a file. Give a folder')
        allow_mmengine_checkpoints()
        source = sources(work_dir, student, teacher, plain)
        change(source, cfg_options)
        check_data(source.cfg, (split, ))
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                      console=console) as progress:

            def track(things: Sequence[Any], what: str) -> Iterable[Any]:
                return progress.track(things, description=what)

            found = look(source, images, split, device or ('cuda' if torch.cuda.is_available() else 'cpu'),
                         spread(source.history, checkpoints), track)
            report = numbers(found, source, split, track)
        pictures = examples(found, report, shown)
        report['examples'] = [dict(index=example.index, title=example.title) for example in pictures]
        page.write(folder / JSON, json.dumps(report, indent=1, allow_nan=False) + '\n')
        page.write(folder / PAGE, show.html(report, pictures, found.palette))
    except REFUSALS as error:
        fail(error)
    for note in report['notes']:
        click.echo(f'note: {note}')
    summary(report, console)
    click.echo(f'{folder / PAGE}\n{folder / JSON}')
