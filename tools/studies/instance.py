#!/usr/bin/env python3
"""Instance and panoptic segmentation: teacher, plain students, distilled students, on instances made of CamVid.

    python tools/studies/instance.py --data-root PATH                     every pair and method, one seed
    python tools/studies/instance.py --data-root PATH --seeds 3           goes on, seed by seed
    python tools/studies/instance.py --data-root PATH --pairs rtmdet_ins --methods masks
    python tools/studies/instance.py --render                             the table anew from the results

PATH holds camvid_cityscapes; tools/studies/instance_data.py makes objects and segments of it.  The models are stock
configs of mmdet, narrowed (tools/studies/instance_models.py): Mask R-CNN, RTMDet-Ins, SOLOv2, Mask2Former for
instances and for panoptic segments.  Each training is one run of tools/train.py.

  masks     what the heads say about masks: '@roi_masks', '@instance_masks', matched queries
  features  PKDLoss at '@neck'
  both      both of them

Results go to docs/instance.json as they come, the table to docs/instance.md.  The same command goes on where it was
interrupted: what is in the results with the same settings is not trained again, an unfinished training resumes.
Panoptic pairs need the package panopticapi: pip install --no-deps panopticapi-lite
"""

import argparse
import importlib.util
import signal
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import benchmark  # noqa: E402
import instance_data  # noqa: E402
import instance_models as models  # noqa: E402
import stages as engine  # noqa: E402
from benchmark_data import Data, hash_files  # noqa: E402
from benchmark_plan import Run, plan  # noqa: E402
from benchmark_results import Book, Results  # noqa: E402
from machine import provenance  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402

RESULTS, PAGE = ROOT / 'docs' / 'instance.json', ROOT / 'docs' / 'instance.md'
BEGIN = '<!-- table: written by `python tools/studies/instance.py --render`; do not edit -->'
END = '<!-- end of table -->'
SOURCE, MADE = 'camvid_cityscapes', 'camvid_instances'
#: The data's place in the configs; --data-root moves it.
DATA = f'data/{MADE}/'
#: What else is kept of an evaluation.
ALSO = ('coco/bbox_mAP', 'coco/segm_mAP_50', 'coco_panoptic/PQ_th', 'coco_panoptic/PQ_st')


class Scores(Results):
    """Of one pair; a record has further scores beside the first."""

    def add(self, stage: Run, metric: str, engine_code: str = '') -> None:
        super().add(stage, metric, engine_code)
        train, val = engine.read_scalars(stage.work_dir)
        record = self.data['runs'][stage.name][str(stage.seed)]
        record['also'] = {name.split('/')[-1]: round(val[-1][name] * (100 if name.startswith('coco/') else 1), 2)
                          for name in ALSO if name in val[-1]}
        record['seconds_per_iter'] = round(engine.seconds_per_iter(train), 3)
        self.save()


def settings_of(name: str, work_dir: Path, images: int) -> Any:
    """One pair in the form of ``configs/benchmark``."""
    pair = models.PAIRS[name]
    student, teacher = models.write(name, work_dir / 'models', DATA, images)
    return ConfigDict(student=str(student), teacher=str(teacher), metric=pair.metric,
                      methods={method: dict(losses=losses) for method, losses in pair.losses.items()})


def data_at(root: Path) -> Data:
    """The objects and segments as the benchmark describes a set."""
    return Data(root, MADE, engine.count_images(root), hash_files(sorted(root.glob('annotations/*.json'))))


def run_pair(name: str, methods: Sequence[str], seeds: int, data: Data, work_dir: Path, results: Scores,
             lanes: int, quick: bool) -> None:
    """Train what is missing of one pair."""
    settings = settings_of(name, work_dir, data.images)
    todo = benchmark.needed(plan(settings, methods, seeds, data, work_dir / name, quick), results)
    failed = engine.run_stages(todo, lanes, benchmark.Collecting(todo, lanes, results, settings.metric),
                               keep_going=True, threads=1)
    for stage in todo:
        if stage.title in failed and stage.name in ('teacher', 'plain'):
            raise engine.StageError(failed[stage.title])
        if stage.title in failed:
            results.data['errors'][stage.name] = benchmark.last_line(failed[stage.title])
    results.save()


# ---------------------------------------------------------------------------------------------------------------------
# the table


def spread(scores: Sequence[float]) -> str:
    if not scores:
        return '-'
    mean = f'{statistics.mean(scores):.1f}'
    return f'{mean} ± {statistics.stdev(scores):.1f}' if len(scores) > 1 else mean


