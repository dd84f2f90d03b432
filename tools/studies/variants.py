#!/usr/bin/env python3
"""One setting changed, all else equal: trainings in pairs of the same seed, on the pairs of tools/studies/benchmark.py.

    python tools/studies/variants.py weights --data-root PATH                  loss_weight='auto' beside the published
    python tools/studies/variants.py speed --data-root PATH --seeds 3          speed='exact', 'auto' and bfloat16
    python tools/studies/variants.py --render                                  the tables anew from the results

PATH holds the data sets of the benchmark (bccd, camvid_cityscapes).  The teacher of a pair is trained once; then, seed
by seed, the plain student and every variant.  Results go to configs/benchmark/variants.json as they come, and the
same command goes on where it was interrupted.  The tables go to docs/variants.md.
"""

import argparse
import functools
import json
import pprint
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import stages as engine  # noqa: E402
from benchmark_table import METRICS, gain_text, mean_text  # noqa: E402
from machine import installed, processor  # noqa: E402

from kd_mm.lab.commands.compare import Group, difference, verdict  # noqa: E402

HOME = ROOT / 'configs' / 'benchmark'
RESULTS, PAGE = HOME / 'variants.json', ROOT / 'docs' / 'variants.md'
#: Settings of each task, files in that folder.
PAIRS = ('det', 'seg')
#: Methods of the study of weights; a pair has those that its settings list.
WEIGHED = ('fgd', 'mgd', 'ofd', 'cwd', 'pkd', 'at', 'ickd')
#: Entry of the study of speed, the same for both pairs.
FAST = 'cwd'
SPEEDS: Dict[str, Any] = {
    'exact': 'exact', 'auto': 'auto',
    'bf16': dict(fold=True, attention=True, onednn=True, channels_last=True, precision='bf16')}
BEGIN, END = '<!-- variants: begin -->', '<!-- variants: end -->'


class Variant(NamedTuple):
    """What is trained under one name, and what it is compared with."""

    name: str
    losses: Dict[str, Any]
    options: Dict[str, Any]
    against: str


def variants(study: str, methods: Dict[str, Any]) -> List[Variant]:
    """What a study trains on a pair.

    Args:
        study: 'weights' or 'speed'.
        methods: entries of the pair's settings, name -> dict(losses=...).

    Example:
        >>> found = variants('weights', dict(at=dict(losses=dict(loss_at=dict(type='ATLoss', loss_weight=2.0)))))
        >>> [(one.name, one.losses['loss_at']['loss_weight'], one.against) for one in found]
        [('at', 2.0, 'plain'), ('at, auto', 'auto', 'at')]
    """
    if study == 'speed':
        losses = methods[FAST]['losses']
        return [Variant(f'{FAST}, {name}', losses, dict(speed=speed), f'{FAST}, exact' if name != 'exact' else 'plain')
                for name, speed in SPEEDS.items()]
    found = []
    for method in WEIGHED:
        if method in methods:
            losses = methods[method]['losses']
            measured = {name: {**loss, 'loss_weight': 'auto'} for name, loss in losses.items()}
            found += [Variant(method, losses, {}, 'plain'), Variant(f'{method}, auto', measured, {}, method)]
    return found


@functools.lru_cache(maxsize=None)
def read(path: Path) -> Tuple[str, Any]:
    """Text and content of a config."""
    from mmengine.config import Config
    content = Config.fromfile(str(path))
    return content.pretty_text, content


