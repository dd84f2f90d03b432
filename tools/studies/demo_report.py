"""The demo's report: numbers from the logs of mmengine, pictures from the checkpoints, one HTML and one Markdown file.

Nothing is computed here that the logs do not hold; a distilled student that is worse is called worse.
"""

import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from stages import read_scalars, seconds_per_iter

from kd_mm.hosts.table import DETECTION
from kd_mm.lab.commands.train import move_data_root
from kd_mm.lab.configs import read_config
from kd_mm.lab.report import plots
from kd_mm.lab.report.examples import LEGEND, Example, object_panels, pixel_panels
from kd_mm.lab.report.gather import look
from kd_mm.lab.report.page import render
from kd_mm.lab.report.sources import ROLES, Side, Source

ROOT = Path(__file__).resolve().parents[2]
NAMES = {'teacher': 'teacher', 'student': 'plain student', 'distilled': 'distilled student'}
#: What a role is called in :mod:`kd_mm.lab.report`.
SIDES = {'teacher': 'teacher', 'student': 'plain', 'distilled': 'student'}
#: What that calls a picture of a model -> what it is called here.
CAPTIONS = {ROLES[side]: NAMES[role] for role, side in SIDES.items()}
METRIC_NAMES = {'coco/bbox_mAP': 'COCO mAP', 'mIoU': 'mIoU'}
#: Lowest score of a box that is drawn.
SCORE = 0.3

#: What :func:`collect` returns: task key -> its numbers.
Results = Dict[str, Dict[str, Any]]
Point = Tuple[float, float]


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def in_percent(metric: str, value: float) -> float:
    """CocoMetric counts from 0 to 1, IoUMetric from 0 to 100."""
    return 100 * value if metric.startswith('coco/') else value


def collect(stages: Sequence[Any], quick: bool = False) -> Results:
    """Results by task key, as plain data (``render`` and the tests need nothing else).

    Returns:
        dict: task key -> dict(title, metric, quick, runs=[dict(role, seed, score, seconds, loss=[(iter, value)],
        metric=[(iter, value)])]).
    """
    results: Results = {}
    for stage in stages:
        task = stage.task
        entry = results.setdefault(task.key, dict(title=task.title, metric=task.metric, quick=quick, runs=[]))
        train, val = read_scalars(stage.work_dir)
        last = max((iteration(row) for row in train), default=stage.total_iters)
        steps = [row['step'] for row in val if task.metric in row]
        # Loops by epoch count validations in epochs; curves are over iterations.
        scale = last / steps[-1] if steps else 1
        curve = [(row['step'] * scale, in_percent(task.metric, row[task.metric])) for row in val if task.metric in row]
        if not curve:
            raise RuntimeError(f'{stage.title}: no {task.metric} in the logs below {stage.work_dir}')
        entry['runs'].append(dict(
            role=stage.role, seed=stage.seed, score=curve[-1][1], seconds=seconds_per_iter(train), metric=curve,
            loss=[(iteration(row), task_loss(row, stage.kd_terms)) for row in train]))
    return results


def iteration(row: Dict[str, Any]) -> int:
    return row['iter' if 'iter' in row else 'step']


def task_loss(row: Dict[str, float], kd_terms: Sequence[str] = ()) -> float:
    """The student's own loss: the total without the terms that distillation adds."""
    return row['loss'] - sum(row[name] for name in kd_terms if name in row)


