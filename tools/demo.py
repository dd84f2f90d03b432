"""Teacher, plain student, distilled student: train all three, the same way, and report (``make demo``).

    python tools/demo.py                                     # drawn data: one detector, one segmenter, one seed
    python tools/demo.py --quick                             # a few iterations of everything, no claim on quality
    python tools/demo.py --seeds 3                           # three students of each kind: mean and spread
    python tools/demo.py --data bccd --data-root PATH        # the same three-way run on real images
    python tools/demo.py --data camvid --data-root PATH

Every training is one run of ``tools/train.py`` on an ordinary config from ``configs/demo`` or ``configs/real``.  A
re-run skips what is finished and resumes what was interrupted.  Results: ``<work dir>/report.html`` and ``report.md``.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

import demo_data  # noqa: E402
import demo_report  # noqa: E402

ROLES = ('teacher', 'student', 'distilled')


class DemoError(Exception):
    """Something the user can mend; the message says how."""


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

    def path(self, role):
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
class Stage:
    """One training: a role of a task with a seed."""
    task: Task
    role: str
    seed: int
    work_dir: Path
    options: tuple
    data_root: str = ''
    needs: 'Stage | None' = None
    config_hash: str = ''
    total_iters: int = 1
    kd_terms: tuple = ()  # names of the losses that distillation adds

    @property
    def title(self):
        role = {'teacher': 'teacher', 'student': 'plain student', 'distilled': 'distilled student'}[self.role]
        return f'{self.task.key}: {role}, seed {self.seed}'

    @property
    def log(self):
        return self.work_dir.with_suffix('.log')

    @property
    def lock(self):
        return self.work_dir.with_suffix('.lock')

    @property
    def stamp(self):
        return self.work_dir / 'stamp.json'

    def checkpoint(self):
        """The last checkpoint, or None."""
        pointer = self.work_dir / 'last_checkpoint'
        path = Path(pointer.read_text().strip()) if pointer.exists() else None
        # The pointer holds an absolute path; the folder may have been moved since.
        return self.work_dir / path.name if path and (self.work_dir / path.name).exists() else None

    def state(self):
        """'done', 'started' (same settings, unfinished), 'stale' (other settings) or 'new'."""
        if not self.stamp.exists():
            return 'stale' if self.work_dir.exists() else 'new'
        stamp = json.loads(self.stamp.read_text())
        if stamp.get('hash') != self.config_hash:
            return 'stale'
        return 'done' if stamp.get('finished') and self.checkpoint() else 'started'

    def write_stamp(self, finished):
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(json.dumps(dict(hash=self.config_hash, finished=finished, stage=self.title), indent=1))

    def prepare(self):
        """Make the folder fit for starting or resuming; what other settings left there goes."""
        if self.state() == 'stale':
            shutil.rmtree(self.work_dir)
        self.write_stamp(finished=False)

    def command(self):
        options = [f'randomness.seed={self.seed}', f'data_root={self.data_root}', *self.options]
        if self.needs is not None:
            options.append(f'custom_hooks.0.teacher_ckpt={self.needs.checkpoint()}')
        return [sys.executable, str(ROOT / 'tools' / 'train.py'), str(self.task.path(self.role)), '--work-dir',
                str(self.work_dir), '--resume', 'auto', '--cfg-options', *options]


def source_hash(folder):
    """Hash of all Python files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob('*.py')):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def stage_hash(stage, config_text, data_hash):
    """What a finished stage depends on: its config, seed and data, and for the distilled one its teacher and kd_mm."""
    parts = [config_text, *stage.options, str(stage.seed), data_hash]
    if stage.needs is not None:
        parts += [stage.needs.config_hash, source_hash(ROOT / 'kd_mm')]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def count_iters(config, images):
    """Iterations of a run, from its config."""
    loop = config.train_cfg
    if loop.get('max_iters'):
        return loop.max_iters
    batch = config.train_dataloader.batch_size
    return loop.max_epochs * (-(-images // batch))


def plan(tasks, work_dir, data_root, seeds, quick, data_hash):
    """All stages, in the order in which they should start."""
    from mmengine.config import Config  # heavy; not needed for --help

    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    stages = []
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
                stage.total_iters = count_iters(config, count_images(data_root / task.folder))
                hooks = config.get('custom_hooks', [])
                stage.kd_terms = tuple(name for hook in hooks for name in hook.get('losses', ()))
                stage.config_hash = stage_hash(stage, config.pretty_text, data_hash)
                stages.append(stage)
    return stages


def parse_options(options):
    """``a.b=1`` as ``--cfg-options`` reads it, for numbers."""
    return {key: int(value) for key, value in (option.split('=') for option in options)}


def count_images(folder):
    """Training images of a data set in either layout."""
    annotations = folder / 'annotations' / 'instances_train.json'
    if annotations.exists():
        return len(json.loads(annotations.read_text())['images'])
    return sum(1 for _ in (folder / 'leftImg8bit' / 'train').rglob('*_leftImg8bit.*'))


# ---------------------------------------------------------------------------------------------------------------------
# what a run has written so far


def read_scalars(work_dir):
    """All of a run's ``scalars.json``, resumed parts included: (training rows, validation rows), sorted by step."""
    train, val = {}, {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line being written just now, or cut off by an interruption
                continue
            if 'loss' in row and ('iter' in row or 'step' in row):
                train[row.get('iter', row.get('step'))] = row
            elif 'step' in row:
                val[row['step']] = row
    return [train[i] for i in sorted(train)], [val[i] for i in sorted(val)]


# ---------------------------------------------------------------------------------------------------------------------
# running


class Progress:
    """One line for the whole demo: rewritten on a terminal, repeated every so often in a log."""

    def __init__(self, stages, lanes, out=None, every=20.0):
        self.stages, self.lanes, self.out, self.every = stages, lanes, out or sys.stdout, every
        self.seconds = {}  # measured seconds an iteration by (task, role)
        self.tail = 15.0  # pictures and report
        self.last = 0.0
        self.begin = time.time()
        self.at_start = None

    def guess(self, stage):
        """Seconds an iteration: measured, or scaled from what was measured, or a guess."""
        key = (stage.task.key, stage.role)
        if key in self.seconds:
            return self.seconds[key]
        cost = dict(zip(ROLES, stage.task.cost))
        known = [self.seconds[k] / dict(zip(ROLES, s.task.cost))[k[1]] for s in self.stages
                 for k in [(s.task.key, s.role)] if k in self.seconds]
        same = [self.seconds[(stage.task.key, r)] / cost[r] for r in ROLES if (stage.task.key, r) in self.seconds]
        unit = (same or known or [0.22])
        return cost[stage.role] * sum(unit) / len(unit)

    def work(self, stage, done_iters):
        """Seconds of this stage (done, in all); starting a process and evaluating count as well."""
        fixed, each = 15.0, self.guess(stage)
        return done_iters * each, stage.total_iters * each + fixed

    def show(self, done, running, force=False):
        """``done``: finished stages, ``running``: {stage: iterations done}."""
        now = time.time()
        terminal = self.out.isatty()
        if not force and now - self.last < (1.0 if terminal else self.every):
            return
        self.last = now
        spent = whole = 0.0
        for stage in self.stages:
            iters = running.get(stage.title, 0)
            part, full = self.work(stage, iters)
            spent += full if stage.title in done else part
            whole += full
        left = (whole - spent) / self.lanes + self.tail
        percent = 100 * spent / (whole + self.tail * self.lanes)
        texts = []
        for stage in self.stages:
            if stage.title in running:
                number = self.stages.index(stage) + 1
                iters = running[stage.title]
                texts.append(f'[demo {number}/{len(self.stages)}] {stage.title}  '
                             + (f'iter {iters}/{stage.total_iters}' if iters else 'starting'))
        text = '  '.join([*texts, f'whole demo: {percent:.0f} %, about {describe_time(left)} left'])
        if terminal:
            width = shutil.get_terminal_size().columns
            self.out.write('\r\x1b[2K' + text[-(width - 1):])
        else:
            self.out.write(text + '\n')
        self.out.flush()

    def note(self, text):
        if self.out.isatty():
            self.out.write('\r\x1b[2K')
        self.out.write(text + '\n')
        self.out.flush()


def describe_time(seconds):
    return f'{seconds / 60:.0f} min' if seconds >= 90 else f'{max(5, round(seconds / 5) * 5):.0f} s'


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def environment(threads):
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), MPLBACKEND='Agg')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    return env


def run_stages(stages, lanes, progress):
    """Run all stages, ``lanes`` at a time, each as a process of its own; raise DemoError when one fails.

    Two trainings with one thread each get more out of two cores than one training with two threads: these networks
    are too small to share a convolution among threads.
    """
    env = environment(max(1, cores() // lanes))
    done = {s.title for s in stages if s.state() == 'done'}
    waiting = [s for s in stages if s.title not in done]
    for stage in stages:
        if stage.title in done:
            progress.note(f'[demo {stages.index(stage) + 1}/{len(stages)}] {stage.title}: finished before, skipped')
    running = {}
    try:
        while waiting or running:
            for stage in list(waiting):
                if len(running) < lanes and (stage.needs is None or stage.needs.title in done):
                    waiting.remove(stage)
                    running[stage.title] = (stage, start(stage, env))
            time.sleep(0.5)
            counts = {}
            for title, (stage, process) in list(running.items()):
                rows, _ = read_scalars(stage.work_dir)
                counts[title] = rows[-1].get('iter', rows[-1]['step']) if rows else 0
                if rows:
                    progress.seconds[(stage.task.key, stage.role)] = demo_report.seconds_per_iter(rows)
                if process.poll() is None:
                    continue
                del running[title]
                if process.returncode or stage.checkpoint() is None:
                    raise DemoError(failure(stage, process.returncode))
                stage.write_stamp(finished=True)
                done.add(title)
            progress.show(done, counts)
    finally:  # also on Ctrl-C: no training is left behind
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def start(stage, env):
    """Start a training that holds a lock on its folder for as long as it lives.

    The training inherits the lock: should the demo be killed in a way that leaves the training behind, a second one is
    not let into the same folder.
    """
    stage.work_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(stage.lock, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DemoError(f'another training is still writing to {stage.work_dir}, most likely left behind by a demo '
                            'that was killed. Wait until it has ended or end it (find it with: pgrep -af '
                            f'{stage.work_dir}), then run the same demo command again') from None
        stage.prepare()
        with open(stage.log, 'a', encoding='utf-8') as log:
            log.write('$ ' + ' '.join(stage.command()) + '\n')
            log.flush()
            return subprocess.Popen(stage.command(), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, pass_fds=(lock.fileno(),))


def failure(stage, code):
    lines = [line for line in stage.log.read_text(errors='replace').splitlines() if line.strip()] or ['(empty log)']
    reason = f'exit code {code}' if code else 'no checkpoint was written'
    if code in (-9, 137):
        reason += ': killed, most likely because memory ran out'
    return (f'{stage.title} failed ({reason}).\n  last line: {lines[-1][:300]}\n  log:       {stage.log}\n'
            f'  command:   {" ".join(stage.command())}\n'
            '  Mend the cause and run the same demo command again: finished stages are skipped, this one resumes from '
            'its last checkpoint.')


# ---------------------------------------------------------------------------------------------------------------------
# data


def prepare_drawn_data(root, quick):
    """Draw the demo's data unless the same pictures are there already; return their hash."""
    train, val = (48, 16) if quick else (600, 150)
    wanted = dict(version=demo_data.VERSION, train=train, val=val, seed=0)
    stamp = root / 'stamp.json'
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        print(f'[demo] drawing {train} + {val} images for each task in {root}', flush=True)
        stamp.unlink(missing_ok=True)
        demo_data.make(root, **{k: v for k, v in wanted.items() if k != 'version'})
        stamp.write_text(json.dumps(wanted))
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def check_real_data(root, tasks):
    """Return a hash of the real data's file list, or say what is missing."""
    for task in tasks:
        folder = root / task.folder
        wanted = ['annotations/instances_train.json', 'annotations/instances_val.json', 'train', 'val']
        if task.host == 'mmseg':
            wanted = [f'{kind}/{split}' for kind in ('leftImg8bit', 'gtFine') for split in ('train', 'val')]
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            raise DemoError(f'no data for {task.key}: {folder} lacks {", ".join(missing)}. Name the folder that '
                            f'contains {task.folder}/ with --data-root PATH or in the environment variable KD_MM_DATA.')
    return ','.join(f'{task.folder}:{count_images(root / task.folder)}' for task in tasks)


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=sorted(TASKS), default='demo', help='drawn data (default) or a real data set')
    parser.add_argument('--data-root', type=Path, help='folder that contains the real data set (or KD_MM_DATA)')
    parser.add_argument('--quick', action='store_true', help='a few iterations on a few images; no claim on quality')
    parser.add_argument('--seeds', type=int, default=1, help='students of each kind (default 1)')
    parser.add_argument('--only', choices=[task.key for task in TASKS['demo']], help='one task of the demo')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/demo, or work_dirs/<data>')
    parser.add_argument('--lanes', type=int, help='trainings at a time; default: 2, or 1 on a single core')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error('--seeds needs at least 1')
    return args


def main(argv=None):
    args = parse_args(argv)
    begin = time.time()
    # Like Ctrl-C: without this, `kill` would end the demo and leave its trainings running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work_dir = (args.work_dir or ROOT / 'work_dirs' / (args.data + ('_quick' if args.quick else ''))).resolve()
    tasks = [task for task in TASKS[args.data] if args.only in (None, task.key)]
    lanes = args.lanes or min(2, cores())
    try:
        if args.data == 'demo':
            data_root = work_dir / 'data'
            data_hash = prepare_drawn_data(data_root, args.quick)
        else:
            given = args.data_root or os.environ.get('KD_MM_DATA')
            if not given:
                raise DemoError(f'--data {args.data} needs --data-root PATH (or the environment variable KD_MM_DATA): '
                                f'the folder that contains {tasks[0].folder}/')
            data_root = Path(given).resolve()
            data_hash = check_real_data(data_root, tasks)
        stages = plan(tasks, work_dir, data_root, args.seeds, args.quick, data_hash)
        progress = Progress(stages, lanes)
        run_stages(stages, lanes, progress)
        progress.note('[demo] writing the report')
        results = demo_report.collect(stages, read_scalars, quick=args.quick)
        pictures = demo_report.draw_pictures(stages)
        profile = {} if args.quick else demo_report.run_profile(stages)
        for path in demo_report.write(work_dir, results, pictures, profile):
            print(f'[demo] {path}')
        print('\n' + demo_report.table(results))
        print(f'[demo] took {(time.time() - begin) / 60:.1f} min')
    except DemoError as error:
        print(f'\ndemo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ndemo: interrupted; the same command continues where it stopped', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
