#!/usr/bin/env python3
"""Every method on one small pair and real data, against the plain student: a table of scores, time and memory.

    python tools/studies/benchmark.py --task det --data-root PATH                      all methods, one seed
    python tools/studies/benchmark.py --task seg --data-root PATH --seeds 3
    python tools/studies/benchmark.py --task det --data-root PATH --methods fgd pkd    some of them
    python tools/studies/benchmark.py --task det --render                              the table anew from the results

PATH holds the data set that the files of configs/benchmark name (COCO or Cityscapes layout); these also hold one hook
entry a method: det.py for one-stage detectors, det_two_stage.py, seg.py.  The teacher is trained once, then plain and
distilled students with each seed, all by tools/train.py, and at the end the cost of each method is measured by
tools/measure.py.

Results go to configs/<task>/benchmark.json as they come and the table to configs/<task>/README.md.  The same command
goes on where it was interrupted: what is in the results with the same settings is not trained again, an unfinished
training resumes.  A method that fails does not stop the others; the table says so.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import pprint
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import stages as engine  # noqa: E402
from benchmark_table import page, table  # noqa: E402

from kd_mm.hosts.table import packages  # noqa: E402

HOME = ROOT / 'configs' / 'benchmark'
#: Settings of each task, files in that folder.
PAIRS = {'det': ('det', 'det_two_stage'), 'seg': ('seg', )}
#: Seconds an iteration relative to the plain student: a first guess.
COST = {'teacher': 2.5, 'plain': 1.0}
QUICK = 12
#: The losses of a method, by name.
Losses = Dict[str, Dict[str, Any]]


class Run(engine.Training):
    """One training of the benchmark: the teacher, or a student with or without a method.

    Args:
        name: 'teacher', 'plain' or a method.
        seed: of the training.
        config: file to train.
        work_dir: its folder.
        options: for ``--cfg-options``.
        needs: the teacher, and what was learned from it.
    """

    def __init__(self, name: str, seed: int, config: Path, work_dir: Path, options: Sequence[str],
                 needs: Sequence[engine.Stage] = ()) -> None:
        self.name, self.seed, self.config, self.work_dir, self.options = name, seed, config, work_dir, options
        self.needs = tuple(needs)
        self.title = f'{name}, seed {seed}'
        self.speed = ('train', name)
        self.cost = COST.get(name, 1.6)

    def command(self) -> List[str]:
        return engine.train_command(self.config, self.work_dir, [*self.options, *teacher_options(self)])


class Lesson(engine.Stage):
    """``tools/learn_tokens.py`` for one method; ``files`` are what it writes."""

    def __init__(self, name: str, config: Path, work_dir: Path, options: Sequence[str], steps: int,
                 files: Sequence[Path], teacher: Run) -> None:
        self.name, self.config, self.work_dir, self.options = name, config, work_dir, options
        self.total_iters, self.files, self.needs = steps, files, (teacher,)
        self.title = f'{name}, learned from the teacher'
        self.speed, self.cost = ('learn', name), 2.0

    def command(self) -> List[str]:
        return [sys.executable, str(ROOT / 'tools' / 'learn_tokens.py'), str(self.config), '--iters',
                str(self.total_iters), '--overwrite', '--cfg-options', *self.options, *teacher_options(self)]

    def checkpoint(self) -> Optional[Path]:
        return self.files[0] if all(path.exists() for path in self.files) else None


Job = Union[Run, Lesson]


def teacher_options(stage: engine.Stage) -> List[str]:
    return [f'custom_hooks.0.teacher_ckpt={need.checkpoint()}' for need in stage.needs
            if isinstance(need, Run) and need.name == 'teacher']


# ---------------------------------------------------------------------------------------------------------------------
# what is to be run


def read_settings(pair: str) -> Any:
    """``configs/benchmark/<pair>.py``."""
    from mmengine.config import Config  # heavy; not needed for --help

    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    return Config.fromfile(str(HOME / f'{pair}.py'))


def loss_sources(losses: Dict[Any, Dict[str, Any]]) -> List[str]:
    """The source files of the losses of a method: a result depends on them."""
    from kd_mm.registry import MODELS

    files = {inspect.getfile(MODELS.get(loss['type'])) for loss in losses.values()}
    return [Path(path).read_text() for path in sorted(files)]


def write_config(path: Path, student: Path, teacher: Path, losses: Losses) -> None:
    """A student's config with one hook entry more."""
    hook = dict(type='kd_mm.DistillHook', teacher=str(teacher), losses=losses)
    text = f'_base_ = {str(student)!r}\ncustom_hooks = [{pprint.pformat(hook, sort_dicts=False)}]\n'
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def with_files(losses: Losses, folder: Path, method: str) -> Tuple[Losses, List[Path]]:
    """Losses that learn something get a file to write and to read; returns them and the files."""
    from kd_mm.registry import MODELS

    losses, files = {name: dict(loss) for name, loss in losses.items()}, []
    for name, loss in losses.items():
        argument = getattr(MODELS.get(loss['type']), 'learned', None)
        if argument is not None and argument not in loss:
            loss[argument] = str(folder / f'{method}_{name}.pth')
            files.append(Path(loss[argument]))
    return losses, files


