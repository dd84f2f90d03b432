"""The page of ``tools/studies/benchmark.py``: what was measured, as the Markdown of ``configs/<task>/README.md``."""

import statistics
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from benchmark_plan import LONGER, RECIPE, entries, single

if TYPE_CHECKING:
    from benchmark_results import Book, Results

METRICS = {'coco/bbox_mAP': 'COCO mAP'}


def mean_text(values: Sequence[float]) -> str:
    if not values:
        return '-'
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.1f}{spread}'


def gain_text(mean: float, half: Optional[float]) -> str:
    """With the ends of its interval, where there is one."""
    return f'{mean:+.1f}' + ('' if half is None else f' [{mean - half:+.1f}, {mean + half:+.1f}]')


def cost_cells(cost: Optional[Dict[str, Any]]) -> List[str]:
    if not cost:
        return ['-', '-', '-']
    memory = '-'
    if cost['plain_bytes'] and cost['kd_bytes']:
        memory = f'{cost["kd_bytes"] / 2**20:.0f} ({cost["kd_bytes"] / cost["plain_bytes"]:.2f}x)'
    return [f'{cost["kd_ms"] / 1000:.3f} ({cost["kd_ms"] / cost["plain_ms"]:.2f}x)', f'{cost["ratio"]:.2f}', memory]


def rows_of(settings: Any, results: 'Results') -> List[str]:
    """Every row that a pair may have."""
    return [*entries(settings), RECIPE,
            *(name for name in results.data['runs'] if name.startswith(LONGER))]


def row(settings: Any, results: 'Results', name: str) -> List[str]:
    """The cells of a row with scores."""
    scores, runs = results.scores(name), results.data['runs'][name]
    ratios = [run['kd_task_ratio'] for run in runs.values() if 'kd_task_ratio' in run]
    ratio = f'{statistics.fmean(ratios):.2g}' if ratios else ''
    against = settings.get('rows', {}).get(name, {}).get('against', 'plain')
    gain, same_time = results.gain(name, against), results.equal_time(name) if against == 'plain' else None
    beside = '' if against == 'plain' else f' (against `{against}`)'
    seconds = '' if same_time is None else f'{gain_text(*same_time[:2])} (x{same_time[3]:g})'
    return [f'`{name}`', mean_text(scores), str(len(scores)),
            '' if gain is None else gain_text(*gain[:2]) + beside, results.verdict(name, against), seconds, ratio,
            *cost_cells(results.cost(name))]


def table(settings: Any, results: 'Results') -> Tuple[str, str]:
    """The Markdown table: best mean first, the plain student where it belongs."""
    name = METRICS.get(settings.metric, settings.metric)
    plain = results.scores('plain')
    rows = []
    for method in ('plain', *rows_of(settings, results)):
        scores = results.scores(method)
        if method == 'plain':
            cells = ['**plain student**', mean_text(scores), str(len(scores)), *[''] * 7]
        elif method in results.data['errors']:
            cells = [f'`{method}`', 'failed', *[''] * 8]
        elif not scores:
            continue
        else:
            cells = row(settings, results, method)
        rows.append((-(statistics.fmean(scores) if scores else -1), method, cells))
    lines = [f'| method | {name} | seeds | against plain | shown | at equal time | KD/task | s/step (against plain) | '
             'step ratio | peak memory, MiB (against plain) |', '|' + '---|' * 10]
    lines += ['| ' + ' | '.join(cells) + ' |' for _, _, cells in sorted(rows, key=lambda found: found[:2])]
    spread = f' The spread of the plain student is {statistics.stdev(plain):.1f}.' if len(plain) > 1 else (
        ' One seed: differences of a point or two may be chance.')
    return '\n'.join(lines) + '\n', spread