class Run(engine.Training):
    """One training: the teacher, the plain student, or a student with a variant.

    Args:
        config: what is trained.
        base: the config of configs/benchmark that it is, or inherits from.
        extra: what the result depends on besides.
    """

    def __init__(self, pair: str, name: str, seed: int, config: Path, base: Path, data: Path, work_dir: Path,
                 teacher: Optional['Run'] = None, extra: str = '') -> None:
        self.pair, self.name, self.seed, self.config, self.teacher = pair, name, seed, config, teacher
        self.work_dir = work_dir / pair / f'{name.replace(", ", "_")}_seed{seed}'
        self.title = f'{pair}: {name}, seed {seed}'
        self.needs = () if teacher is None else (teacher, )
        self.speed, self.cost = ('train', f'{pair} {name}'), 2.5 if name == 'teacher' else 1.6
        self.options = [f'randomness.seed={seed}', f'data_root={data}/']
        (text, content), images = read(base), engine.count_images(data)
        self.total_iters = engine.count_iters(content, images)
        self.config_hash = engine.hash_of(
            text, str(seed), f'{data.name}:{images}', extra, '' if teacher is None else teacher.config_hash)

    def command(self) -> List[str]:
        options = list(self.options)
        if self.teacher is not None:
            options.append(f'custom_hooks.0.teacher_ckpt={self.teacher.checkpoint()}')
        return engine.train_command(self.config, self.work_dir, options)

    def result(self, metric: str) -> Dict[str, Any]:
        """Score of the last checkpoint, median ratio of the losses.

        Raises:
            stages.StageError: the training has no score.
        """
        train, val = engine.read_scalars(self.work_dir)
        scores = [row[metric] for row in val if metric in row]
        if not scores:
            raise engine.StageError(f'{self.title}: no {metric} in the logs below {self.work_dir}')
        found = dict(score=round(100 * scores[-1] if metric.startswith('coco/') else scores[-1], 2),
                     hash=self.config_hash)
        ratios = [row['kd_task_ratio'] for row in train if 'kd_task_ratio' in row]
        if ratios:
            found['kd_task_ratio'] = float(f'{statistics.median(ratios):.3g}')
        return found


def plan(study: str, pair: str, settings: Any, seeds: int, data: Path, work_dir: Path) -> List[Run]:
    """All trainings of a pair in the order in which they start: whole seeds, one after the other."""
    student, teacher = HOME / settings.student, HOME / settings.teacher
    first = Run(pair, 'teacher', 0, teacher, teacher, data, work_dir)
    # What all of the package does to a result: these studies are small, and run as a whole.
    source = engine.source_hash(ROOT / 'kd_mm' / 'engine') + engine.source_hash(ROOT / 'kd_mm' / 'losses')
    todo = [first]
    for seed in range(seeds):
        todo.append(Run(pair, 'plain', seed, student, student, data, work_dir))
        for variant in variants(study, settings.methods.to_dict()):
            hook = dict(type='kd_mm.DistillHook', teacher=str(teacher), losses=variant.losses, **variant.options)
            path = work_dir / pair / 'configs' / f'{variant.name.replace(", ", "_")}.py'
            text = f'_base_ = {str(student)!r}\ncustom_hooks = [{pprint.pformat(hook, sort_dicts=False)}]\n'
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            todo.append(Run(pair, variant.name, seed, path, student, data, work_dir, first,
                            source + pprint.pformat(variant)))
    return todo


# ---------------------------------------------------------------------------------------------------------------------
# results


def load() -> Dict[str, Any]:
    """What was measured so far: study -> pair -> dict(runs=name -> seed -> record, ...)."""
    found: Dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def save(results: Dict[str, Any]) -> None:
    partial = RESULTS.with_suffix('.part')
    partial.write_text(json.dumps(results, indent=1) + '\n')
    partial.replace(RESULTS)


class Collecting(engine.Progress):
    """Takes over every result as soon as its training is finished."""

    def __init__(self, todo: Sequence[Run], lanes: int, study: Dict[str, Any], results: Dict[str, Any],
                 metrics: Dict[str, str]) -> None:
        super().__init__(todo, lanes, name='variants')
        self.study, self.results, self.metrics = study, results, metrics
        self.taken: Set[str] = set()

    def show(self, done: Set[str], running: Dict[str, int], force: bool = False) -> None:
        for stage in self.stages:
            assert isinstance(stage, Run)
            if stage.title in done and stage.title not in self.taken:
                self.taken.add(stage.title)
                runs = self.study[stage.pair]['runs'].setdefault(stage.name, {})
                runs[str(stage.seed)] = stage.result(self.metrics[stage.pair])
                save(self.results)
                self.note(f'{self.label(stage)} {stage.title}: {runs[str(stage.seed)]["score"]}')
        super().show(done, running, force)


def compared(runs: Dict[str, Any], name: str, against: str) -> List[str]:
    """Cells on a training beside another one: its name, difference with interval, verdict.

    Over the seeds that both have.

    Example:
        >>> seeds = {'a': {'0': {'score': 2.0}, '1': {'score': 5.0}}, 'b': {'0': {'score': 1.5}}}
        >>> compared(seeds, 'a', 'b'), compared(seeds, 'a', '')
        (['b', '+0.5', 'one seed'], ['', '', ''])
    """
    both = sorted(runs.get(name, {}).keys() & runs.get(against, {}).keys())
    if not both:
        return ['', '', '']
    groups = [Group(one, [(int(seed), runs[one][seed]['score']) for seed in both]) for one in (against, name)]
    mean, half, _ = difference(*groups)
    return [against, gain_text(mean, half), 'one seed' if half is None else verdict(mean, half)]