def plan(settings: Any, methods: Sequence[str], seeds: int, data: Path, work_dir: Path,
         quick: bool = False) -> List[Job]:
    """All stages in the order in which they should start."""
    from mmengine.config import Config

    student, teacher = HOME / settings.student, HOME / settings.teacher
    images = engine.count_images(data)
    data_hash = f'{data.name}:{images}'

    def load(path: Path) -> Tuple[str, Any, int]:
        config = Config.fromfile(str(path))
        return config.pretty_text, config.train_cfg, engine.count_iters(config, images)

    loaded = {'teacher': load(teacher), 'student': load(student)}

    def options(seed: int, loop: Any) -> List[str]:
        chosen = [f'randomness.seed={seed}', f'data_root={data}/']
        if quick:
            key = 'max_iters' if loop.get('max_iters') else 'max_epochs'
            steps = QUICK if key == 'max_iters' else 1
            chosen += [f'train_cfg.{key}={steps}', f'train_cfg.val_interval={steps}',
                       'default_hooks.logger.interval=4']
        return chosen

    def run(name: str, seed: int, config_file: Path, needs: Sequence[engine.Stage] = (),
            extra: Sequence[str] = ()) -> Run:
        text, loop, iters = loaded['teacher' if name == 'teacher' else 'student']
        stage = Run(name, seed, config_file, work_dir / f'{name}_seed{seed}', options(seed, loop), needs)
        stage.config_hash = engine.hash_of(text, *stage.options[2:], str(seed), data_hash, *extra)
        if quick:
            iters = QUICK if loop.get('max_iters') else iters // loop.max_epochs
        stage.total_iters = iters
        return stage

    first = run('teacher', 0, teacher)
    stages: List[Job] = [first]
    lessons = {}
    for seed in range(seeds):
        stages.append(run('plain', seed, student))
        for method in methods:
            entry = settings.methods[method].to_dict()
            losses, files = with_files(entry['losses'], work_dir / 'learned', method)
            path = work_dir / 'configs' / f'{method}.py'
            write_config(path, student, teacher, losses)
            depends = [pprint.pformat(entry), first.config_hash, *loss_sources(losses)]
            if files and method not in lessons:
                steps = QUICK if quick else entry['learn']
                lessons[method] = Lesson(method, path, work_dir / f'{method}_learned', [f'data_root={data}/'], steps,
                                         files, first)
                lessons[method].config_hash = engine.hash_of(*depends, str(steps), data_hash)
                stages.append(lessons[method])
            needs = [first, *([lessons[method]] if files else [])]
            stages.append(run(method, seed, path, needs, depends))
    return stages