HEAD = """# Methods for {kind}: measured against the plain student

Each folder here is a method: its card and configs. The tables are written by `python tools/studies/benchmark.py
--task {task} --data-root PATH` from `benchmark.json`; pairs, schedules, taps and weights are in
[configs/benchmark](../benchmark/{task}.py).

Short schedules of small students on small sets, with the weights of the method's own config and no search for better
ones; what was tried besides stands below the table (to repeat: `tools/train.py` on the config that the benchmark has
written, with `--cfg-options`), and so does what was chosen by it. The tables show that a method works and what it
costs, not which method is best on COCO or Cityscapes. Another set is measured with `--dataset ROOT`, any COCO or
Cityscapes root.
"""
LEGEND = """## How to read it

Scores: mean ± sample standard deviation, of the last checkpoint. *Against plain*: mean difference of the students with
the same seed, with its 95 % interval (Student's t of the differences) where there are two seeds or more. *Shown*: what
that interval says. With two seeds it is wide, and of twenty methods that change nothing one is called better or worse.
*At equal time*: the same against a plain student with xN as many steps, at least as long as the method takes by
*s/step*; the teacher's own training counts nowhere. `NAME:auto`: the method with `loss_weight='auto'` for each of its
losses. *KD/task*: distillation loss over the student's own loss, median of the log. *s/step* and *peak memory* are of
one process and one thread, 4 images of {shape}. *Step ratio*: KD step / (plain step + needed part of the teacher); what
lies above 1 is the method and the engine (tools/measure.py).

{made}
"""


def made_text(book: 'Book') -> str:
    """Versions and machines."""
    lines = []
    for item in book.made:
        machine, found = item['machine'], ', '.join(f'{name} {version}' for name, version in item['versions'].items())
        lines.append(f'- `{item["command"]}`: {machine["processor"]}, {machine["threads"]} thread a training; Python '
                     f'{item["python"]}, {found}.')
    if book.hosts:
        found = ', '.join(f'{name} {version}' for name, version in book.hosts.items())
        lines.append(f'- Results without a note of command and machine: {found}.')
    return '\n'.join(lines)


def section(settings: Any, results: 'Results') -> str:
    """One pair: what it is, its table, and what there is to say about single methods."""
    text, spread = table(settings, results)
    if not results.data['runs'] and not results.data['errors']:
        return f'## {settings.title}\n\nNot measured yet.\n'
    known = entries(settings)
    missing = [name for name in known if not results.scores(name) and name not in results.data['errors']]
    parts = [f'## {settings.title}\n']
    if settings.get('about'):
        parts.append(f'{settings.about}\n')
    parts += [f'The teacher reaches {mean_text(results.scores("teacher"))}.{spread}\n', text]
    place = results.percentile(RECIPE, [name for name in known if single(name)])
    if place is not None:
        recipe = results.data.get('recipe')
        parts.append(f'`kd-mm distill --recipe auto` takes `{recipe}` here: at or above {place:.0f} % of the single '
                     'methods that were measured.\n')
    failed = {**results.data['errors'],
              **{method: cost['error'] for method, cost in results.data['cost'].items() if 'error' in cost}}
    parts += [f'- `{method}` failed: {reason}' for method, reason in failed.items()]
    parts += [f'- `{method}`: {entry["note"]}' for method, entry in settings.get('rows', {}).items()
              if results.scores(method)]
    parts += [f'- `{method}`: {results.filled(method, note)}' for method, note in settings.get('notes', {}).items()
              if results.scores(method)]
    parts += [f'- `{method}` is not in the table: {reason}' for method, reason in settings.get('left_out', {}).items()]
    strangers = results.strangers()
    if strangers:
        parts.append(f'\nLearned from another training of the teacher than the rest: {", ".join(strangers)}.')
    if missing:
        parts.append(f'\nNot measured yet: {", ".join(missing)}.')
    return '\n'.join(parts) + '\n'


def page(task: str, pairs: Sequence[Tuple[Any, 'Results']], book: 'Book') -> str:
    """The whole of ``configs/<task>/README.md``; ``pairs`` is a list of (settings, results)."""
    kind = {'det': 'detection', 'seg': 'segmentation'}[task]
    shapes = ', '.join(dict.fromkeys('x'.join(map(str, settings.shape)) for settings, _ in pairs))
    return '\n'.join([HEAD.format(kind=kind, task=task), *(section(*pair) for pair in pairs),
                      LEGEND.format(shape=shapes, made=made_text(book))])
