"""``kd-mm compare``: scores over runs and seeds, and whether they show a difference."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.commands.evaluate import OTHERS, primary, sign, with_span
from kd_mm.lab.logs import log_rows, read_state, rows_of

#: Entries of a config in which two runs of the same training differ.
OWN = ('randomness', 'work_dir', 'experiment_name', 'load_from', 'resume', 'visualizer', 'launcher', 'filename',
       'vis_backends')

#: What a line of the log holds besides.
NO_METRIC = ('step', 'iter', 'epoch', 'time', 'data_time')


@dataclass
class Group:
    """Runs of one training with different seeds.

    Attributes:
        name: for the table.
        scores: (seed, score) of each run; the seed is None where it is not known.
    """

    name: str
    scores: List[Tuple[Optional[int], float]] = field(default_factory=list)

    @property
    def values(self) -> List[float]:
        return [score for _, score in self.scores]


def read_run(folder: str, metric: Optional[str]) -> List[Tuple[str, str, Optional[int], Dict[str, float]]]:
    """What one folder holds: label, key of its group, seed and metrics of each training in it.

    Raises:
        ValueError: it is no run, or nothing was evaluated in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f'no such run: {folder}. Give work dirs of kd-mm train or kd-mm distill')
    state = read_state(path)
    if state is not None:
        found = []
        for name in ('baseline', 'distilled'):
            metrics = state['results'].get(name, {}).get('metrics')
            if metrics:
                seed, key = _config_of(path / name)
                label = 'plain student' if name == 'baseline' else str(state['what'].get('recipe'))
                found.append((label, key or f'{name} of {state["what"]}', seed, metrics))
        if not found:
            raise ValueError(f'{folder}: this distillation has no scores yet. Finish it by the same command')
        return found
    metrics = _last_metrics(path, metric)
    if not metrics and metric is not None and _last_metrics(path, None):
        raise ValueError(f'{folder} has no {metric!r}; it has {", ".join(_last_metrics(path, None))}')
    if not metrics:
        raise ValueError(f'{folder}: no evaluation in its logs (vis_data/scalars.json). Train with a validation, or '
                         'evaluate by kd-mm test')
    seed, key = _config_of(path)
    return [(path.name, key or str(path), seed, metrics)]


def _last_metrics(path: Path, metric: Optional[str]) -> Dict[str, float]:
    """The last line of the logs that holds an evaluation."""
    found: Dict[str, float] = {}
    # kd-mm distill scores its students in a folder of their own, which counts where the training has none.
    for folder in (path, path / 'evaluation'):
        for row in log_rows(folder) if not found else ():
            found = _metrics(row, metric) or found
    if not found:
        for file in sorted(path.glob('*/*.json')):  # kd-mm test writes one file
            for row in rows_of(file):
                found = _metrics(row, metric) or found
    return found


def _metrics(content: Any, metric: Optional[str]) -> Dict[str, float]:
    """The metrics in a line of a log; nothing if it is of a training step, or has not the one that is wanted."""
    if not isinstance(content, dict) or 'lr' in content or 'loss' in content or (metric and metric not in content):
        return {}
    return {key: float(value) for key, value in content.items() if isinstance(value, (int, float))
            and key not in NO_METRIC and not key.startswith(OTHERS)}


def _config_of(path: Path) -> Tuple[Optional[int], Optional[str]]:
    """Seed of a run, and a text that is the same for runs of the same training."""
    files = sorted(path.glob('*/vis_data/config.py'))
    if not files:
        return None, None
    try:
        cfg = Config.fromfile(str(files[-1])).to_dict()
    except Exception:  # a config of another version says nothing
        return None, None
    seed = (cfg.get('randomness') or {}).get('seed')
    return seed, json.dumps({key: value for key, value in cfg.items() if key not in OWN}, sort_keys=True, default=str)


def gather(runs: List[str], metric: Optional[str]) -> Tuple[str, List[Group]]:
    """The metric, and the runs in groups: by the NAME of ``NAME=RUN``, else by their configs.

    Raises:
        ValueError: see :func:`read_run`; or the runs have no metric in common.
    """
    groups: Dict[str, Group] = {}
    rows: List[Tuple[Group, Optional[int], Dict[str, float]]] = []
    seen: Dict[str, str] = {}
    for word in runs:
        given, _, folder = word.rpartition('=')
        place = str(Path(folder).resolve()) if folder else ''
        if place in seen or not folder:
            raise ValueError(f'{word}: the same folder as {seen[place]}; one run counts once' if folder else
                             f'{word!r}: write NAME=RUN, with the work dir of a run')
        seen[place] = word
        for label, key, seed, metrics in read_run(folder, metric):
            name = f'{given}, plain' if given and label == 'plain student' else given or label
            key = name if given else key
            taken = [group.name for group in groups.values()]
            if key not in groups and name in taken:
                name = f'{name} ({sum(other.split(" (")[0] == name for other in taken) + 1})'
            rows.append((groups.setdefault(key, Group(name)), seed, metrics))
    shared = set.intersection(*(set(metrics) for _, _, metrics in rows))
    if metric is not None and metric not in shared:
        raise ValueError(f'not every run has {metric!r}; all have {", ".join(sorted(shared)) or "none"}')
    if not shared:
        raise ValueError('these runs have no metric in common')
    chosen = metric or primary({key: rows[0][2][key] for key in rows[0][2] if key in shared})[0]
    for group, seed, metrics in rows:
        group.scores.append((seed, metrics[chosen]))
    return chosen, list(groups.values())


