"""``kd-mm methods``: every loss, what it compares, what it needs, and where it stands in our tables."""

import inspect
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Type

import click

import kd_mm
from kd_mm.lab.commands import fail
from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS, choices
from kd_mm.types.query import MaskQueryView, QueryView

#: What a loss compares, in one word.
KINDS = ('features', 'logits', 'heads', 'queries', 'proposals')
#: Titles of the pairs of models in our tables, by their names in ``benchmark.json``.
PAIRS = {
    'det': 'dense detector', 'det_two_stage': 'two-stage detector', 'seg': 'segmenter',
    'lite_gfl': 'dense detector, pretrained', 'lite_rcnn': 'two-stage detector, pretrained',
    'lite_dino': 'detector with queries, pretrained', 'lite_psp': 'segmenter, pretrained',
    'segformer': 'transformer segmenter'}
#: Of these there are columns where many losses are listed.
COLUMNS = {'dense detector': 'our rank: dense', 'two-stage detector': 'two-stage', 'segmenter': 'segmenter'}
#: So many losses are described; of more there is a line each.
FEW = 5


def compares(cls: Type[Any]) -> str:
    """One of :data:`KINDS`."""
    if issubclass(cls, HeadLoss):
        return 'queries' if cls.compares in (QueryView, MaskQueryView) else 'heads'
    if cls.rows_only:
        return 'proposals'
    return 'logits' if cls.logits else 'features'


def needs(cls: Type[Any]) -> List[str]:
    """What a loss asks for besides two models."""
    found = [word for word, asked in (
        ('boxes', cls.needs_boxes), ('label maps', cls.needs_seg_map),
        ('a first stage (tools/learn_tokens.py)', hasattr(cls, 'learner')),  # the protocols of the base
        ('a network of its own', hasattr(cls, 'opponents'))) if asked]
    required = [name for name, parameter in inspect.signature(cls).parameters.items()
                if parameter.default is inspect.Parameter.empty]
    return found + [f'the argument {name}' for name in required]


def configs_folder() -> Optional[Path]:
    """The folder with the tables: of an installation, or of a checkout."""
    package = Path(kd_mm.__file__).resolve().parent
    return next((folder for folder in (package / '.mim' / 'configs', package.parent / 'configs')
                 if (folder / 'det' / 'benchmark.json').is_file()), None)


@dataclass
class Place:
    """Where a method stands in one of our tables.

    Attributes:
        rank: from 1.
        of: methods in the table.
        cost: of a step, in those of the plain student; None where it was not measured.
    """

    rank: int
    of: int
    cost: Optional[float] = None

    def __str__(self) -> str:
        return f'{self.rank} of {self.of}' + ('' if self.cost is None else f', {self.cost:.2f} times the plain step')


def ranks() -> Dict[str, Dict[str, Place]]:
    """Module of a method -> pair of models -> its place, from ``configs/*/benchmark.json``."""
    folder, found = configs_folder(), {}  # type: Optional[Path], Dict[str, Dict[str, Place]]
    for file in sorted(folder.glob('*/benchmark.json')) if folder else ():
        for pair, content in json.loads(file.read_text(encoding='utf-8'))['pairs'].items():
            # Names with a sign are no single methods: measured weights, combinations, other students.
            scores = {name: statistics.fmean(run['score'] for run in runs.values())
                      for name, runs in content['runs'].items()
                      if runs and name not in ('plain', 'teacher') and not set(':+') & set(name)}
            order = sorted(scores, key=lambda name: -scores[name])
            for place, name in enumerate(order, 1):
                cost = content.get('cost', {}).get(name) or {}
                known = cost.get('plain_ms') and cost.get('kd_ms')
                found.setdefault(name, {})[PAIRS.get(pair, pair)] = Place(
                    place, len(order), cost['kd_ms'] / cost['plain_ms'] if known else None)
    return found


def tasks(method: str) -> List[str]:
    """The tasks that a method has configs for; both where that is not known."""
    folder = configs_folder()
    names = {'det': 'detection', 'seg': 'segmentation'}
    found = [names[task] for task in names if folder is not None and (folder / task / method).is_dir()]
    return found or list(names.values())


