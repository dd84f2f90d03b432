"""Teacher, plain student, distilled student: train all three, the same way, and report (``make demo``).

    python tools/studies/demo.py                                  # drawn data: one detector, one segmenter, one seed
    python tools/studies/demo.py --quick                          # a few iterations of everything, no quality
    python tools/studies/demo.py --seeds 3                        # three students of each kind: mean and spread
    python tools/studies/demo.py --data bccd --data-root PATH        # the same three-way run on real images
    python tools/studies/demo.py --data camvid --data-root PATH

Every training is one run of ``tools/train.py`` on an ordinary config from ``configs/demo`` or ``configs/real``.  A
re-run skips what is finished and resumes what was interrupted.  Results: ``<work dir>/report.html``, ``report.md`` and
``results.json``; with ``--record`` the scores go into the repository, for the tables of README.md and docs/results.md.
"""

import argparse
import dataclasses
import hashlib
import json
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies'), str(ROOT / 'tools')]

import demo_data  # noqa: E402
import demo_numbers  # noqa: E402
import demo_report  # noqa: E402
import stages as engine  # noqa: E402
from machine import provenance  # noqa: E402

ROLES = ('teacher', 'student', 'distilled')


@dataclasses.dataclass(frozen=True)
class Task:
    """One three-way comparison: ``configs/{config}_{role}.py`` for the three roles."""
    key: str
    title: str
    host: str  # 'mmdet' or 'mmseg'
    config: str
    metric: str  # key in scalars.json
    folder: str  # of the data, below the data root
    shape: tuple  # height, width of an input, for the measurement of the cost
    quick: tuple = ()  # overrides of a quick run
    cost: tuple = (2.0, 1.0, 1.7)  # seconds an iteration, relative, by role: a first guess for the ETA

    def path(self, role: str) -> Path:
        return ROOT / 'configs' / f'{self.config}_{role}.py'


DET_QUICK = ('train_cfg.max_epochs=2', 'train_cfg.val_interval=1', 'default_hooks.logger.interval=4')
SEG_QUICK = ('train_cfg.max_iters=20', 'train_cfg.val_interval=10', 'default_hooks.logger.interval=5')
TASKS = {
    'demo': (
        Task('detection', 'Detection: GFL, drawn shapes', 'mmdet', 'demo/det', 'coco/bbox_mAP', 'shapes',
             (128, 160), DET_QUICK),
        Task('segmentation', 'Segmentation: PSPNet, drawn streets', 'mmseg', 'demo/seg', 'mIoU', 'streets',
             (96, 192), SEG_QUICK),
    ),
    'bccd': (Task('bccd', 'Detection: GFL, blood cells (BCCD)', 'mmdet', 'real/bccd', 'coco/bbox_mAP', 'bccd',
                  (192, 256), DET_QUICK),),
    'camvid': (Task('camvid', 'Segmentation: PSPNet, CamVid', 'mmseg', 'real/camvid', 'mIoU', 'camvid_cityscapes',
                    (144, 192), SEG_QUICK),),
}


# ---------------------------------------------------------------------------------------------------------------------
# stages


@dataclasses.dataclass
class Stage(engine.Training):
    """One training: a role of a task with a seed."""
    task: Task
    role: str
    seed: int
    work_dir: Path
    options: tuple
    data_root: str = ''
    teacher: 'Stage | None' = None
    config_hash: str = ''
    total_iters: int = 1
    kd_terms: tuple = ()  # names of the losses that distillation adds

    def __post_init__(self) -> None:
        role = {'teacher': 'teacher', 'student': 'plain student', 'distilled': 'distilled student'}[self.role]
        self.title = f'{self.task.key}: {role}, seed {self.seed}'
        self.needs = () if self.teacher is None else (self.teacher,)
        self.speed = (self.task.key, self.role)
        self.cost = self.task.cost[ROLES.index(self.role)]

    def command(self) -> List[str]:
        options = [f'randomness.seed={self.seed}', f'data_root={self.data_root}', *self.options]
        if self.teacher is not None:
            options.append(f'custom_hooks.0.teacher_ckpt={self.teacher.checkpoint()}')
        return engine.train_command(self.task.path(self.role), self.work_dir, options)


def stage_hash(stage: Stage, config_text: str, data_hash: str) -> str:
    """What a finished stage depends on: its config, seed and data, and for the distilled one its teacher and kd_mm."""
    parts = [config_text, *stage.options, str(stage.seed), data_hash]
    if stage.teacher is not None:
        parts += [stage.teacher.config_hash, engine.source_hash(ROOT / 'kd_mm')]
    return engine.hash_of(*parts)