def difference(first: Group, second: Group) -> Tuple[float, Optional[float], str]:
    """Mean of ``second`` less that of ``first``, half of its 95 % interval, and how it was worked out.

    With the same seeds in both groups the runs are paired (Student's t of the differences), else not (Welch's t). None
    where there are too few runs for an interval.

    Example:
        >>> one, two = Group('a', [(0, 1.0), (1, 2.0)]), Group('b', [(0, 2.0), (1, 3.5)])
        >>> difference(one, two)[0], round(difference(one, two)[1], 2)
        (1.25, 3.18)
    """
    seeds = [dict(group.scores) for group in (first, second)]
    paired = seeds[0].keys() == seeds[1].keys() and None not in seeds[0] and all(
        len(found) == len(group.scores) for found, group in zip(seeds, (first, second)))
    mean = statistics.fmean(second.values) - statistics.fmean(first.values)
    if paired:
        pairs = [seeds[1][seed] - seeds[0][seed] for seed in seeds[0]]
        if len(pairs) < 2:
            return mean, None, 'paired'
        half = float(student_t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
        return mean, half, 'paired by seed'
    if min(len(first.values), len(second.values)) < 2:
        return mean, None, 'not paired'
    parts = [statistics.variance(group.values) / len(group.values) for group in (first, second)]
    if sum(parts) == 0:
        return mean, 0.0, 'not paired'
    freedom = sum(parts)**2 / sum(part**2 / (len(group.values) - 1) for part, group in zip(parts, (first, second)))
    return mean, float(student_t.ppf(0.975, freedom)) * math.sqrt(sum(parts)), 'not paired'


def verdict(mean: float, half: Optional[float], better: int = 1) -> str:
    """In words; ``better`` is -1 where a lower score is."""
    if half is None:
        return 'one run: nothing is shown'
    if not math.isfinite(mean):
        return 'a score is no number'
    if abs(mean) <= half or mean == 0:
        return 'no difference shown'
    return 'better' if better * mean > 0 else 'worse'


@click.command('compare')
@click.argument('runs', nargs=-1, required=True, metavar='RUN [RUN ...]')
@click.option('--metric', help='Which one. Default: the one that says it in a number, such as coco/bbox_mAP or mIoU.')
def command(runs: Tuple[str, ...], metric: Optional[str]) -> None:
    """Did it help? Scores of trainings, with their mean and spread over seeds, and the verdict against the first.

    Each RUN is a work dir of kd-mm train (or of the host's tools/train.py), or of kd-mm distill, which counts with its
    plain student where there is one. Give the plain student's first:

    \b
        kd-mm compare work_dirs/plain_seed0 work_dirs/plain_seed1 work_dirs/fgd_seed0 work_dirs/fgd_seed1

    Runs whose configs differ in the seed alone are one group. Where that is not enough, NAME=RUN puts a run into the
    group NAME: plain=work_dirs/a. The last evaluation of a run counts. A higher score is taken as better, except of
    miss rates and errors of depth. "No difference shown" is said where 0 lies in the 95 % interval of the difference:
    take more seeds.
    """
    try:
        chosen, groups = gather(list(runs), metric)
    except REFUSALS as error:
        fail(error)
    console = Console(width=max(Console().width, 110))
    table = Table('group', with_span(chosen), 'runs', 'seeds', 'against the first', 'verdict')
    for group in groups:
        spread = f' ± {statistics.stdev(group.values):.3g}' if len(group.values) > 1 else ''
        cells: List[Any] = [group.name, f'{statistics.fmean(group.values):.4g}{spread}', str(len(group.values)),
                            ', '.join('?' if seed is None else str(seed) for seed, _ in group.scores)]
        if group is groups[0]:
            table.add_row(*cells, '', '')
            continue
        mean, half, way = difference(groups[0], group)
        text = f'{mean:+.3g}' + ('' if half is None else f' ± {half:.2g} ({way})')
        table.add_row(*cells, text, verdict(mean, half, sign(chosen)))
    console.print(table)