# ---------------------------------------------------------------------------------------------------------------------
# results


class Book:
    """``benchmark.json``: versions of the hosts, and the results of each pair.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {}
        self.hosts, self.pairs = content.get('hosts', {}), content.get('pairs', {})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pairs = {name: {part: dict(sorted(content.items())) for part, content in parts.items()}
                 for name, parts in self.pairs.items()}
        partial = self.path.with_suffix('.part')
        partial.write_text(json.dumps(dict(hosts=self.hosts, pairs=pairs), indent=1, ensure_ascii=False) + '\n')
        partial.replace(self.path)


class Results:
    """``runs`` of one pair by method and seed, ``cost`` and ``errors`` by method; saved after every change."""

    def __init__(self, book: Book, pair: str) -> None:
        self.book = book
        self.data = book.pairs.setdefault(pair, dict(runs={}, cost={}, errors={}))

    def save(self) -> None:
        self.book.save()

    def has(self, stage: Run) -> bool:
        found = self.data['runs'].get(stage.name, {}).get(str(stage.seed))
        return found is not None and found['hash'] == stage.config_hash

    def add(self, stage: Run, metric: str) -> None:
        """Read what a finished training wrote."""
        train, val = engine.read_scalars(stage.work_dir)
        scores = [row[metric] for row in val if metric in row]
        if not scores:
            raise engine.StageError(f'{stage.title}: no {metric} in the logs below {stage.work_dir}')
        ratios = [row['kd_task_ratio'] for row in train if 'kd_task_ratio' in row]
        record = dict(score=round(100 * scores[-1] if metric.startswith('coco/') else scores[-1], 2),
                      hash=stage.config_hash)
        if ratios:
            record['kd_task_ratio'] = round(statistics.median(ratios), 4)
        self.data['runs'].setdefault(stage.name, {})[str(stage.seed)] = record
        self.data['errors'].pop(stage.name, None)
        self.save()

    def score(self, stage: Run) -> float:
        return self.data['runs'][stage.name][str(stage.seed)]['score']

    def scores(self, name: str) -> List[float]:
        return [run['score'] for _, run in sorted(self.data['runs'].get(name, {}).items())]


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
        self.results, self.metric = results, metric
        self.taken: Set[str] = set()

    def show(self, done: Set[str], running: Dict[str, int], force: bool = False) -> None:
        for stage in self.stages:
            if stage.title in done and stage.title not in self.taken:
                self.taken.add(stage.title)
                if isinstance(stage, Run):
                    self.results.add(stage, self.metric)
                    self.note(f'{self.label(stage)} {stage.title}: {self.results.score(stage):.1f}')
        super().show(done, running, force)


def measure_cost(settings: Any, method: str, work_dir: Path, data: Path, results: Results, steps: int) -> None:
    """tools/measure.py on the method's config; what it measured goes to the results."""
    config, out = work_dir / 'configs' / f'{method}.py', work_dir / 'cost.json'
    batch = 4
    command = [sys.executable, str(ROOT / 'tools' / 'measure.py'), str(config), '--batch', str(batch), '--shape',
               *map(str, settings.shape), '--steps', str(steps), '--json', str(out), '--cfg-options',
               f'data_root={data}/']
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


# ---------------------------------------------------------------------------------------------------------------------
# command line


def hosts() -> Dict[str, str]:
    import mmengine
    import torch
    found = dict(torch=torch.__version__.split('+')[0], mmengine=mmengine.__version__)
    for name in packages():
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=('det', 'seg'), required=True)
    parser.add_argument('--methods', nargs='+', default=['all'], metavar='NAME', help='default: all')
    parser.add_argument('--seeds', type=int, default=1, help='trainings of each kind (default 1)')
    parser.add_argument('--data-root', type=Path, help='folder that contains the data set (or KD_MM_DATA)')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/benchmark/<task>')
    parser.add_argument('--lanes', type=int, help='trainings at a time; default: 2, or 1 on a single core')
    parser.add_argument('--cost-steps', type=int, default=5, help='rounds of the measurement of the cost; 0: none')
    parser.add_argument('--quick', action='store_true',
                        help='a few iterations of everything, results in the work dir; the scores mean nothing')
    parser.add_argument('--render', action='store_true', help='only write the table from the results')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error('--seeds needs at least 1')
    return args