def gain(results: Results, method: str) -> str:
    """Mean difference from the plain student of the same seed, half of its 95 % interval, and what that shows."""
    found = results.gain(method)
    if found is None:
        return '-'
    mean, half, _ = found
    return f'{mean:+.1f}{"" if half is None else f" ± {half:.1f}"} ({results.verdict(method)})'


def table(book: Book) -> str:
    """One line a pair and method."""
    rows = ['| model | score | teacher | plain student | what is distilled | distilled student | against plain |',
            '|---|---|---|---|---|---|---|']
    for name, pair in models.PAIRS.items():
        if name not in book.pairs:
            continue
        results = Scores(book, name)
        metric = 'PQ' if pair.panoptic else 'mask AP'
        for method in pair.losses:
            scores = results.scores(method)
            if method in results.data['errors']:
                rows.append(f'| {pair.title} | | | | {method} | failed: {results.data["errors"][method]} | |')
            elif scores:
                rows.append(f'| {pair.title} | {metric} | {spread(results.scores("teacher"))} | '
                            f'{spread(results.scores("plain"))} | {method} | {spread(scores)} | '
                            f'{gain(results, method)} |')
    return '\n'.join(rows)


def legend(book: Book) -> str:
    """What the numbers are of."""
    seeds = sorted({seed for pair in book.pairs.values() for runs in pair['runs'].values() for seed in runs})
    made = ' '.join(f'`{found["command"]}` on {found["machine"]["processor"]}, one thread; '
                    + ', '.join(f'{name} {version}' for name, version in found['versions'].items()) + '.'
                    for found in book.made)
    return (f'{made} Seeds {", ".join(seeds)}. Scores: mean ± sample standard deviation over the seeds, of the last '
            'checkpoint; the teacher has one seed. *Against plain*: mean difference of students with the same seed ± '
            'half of its 95 % interval.')


def render(book: Book) -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    found = f'{table(book)}\n\n{legend(book)}' if book.pairs else 'Not measured yet.'
    PAGE.write_text(f'{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}')


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', nargs='+', default=list(models.PAIRS), choices=list(models.PAIRS))
    parser.add_argument('--methods', nargs='+', default=['masks', 'features', 'both'],
                        choices=['masks', 'features', 'both'])
    parser.add_argument('--seeds', type=int, default=1, help='trainings of each kind (default 1)')
    parser.add_argument('--data-root', type=Path, help=f'folder that contains {SOURCE} (or KD_MM_DATA)')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'instance')
    parser.add_argument('--lanes', type=int, default=1, help='trainings at a time (default 1)')
    parser.add_argument('--quick', action='store_true',
                        help='one epoch of everything, results in the work dir; the scores mean nothing')
    parser.add_argument('--render', action='store_true', help='only write the table from the results')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error('--seeds needs at least 1')
    return args


def check_packages(names: Sequence[str]) -> None:
    """Raise a StageError for what the data or the score of a pair needs and is not installed."""
    panoptic = [name for name in names if models.PAIRS[name].panoptic]
    if panoptic and importlib.util.find_spec('panopticapi') is None:
        raise engine.StageError(f'{", ".join(panoptic)} needs the package panopticapi, which is not installed: pip '
                                'install --no-deps panopticapi-lite, or leave the pair out with --pairs')


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    # Like Ctrl-C: without this, `kill` would end the study and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work_dir = args.work_dir.resolve()
    command = (f'python tools/studies/instance.py --data-root PATH --seeds {args.seeds} --methods '
               f'{" ".join(args.methods)}')
    book = Book(work_dir / 'instance.json' if args.quick else RESULTS)
    try:
        if not args.render:
            check_packages(args.pairs)
            source = engine.find_data(args.data_root, SOURCE, 'mmseg', '--data-root')
            root = work_dir / 'data' / MADE
            instance_data.make(source, root, size=models.SIZE)
            data = data_at(root)
            book.start(provenance(command, engine.cores(), threads=1))
            scores: Dict[str, Scores] = {name: Scores(book, name) for name in args.pairs}
            failed: List[str] = []
            for seeds in range(1, args.seeds + 1):  # every pair has its first seed before one has its second
                for name in args.pairs:
                    try:
                        run_pair(name, args.methods, seeds, data, work_dir, scores[name], args.lanes, args.quick)
                    except engine.StageError as error:
                        failed.append(f'{name}: {error}')
            if failed:
                raise engine.StageError('\n'.join(failed))
        if not args.quick:
            render(book)
        print(table(book))
    except engine.StageError as error:
        print(f'\ninstance: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninstance: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    return int(any(found['errors'] for found in book.pairs.values()))


if __name__ == '__main__':
    sys.exit(main())