def plan(tasks: Sequence[Task], work_dir: Path, data_root: Path, seeds: int, quick: bool,
         data_hash: str) -> List[Stage]:
    """All stages, in the order in which they should start."""
    from mmengine.config import Config  # heavy; not needed for --help

    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    stages: List[Stage] = []
    for seed in range(seeds):
        for role in ROLES:
            for task in tasks:
                if role == 'teacher' and seed > 0:
                    continue  # one teacher a task: the students of all seeds learn from it
                teacher = next((s for s in stages if s.task is task and s.role == 'teacher'), None)
                stage = Stage(task, role, seed, work_dir / task.key / f'{role}_seed{seed}',
                              task.quick if quick else (), f'{data_root / task.folder}/',
                              teacher if role == 'distilled' else None)
                config = Config.fromfile(str(task.path(role)))
                config.merge_from_dict(parse_options(stage.options))
                stage.total_iters = engine.count_iters(config, engine.count_images(data_root / task.folder))
                hooks = config.get('custom_hooks', [])
                stage.kd_terms = tuple(name for hook in hooks for name in hook.get('losses', ()))
                stage.config_hash = stage_hash(stage, config.pretty_text, data_hash)
                stages.append(stage)
    return stages


def parse_options(options: Sequence[str]) -> Dict[str, int]:
    """``a.b=1`` as ``--cfg-options`` reads it, for numbers."""
    return {key: int(value) for key, value in (option.split('=') for option in options)}


# ---------------------------------------------------------------------------------------------------------------------
# data


def prepare_drawn_data(root: Path, quick: bool) -> str:
    """Draw the demo's data unless the same pictures are there already; return their hash."""
    train, val = (48, 16) if quick else (480, 120)
    wanted = dict(version=demo_data.VERSION, train=train, val=val, seed=0)
    stamp = root / 'stamp.json'
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        print(f'[demo] drawing {train} + {val} images for each task in {root}', flush=True)
        stamp.unlink(missing_ok=True)
        demo_data.make(root, **{k: v for k, v in wanted.items() if k != 'version'})
        stamp.write_text(json.dumps(wanted))
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=sorted(TASKS), default='demo', help='drawn data (default) or a real data set')
    parser.add_argument('--data-root', type=Path, help='folder that contains the real data set (or KD_MM_DATA)')
    parser.add_argument('--quick', action='store_true', help='a few iterations on a few images; no claim on quality')
    parser.add_argument('--seeds', type=int, default=1, help='students of each kind (default 1)')
    parser.add_argument('--only', choices=[task.key for task in TASKS['demo']], help='one task of the demo')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/demo, or work_dirs/<data>')
    parser.add_argument('--record', action='store_true',
                        help='write the scores into the repository too, for its tables (tools/dev/write_numbers.py)')
    parser.add_argument('--lanes', type=int, help='trainings at a time; default: 2, or 1 on a single core')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error('--seeds needs at least 1')
    if args.record and args.quick:
        parser.error('--record: the scores of a --quick run mean nothing')
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    begin = time.time()
    # Like Ctrl-C: without this, `kill` would end the demo and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work_dir = (args.work_dir or ROOT / 'work_dirs' / (args.data + ('_quick' if args.quick else ''))).resolve()
    tasks = [task for task in TASKS[args.data] if args.only in (None, task.key)]
    lanes = args.lanes or min(2, engine.cores())
    try:
        if args.data == 'demo':
            data_root = work_dir / 'data'
            data_hash = prepare_drawn_data(data_root, args.quick)
        else:
            folders = [engine.find_data(args.data_root, task.folder, task.host, f'--data {args.data}')
                       for task in tasks]
            data_root = folders[0].parent
            data_hash = ','.join(f'{folder.name}:{engine.count_images(folder)}' for folder in folders)
        stages = plan(tasks, work_dir, data_root, args.seeds, args.quick, data_hash)
        progress = engine.Progress(stages, lanes)
        engine.run_stages(stages, lanes, progress)
        progress.note('[demo] writing the report')
        results = demo_report.collect(stages, quick=args.quick)
        pictures = demo_report.draw_pictures(stages)
        profile = {} if args.quick else demo_report.run_profile(stages)
        for path in demo_report.write(work_dir, results, pictures, profile):
            print(f'[demo] {path}')
        made = provenance(f'python tools/studies/demo.py --data {args.data} --seeds {args.seeds}', engine.cores(),
                          max(1, engine.cores() // lanes))
        for path in (work_dir / 'results.json', *([demo_numbers.FILES[args.data]] if args.record else [])):
            demo_numbers.store(path, results, made)
            print(f'[demo] {path}')
        print('\n' + demo_report.table(results))
        for entry in results.values():
            print(f'[demo] {entry["title"]}: {demo_report.verdict(entry)}')
        print(f'[demo] took {(time.time() - begin) / 60:.1f} min')
    except engine.StageError as error:
        print(f'\ndemo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ndemo: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