def table(content: Dict[str, Any]) -> str:
    """One pair of one study, in Markdown."""
    runs = content['runs']
    lines = [f'| training | {content["metric"]} | seeds | KD/task | against | difference | |', '|---' * 7 + '|']
    for name, against in content['against'].items():
        scores = [record['score'] for _, record in sorted(runs.get(name, {}).items())]
        if not scores:
            continue
        ratios = [record['kd_task_ratio'] for record in runs[name].values() if 'kd_task_ratio' in record]
        cells = [name, mean_text(scores), str(len(scores)), f'{statistics.fmean(ratios):.2g}' if ratios else '',
                 *compared(runs, name, against)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def tables(results: Dict[str, Any]) -> str:
    """What stands between the marks of docs/variants.md."""
    heads = dict(weights="## `loss_weight='auto'` beside the published weight",
                 speed='## A teacher in a faster form beside the exact one')
    parts = []
    for study, head in heads.items():
        for content in results.get(study, {}).values():
            parts.append(f'{head}: {content["title"]}\n\n{table(content)}\n`{content["command"]}`: '
                         f'{content["versions"]}; {content["machine"]}.\n')
    return '\n'.join(parts) or 'No seed is finished yet.\n'


def page(text: str, results: Dict[str, Any]) -> str:
    """The page with its tables anew."""
    before, rest = text.split(BEGIN)
    return f'{before}{BEGIN}\n\n{tables(results)}\n{END}{rest.split(END)[1]}'


def versions() -> str:
    return ', '.join(f'{name} {version}' for name, version in installed().items())


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', nargs='?', choices=('weights', 'speed'))
    parser.add_argument('--pairs', nargs='+', choices=PAIRS, default=list(PAIRS), help='default: both')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of each kind. Default: 3')
    parser.add_argument('--data-root', type=Path, help='folder that contains the data sets (or KD_MM_DATA)')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'variants')
    parser.add_argument('--lanes', type=int, help='trainings at a time; default: 2, or 1 on a single core')
    parser.add_argument('--render', action='store_true', help='only write the tables from the results')
    args = parser.parse_args(argv)
    if args.study is None and not args.render:
        parser.error('name a study: weights or speed')
    if args.seeds < 1:
        parser.error('--seeds needs at least 1')
    return args


def run(args: argparse.Namespace, results: Dict[str, Any]) -> None:
    from benchmark import read_settings
    study = results.setdefault(args.study, {})
    todo, metrics = [], {}
    for pair in args.pairs:
        settings = read_settings(pair)
        data = engine.find_data(args.data_root, settings.data, settings.host, '--data-root')
        against = {'teacher': '', 'plain': '', **{one.name: one.against for one in variants(
            args.study, settings.methods.to_dict())}}
        old = study.get(pair, {}).get('runs', {})
        study[pair] = dict(
            title=settings.title, metric=METRICS.get(settings.metric, settings.metric),
            command=f'python tools/studies/variants.py {args.study} --seeds {args.seeds} --data-root PATH',
            versions=versions(), machine=f'{processor()}, one thread a training', against=against, runs=old)
        metrics[pair] = settings.metric
        todo += plan(args.study, pair, settings, args.seeds, data, args.work_dir.resolve())
    for stage in todo:  # a result of other settings is none
        runs = study[stage.pair]['runs'].get(stage.name, {})
        if runs.get(str(stage.seed), {}).get('hash', stage.config_hash) != stage.config_hash:
            del runs[str(stage.seed)]
    missing = [stage for stage in todo if str(stage.seed) not in study[stage.pair]['runs'].get(stage.name, {})]
    needed = {id(stage) for stage in missing} | {id(need) for stage in missing for need in stage.needs}
    todo = [stage for stage in todo if id(stage) in needed]
    lanes = args.lanes or min(2, engine.cores())
    engine.run_stages(todo, lanes, Collecting(todo, lanes, study, results, metrics))


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    begin, results = time.time(), load()
    # Like Ctrl-C: without this, `kill` would end the study and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not args.render:
            run(args, results)
            save(results)
    except engine.StageError as error:
        print(f'\nvariants: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nvariants: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    PAGE.write_text(page(PAGE.read_text(), results))
    print(tables(results))
    print(f'[variants] took {(time.time() - begin) / 60:.1f} min')
    return 0


if __name__ == '__main__':
    sys.exit(main())