def mean_and_spread(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean and sample standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Per role: mean, spread, seconds an iteration; the gap closed in percent; the measured cost of distillation."""
    roles: Dict[str, Dict[str, Any]] = {}
    for role in NAMES:
        runs = [run for run in entry['runs'] if run['role'] == role]
        mean, spread = mean_and_spread([run['score'] for run in runs])
        roles[role] = dict(mean=mean, spread=spread, seconds=statistics.fmean([run['seconds'] for run in runs]),
                           scores=[run['score'] for run in runs])
    gap = roles['teacher']['mean'] - roles['student']['mean']
    gain = roles['distilled']['mean'] - roles['student']['mean']
    return dict(roles=roles, gap=gap, gain=gain, closed=100 * gain / gap if gap > 0 else None,
                overhead=roles['distilled']['seconds'] / roles['student']['seconds'])


def verdict(entry: Dict[str, Any]) -> str:
    """What the numbers say, in words."""
    numbers = summary(entry)
    if entry['quick']:
        return 'A quick run: it shows that everything works; its scores mean nothing.'
    gain, spread = numbers['gain'], numbers['roles']['student']['spread']
    words = f'The distilled student is {abs(gain):.1f} points {"better" if gain > 0 else "WORSE"} than the plain one'
    if spread is None:
        words += ' (one seed; run with SEEDS=3 to see the spread).'
    else:
        pair = max(spread, numbers['roles']['distilled']['spread'])
        seeds = len(numbers['roles']['student']['scores'])
        if gain <= 0:
            words += f' over {seeds} seeds.'
        elif gain >= pair:
            words += f' over {seeds} seeds, {gain / pair:.1f} standard deviations (the larger of the two spreads).'
        else:
            words += (f' over {seeds} seeds, which is less than one standard deviation ({pair:.1f}): not a result to '
                      'rely on.')
    if gain <= 0:
        words += ' Distillation did not help here.'
    if numbers['gap'] <= 0:
        words += ' The teacher is no better than the plain student, so there was no gap to close.'
    return words


def score_text(role: Dict[str, Any]) -> str:
    return f'{role["mean"]:.1f}' + ('' if role['spread'] is None else f' ± {role["spread"]:.1f}')


def table(results: Results) -> str:
    """The Markdown table."""
    lines = ['| task | metric | teacher | plain student | distilled student | gain | gap closed | '
             's/iter teacher / plain / distilled | distilled / plain |',
             '|---|---|---|---|---|---|---|---|---|']
    for entry in results.values():
        numbers = summary(entry)
        roles = numbers['roles']
        closed = '-' if numbers['closed'] is None or entry['quick'] else f'{numbers["closed"]:.0f} %'
        gain = '-' if entry['quick'] else f'{numbers["gain"]:+.1f}'
        cells = [entry['title'], METRIC_NAMES.get(entry['metric'], entry['metric']),
                 *(score_text(roles[role]) for role in NAMES), gain, closed,
                 ' / '.join(f'{roles[role]["seconds"]:.3f}' for role in NAMES), f'{numbers["overhead"]:.2f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def notes(results: Results) -> List[str]:
    """What a reader needs to know to read the table."""
    seeds = max(len([run for run in entry['runs'] if run['role'] == 'student']) for entry in results.values())
    lines = ['Same data, schedule and optimizer for all three; everything is trained from scratch. '
             'The score is that of the last validation, not the best one.']
    if seeds > 1:
        lines.append(f'Students: mean ± sample standard deviation over {seeds} seeds. One teacher (seed 0) a task.')
    lines.append('Seconds an iteration are medians over the log, with two trainings sharing the machine. '
                 '"distilled / plain" contains the teacher\'s forward pass.')
    return lines


def markdown(results: Results, profile: Optional[Dict[str, str]] = None) -> str:
    parts = ['# Distillation demo\n', table(results)]
    for entry in results.values():
        parts.append(f'- **{entry["title"]}**: {verdict(entry)}')
    parts.append('')
    parts += notes(results)
    parts += ['', '| task | role | seed | score | s/iter |', '|---|---|---|---|---|']
    for key, entry in results.items():
        parts += [f'| {key} | {NAMES[run["role"]]} | {run["seed"]} | {run["score"]:.2f} | {run["seconds"]:.3f} |'
                  for run in entry['runs']]
    if profile:
        parts += ['', '## Cost of distillation (tools/measure.py)', '']
        parts += [f'### {title}\n\n```\n{text}\n```\n' for title, text in profile.items()]
    return '\n'.join(parts) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# curves and pictures, by what kd-mm report uses


def smooth(points: Sequence[Point], window: int = 5) -> List[Point]:
    values = [y for _, y in points]
    return [(x, statistics.fmean(values[max(0, i - window + 1):i + 1])) for i, (x, _) in enumerate(points)]


def charts(entry: Dict[str, Any]) -> List[str]:
    """The losses and the scores of all runs, as SVG."""
    curves: Dict[str, List[plots.Line]] = {'loss': [], 'metric': []}
    for run in entry['runs']:
        colour = plots.COLOURS[SIDES[run['role']]]
        curves['loss'].append((NAMES[run['role']], colour, smooth(run['loss'])))
        curves['metric'].append((NAMES[run['role']], colour, run['metric']))
    metric = METRIC_NAMES.get(entry['metric'], entry['metric'])
    return [plots.lines('Task loss (training, without the distillation terms)', curves['loss'], 'iteration'),
            plots.lines(f'{metric} (validation)', curves['metric'], 'iteration', low=0.0)]


def draw_pictures(stages: Sequence[Any], count: int = 4) -> Dict[str, List[Example]]:
    """Predictions side by side, for ``count`` validation images of each task (students of the first seed)."""
    pictures: Dict[str, List[Example]] = {}
    for task in dict.fromkeys(stage.task for stage in stages):
        chosen = {stage.role: stage for stage in stages if stage.task is task and stage.seed == 0}
        found = look(source_of(chosen), count, 'val', 'cpu', (), lambda things, what: things)
        pictures[task.key] = []
        for at, index in enumerate(found.indices):
            name, panels = object_panels(found, at, dict.fromkeys(found.models, SCORE)) if (
                found.task == DETECTION) else pixel_panels(found, at)
            named = [replace(panel, caption=CAPTIONS.get(panel.caption, panel.caption)) for panel in panels]
            pictures[task.key].append(Example(name, tuple(named), index))
    return pictures


def source_of(stages: Mapping[str, Any]) -> Source:
    """The models of a task's finished stages, by role; a distilled checkpoint is a stock student's."""
    sides = {}
    for role, stage in stages.items():
        path = str(stage.task.path('student' if role == 'distilled' else role))
        config = read_config(path)
        move_data_root(config, config.data_root, stage.data_root)  # the same meaning of data_root as in training
        sides[SIDES[role]] = Side(config, path, str(stage.checkpoint()))
    return Source(sides['student'].cfg, sides)


# ---------------------------------------------------------------------------------------------------------------------
# cost of distillation, measured in one process


def run_profile(stages: Sequence[Any], steps: int = 5, timeout: float = 120) -> Dict[str, str]:
    """Output of ``tools/measure.py`` for each distilled config, where the tool is there and works."""
    tool = ROOT / 'tools' / 'measure.py'
    texts: Dict[str, str] = {}
    if not tool.exists():
        return texts
    for stage in stages:
        if stage.role != 'distilled' or stage.seed != 0:
            continue
        command = [sys.executable, str(tool), str(stage.task.path('distilled')), '--steps', str(steps), '--batch', '4',
                   '--shape', *map(str, stage.task.shape),
                   '--cfg-options', f'custom_hooks.0.teacher_ckpt={stage.teacher.checkpoint()}']
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            texts[stage.task.title] = done.stdout.strip()
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# the page


def page(results: Results, pictures: Mapping[str, Sequence[Example]],
         profile: Optional[Dict[str, str]] = None) -> str:
    """The page of ``demo.html`` beside this file, which stands on the base that ``kd-mm report`` has."""
    head, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table(results).splitlines()]
    tasks = [dict(title=entry['title'], verdict=verdict(entry), plots=charts(entry), examples=pictures.get(key, []))
             for key, entry in results.items()]
    return render('demo.html', [Path(__file__).parent], head=head, rows=rows[1:], notes=notes(results), tasks=tasks,
                  detection=LEGEND,
                  profile=profile or {})


def write(work_dir: Union[str, Path], results: Results, pictures: Mapping[str, Sequence[Example]],
          profile: Optional[Dict[str, str]] = None) -> List[Path]:
    """Write report.md and report.html; return their paths."""
    work_dir = Path(work_dir)
    paths = [work_dir / 'report.html', work_dir / 'report.md']
    paths[0].write_text(page(results, pictures, profile), encoding='utf-8')
    paths[1].write_text(markdown(results, profile), encoding='utf-8')
    return paths