def choose(groups: Dict[str, Any], names: Sequence[str]) -> Dict[str, List[str]]:
    """The methods of each pair that are asked for."""
    known = list(dict.fromkeys(method for settings in groups.values() for method in settings.methods))
    unknown = [name for name in names if name != 'all' and name not in known]
    if unknown:
        raise engine.StageError(f'no method {", ".join(unknown)} in {HOME.relative_to(ROOT)}. There are: '
                                f'{", ".join(sorted(known))}')
    return {pair: [method for method in settings.methods if 'all' in names or method in names]
            for pair, settings in groups.items()}


def run_pair(args: argparse.Namespace, settings: Any, methods: Sequence[str], results: Results, data: Path,
             work_dir: Path, lanes: int) -> None:
    """Train and measure what is missing of one pair."""
    todo = needed(plan(settings, methods, args.seeds, data, work_dir, args.quick), results)
    failed = engine.run_stages(todo, lanes, Collecting(todo, lanes, results, settings.metric), keep_going=True)
    for stage in todo:
        if stage.title in failed and stage.name in ('teacher', 'plain'):
            raise engine.StageError(failed[stage.title])
        if stage.title in failed:
            results.data['errors'][stage.name] = last_line(failed[stage.title])
    fresh = {stage.name for stage in todo if isinstance(stage, Run)}
    for method in methods:
        if args.cost_steps and method not in results.data['errors'] and (
                method in fresh or method not in results.data['cost']):
            print(f'[benchmark] cost of {method}', flush=True)
            measure_cost(settings, method, work_dir, data, results, args.cost_steps)
    results.save()


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    begin = time.time()
    # Like Ctrl-C: without this, `kill` would end the benchmark and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = 'quick' if args.quick else args.task
    work_dir = (args.work_dir or ROOT / 'work_dirs' / 'benchmark' / folder / args.task).resolve()
    home = work_dir if args.quick else ROOT / 'configs' / args.task
    lanes = args.lanes or min(2, engine.cores())
    try:
        groups = {pair: read_settings(pair) for pair in PAIRS[args.task]}
        book = Book(home / 'benchmark.json')
        results = {pair: Results(book, pair) for pair in groups}
        if not args.render:
            for pair, methods in choose(groups, args.methods).items():
                if methods:
                    data = engine.find_data(args.data_root, groups[pair].data, groups[pair].host, '--data-root')
                    book.hosts = hosts()
                    run_pair(args, groups[pair], methods, results[pair], data, work_dir / pair, lanes)
        pairs = [(groups[pair], results[pair]) for pair in groups]
        (home / 'README.md').write_text(page(args.task, pairs, book.hosts))
        print(f'[benchmark] wrote {home / "README.md"}')
        for settings, found in pairs:
            print(f'\n{settings.title}\n{table(settings, found)[0]}')
        print(f'[benchmark] took {(time.time() - begin) / 60:.1f} min')
    except engine.StageError as error:
        print(f'\nbenchmark: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nbenchmark: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    return int(any(found.data['errors'] for found in results.values()))


def last_line(reason: str) -> str:
    """The program's own message out of :func:`stages.failure`, without paths of this machine."""
    lines = [line.strip() for line in reason.splitlines()]
    found = next((line for line in lines if line.startswith('last line:')), lines[0])
    return found.removeprefix('last line:').strip().replace(str(ROOT) + '/', '')


if __name__ == '__main__':
    sys.exit(main())
