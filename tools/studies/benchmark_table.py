"""The page of ``tools/studies/benchmark.py``: what was measured, as the Markdown of ``configs/<task>/README.md``."""

import statistics
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

if TYPE_CHECKING:
    from benchmark import Results


def mean_text(values: Sequence[float]) -> str:
    if not values:
        return '-'
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.1f}{spread}'


def cost_cells(cost: Optional[Dict[str, Any]]) -> List[str]:
    if not cost or 'error' in cost:
        return ['-', '-', '-']
    memory = '-'
    if cost['plain_bytes'] and cost['kd_bytes']:
        memory = f'{cost["kd_bytes"] / 2**20:.0f} ({cost["kd_bytes"] / cost["plain_bytes"]:.2f}x)'
    return [f'{cost["kd_ms"] / 1000:.3f} ({cost["kd_ms"] / cost["plain_ms"]:.2f}x)', f'{cost["ratio"]:.2f}', memory]


def table(settings: Any, results: 'Results') -> Tuple[str, str]:
    """The Markdown table: best mean first, the plain student where it belongs."""
    name = {'coco/bbox_mAP': 'COCO mAP'}.get(settings.metric, settings.metric)
    plain = results.scores('plain')
    rows = []
    for method in ('plain', *settings.methods):
        scores = results.scores(method)
        if method == 'plain':
            cells = ['**plain student**', mean_text(scores), str(len(scores)), '', '', '', '', '']
        elif method in results.data['errors']:
            cells = [f'`{method}`', 'failed', '', '', '', '', '', '']
        elif not scores:
            continue
        else:
            # Students with the same seed start from the same weights: compare those.
            pairs = [results.data['runs'][method][seed]['score'] - run['score']
                     for seed, run in results.data['runs'].get('plain', {}).items()
                     if seed in results.data['runs'][method]]
            ratios = [run['kd_task_ratio'] for run in results.data['runs'][method].values() if 'kd_task_ratio' in run]
            gain = f'{statistics.fmean(pairs):+.1f}' if pairs else ''
            ratio = f'{statistics.fmean(ratios):.2g}' if ratios else ''
            cells = [f'`{method}`', mean_text(scores), str(len(scores)), gain, ratio,
                     *cost_cells(results.data['cost'].get(method))]
        rows.append((-(statistics.fmean(scores) if scores else -1), method, cells))
    lines = [f'| method | {name} | seeds | against plain | KD/task | s/step (against plain) | step ratio | '
             'peak memory, MiB (against plain) |', '|---|---|---|---|---|---|---|---|']
    lines += ['| ' + ' | '.join(cells) + ' |' for _, _, cells in sorted(rows, key=lambda row: row[:2])]
    spread = f' The spread of the plain student is {statistics.stdev(plain):.1f}.' if len(plain) > 1 else (
        ' One seed: differences of a point or two may be chance.')
    return '\n'.join(lines) + '\n', spread


HEAD = """# Methods for {kind}: measured against the plain student

Each folder here is a method: its card and configs. The tables are written by `python tools/studies/benchmark.py
--task {task} --data-root PATH` from `benchmark.json`; pairs, schedules, taps and weights are in
[configs/benchmark](../benchmark/{task}.py).

Everything is trained from scratch: a short schedule of a tiny student on a small set, with the weights of the method's
own config and no search for better ones; what was tried besides stands below the table (to repeat: `tools/train.py` on
the config that the benchmark has written, with `--cfg-options`), and so does what was chosen by it. The tables show
that a method works and what it costs, not which method is best on COCO or Cityscapes.
"""
LEGEND = """## How to read it

Scores: mean ± sample standard deviation, of the last checkpoint. *Against plain*: mean difference of the students with
the same seed. *KD/task*: distillation loss over the student's own loss, median of the log. *s/step* and *peak memory*
are of one process and one thread, 4 images of {shape}. *Step ratio*: KD step / (plain step + needed part of the
teacher); what lies above 1 is the method and the engine (tools/measure.py). {hosts}.
"""


def section(settings: Any, results: 'Results') -> str:
    """One pair: what it is, its table, and what there is to say about single methods."""
    text, spread = table(settings, results)
    missing = [method for method in settings.methods
               if not results.scores(method) and method not in results.data['errors']]
    if not results.data['runs'] and not results.data['errors']:
        return f'## {settings.title}\n\nNot measured yet.\n'
    parts = [f'## {settings.title}\n', f'The teacher reaches {mean_text(results.scores("teacher"))}.{spread}\n', text]
    failed = {**results.data['errors'],
              **{method: cost['error'] for method, cost in results.data['cost'].items() if 'error' in cost}}
    parts += [f'- `{method}` failed: {reason}' for method, reason in failed.items()]
    parts += [f'- `{method}`: {note}' for method, note in settings.get('notes', {}).items()]
    parts += [f'- `{method}` is not in the table: {reason}' for method, reason in settings.get('left_out', {}).items()]
    if missing:
        parts.append(f'\nNot measured yet: {", ".join(missing)}.')
    return '\n'.join(parts) + '\n'


def page(task: str, pairs: Sequence[Tuple[Any, 'Results']], hosts: Dict[str, str]) -> str:
    """The whole of ``configs/<task>/README.md``; ``pairs`` is a list of (settings, results)."""
    kind = {'det': 'detection', 'seg': 'segmentation'}[task]
    shapes = ', '.join(dict.fromkeys('x'.join(map(str, settings.shape)) for settings, _ in pairs))
    return '\n'.join([
        HEAD.format(kind=kind, task=task), *(section(*pair) for pair in pairs),
        LEGEND.format(shape=shapes, hosts=', '.join(f'{name} {version}' for name, version in hosts.items()))])