@dataclass
class Row:
    """What is said of a loss.

    Attributes:
        loss: name of its class.
        title: of the method, with its paper.
        compares: one of :data:`KINDS`.
        needs: see :func:`needs`.
        tasks: see :func:`tasks`.
        places: see :func:`ranks`.
    """

    loss: str
    title: str
    compares: str
    needs: List[str]
    tasks: List[str]
    places: Dict[str, Place]

    def of_task(self, task: Optional[str]) -> List[Place]:
        """Its places in the tables of a task, or of both."""
        return [place for pair, place in self.places.items()
                if task is None or ('segmenter' in pair) == (task == 'segmentation')]

    def best(self, task: Optional[str]) -> float:
        """Its best place there."""
        return min((place.rank for place in self.of_task(task)), default=math.inf)

    def cost(self, task: Optional[str]) -> float:
        """The most that it costs there, as far as that was measured."""
        return max((place.cost for place in self.of_task(task) if place.cost is not None), default=math.inf)


def rows() -> List[Row]:
    """All losses, in the order of the alphabet."""
    known, found = ranks(), []
    for loss in choices(KDLoss):
        cls = MODELS.module_dict[loss]
        method = cls.__module__.rsplit('.', 1)[1]
        title = ' '.join((cls.__doc__ or '').strip().split('\n\n')[0].split()).rstrip('.')
        found.append(Row(loss, title, compares(cls), needs(cls), tasks(method), known.get(method, {})))
    return sorted(found, key=lambda row: row.loss.lower())


def print_whole(row: Row) -> None:
    """Everything about a loss."""
    click.secho(row.loss, bold=True)
    places = '; '.join(f'{pair}: {text}' for pair, text in row.places.items())
    for what, text in (('', row.title), ('compares', row.compares), ('needs', ', '.join(row.needs) or 'nothing more'),
                       ('tasks', ', '.join(row.tasks)), ('our rank', places or 'not in our tables')):
        click.echo(click.wrap_text(text, 110, f'  {what:<10}', ' ' * 12))


def print_lines(found: Sequence[Row]) -> None:
    """A line for each of many losses, with its places in our tables that have most methods."""
    table = [('loss', 'compares', 'needs', *COLUMNS.values())]
    table += [(row.loss, row.compares, ', '.join(need.split(' (')[0] for need in row.needs) or '-',
               *(str(row.places.get(pair, '-')).split(',')[0] for pair in COLUMNS)) for row in found]
    widths = [max(map(len, column)) for column in zip(*table)]
    for index, cells in enumerate(table):
        line = '  '.join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        click.secho(line, bold=not index)


@click.command('methods')
@click.option('--compares', 'kind', type=click.Choice(KINDS), help='Only losses that compare this.')
@click.option('--task', type=click.Choice(['detection', 'segmentation']), help='Only those with configs for this task.')
@click.option('--no-needs', is_flag=True, help='Only losses that need nothing besides two models.')
@click.option('--needs', 'need', metavar='WORD', help='Only losses with this in what they need: boxes, label maps, '
              'first stage, network, argument.')
@click.option('--rank', type=click.IntRange(1), metavar='N', help='Only the first N of each of our tables (of --task), '
              'the best first.')
@click.option('--cost', type=click.FloatRange(1), metavar='X', help='Only losses whose step takes at most X times the '
              'plain one, wherever our tables (of --task) have measured it.')
@click.option('--long', 'whole', is_flag=True, help='Everything about each, also where there are many.')
@click.argument('name', required=False)
def command(kind: Optional[str], task: Optional[str], no_needs: bool, need: Optional[str], rank: Optional[int],
            cost: Optional[float], whole: bool, name: Optional[str]) -> None:
    """List the losses; with NAME those with it in their name or title.

    A few are described; of many there is a line each. Ranks are those of our own tables: tiny students on small sets,
    two seeds. They are known in a checkout only.
    """
    found = [row for row in rows() if not (kind and row.compares != kind) and not (task and task not in row.tasks)
             and not (no_needs and row.needs) and not (name and name.lower() not in f'{row.loss} {row.title}'.lower())
             and not (need and need.lower() not in ', '.join(row.needs)) and not (rank and row.best(task) > rank)
             and not (cost and row.cost(task) > cost)]
    if not found and (rank or cost) and configs_folder() is None:
        fail('our tables are not in this installation, so no rank or cost is known: leave --rank and --cost out')
    if not found:
        fail('no loss is like that; kd-mm methods lists all')
    if rank:
        found.sort(key=lambda row: row.best(task))
    if whole or len(found) <= FEW:
        for row in found:
            print_whole(row)
    else:
        print_lines(found)
    more = '' if whole or len(found) <= FEW else '. More about one: kd-mm methods NAME'
    click.echo(f'\n{len(found)} loss{"" if len(found) == 1 else "es"}{more}')
