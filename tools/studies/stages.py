"""Trainings that are processes of their own: run several at a time, skip what is finished, resume what was cut off.

The engine of ``tools/studies/demo.py`` and ``tools/studies/benchmark.py``.
"""

import fcntl
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, TextIO, Tuple, Union

from kd_mm.lab.logs import log_rows

ROOT = Path(__file__).resolve().parents[2]


class StageError(Exception):
    """Something the user can mend; the message says how."""


class Stage:
    """One process that writes into a folder of its own: usually a training.

    Attributes:
        title: unique among the stages of a run.
        work_dir: its folder; log and lock lie beside it.
        needs: stages that have to be finished before.
        config_hash: of all that the result depends on.
        total_iters: for the progress.
        speed: stages with the same key are taken to be equally fast.
        cost: seconds an iteration, relative to other keys: a first guess.
        fixed: seconds for starting and evaluating.
    """
    title: str
    work_dir: Path
    needs: Sequence['Stage'] = ()
    config_hash = ''
    total_iters = 1
    speed = ('', '')
    cost = 1.0
    fixed = 15.0

    def command(self) -> List[str]:
        """Arguments of the process."""
        raise NotImplementedError

    @property
    def log(self) -> Path:
        return self.work_dir.with_suffix('.log')

    @property
    def lock(self) -> Path:
        return self.work_dir.with_suffix('.lock')

    @property
    def stamp(self) -> Path:
        return self.work_dir / 'stamp.json'

    def checkpoint(self) -> Optional[Path]:
        """The last checkpoint, or None."""
        pointer = self.work_dir / 'last_checkpoint'
        path = Path(pointer.read_text().strip()) if pointer.exists() else None
        # The pointer holds an absolute path; the folder may have been moved since.
        return self.work_dir / path.name if path and (self.work_dir / path.name).exists() else None

    def evaluated(self) -> bool:
        """Whether what there is to say about its result was written, too."""
        return True

    def state(self) -> str:
        """'done', 'started' (same settings, unfinished), 'stale' (other settings) or 'new'."""
        if not self.stamp.exists():
            return 'stale' if self.work_dir.exists() else 'new'
        stamp = json.loads(self.stamp.read_text())
        if stamp.get('hash') != self.config_hash:
            return 'stale'
        return 'done' if stamp.get('finished') and self.checkpoint() else 'started'

    def write_stamp(self, finished: bool) -> None:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(json.dumps(dict(hash=self.config_hash, finished=finished, stage=self.title), indent=1))

    def prepare(self) -> None:
        """Make the folder fit for starting or resuming; what other settings left there goes."""
        if self.state() == 'stale':
            shutil.rmtree(self.work_dir)
        self.write_stamp(finished=False)


class Training(Stage):
    """``tools/train.py`` with some config."""

    def evaluated(self) -> bool:
        """False for one that was interrupted in its last evaluation: resumed, it has nothing to train and ends."""
        _, val = read_scalars(self.work_dir)
        last = self.checkpoint()
        return bool(val) and last is not None and val[-1]['step'] >= int(last.stem.rsplit('_', 1)[-1])


def train_command(config: Path, work_dir: Path, options: Sequence[str]) -> List[str]:
    """``tools/train.py`` that resumes by itself."""
    return [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(work_dir), '--resume',
            'auto', '--cfg-options', *options]


def source_hash(folder: Path) -> str:
    """Hash of all Python files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob('*.py')):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def hash_of(*parts: str) -> str:
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def count_iters(config: Any, images: int) -> int:
    """Iterations of a run, from its config."""
    loop = config.train_cfg
    if loop.get('max_iters'):
        return loop.max_iters
    batch = config.train_dataloader.batch_size
    return loop.max_epochs * (-(-images // batch))


def count_images(folder: Path) -> int:
    """Training images of a data set in either layout."""
    annotations = folder / 'annotations' / 'instances_train.json'
    if annotations.exists():
        return len(json.loads(annotations.read_text())['images'])
    return sum(1 for _ in (folder / 'leftImg8bit' / 'train').rglob('*_leftImg8bit.*'))


# ---------------------------------------------------------------------------------------------------------------------
# what a run has written so far


def read_scalars(work_dir: Union[str, Path]) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """All of a run's ``scalars.json``, resumed parts included: (training rows, validation rows), sorted by step."""
    train: Dict[int, Dict[str, Any]] = {}
    val: Dict[int, Dict[str, Any]] = {}
    for row in log_rows(work_dir):
        if 'loss' in row and ('iter' in row or 'step' in row):
            train[int(row['iter'] if 'iter' in row else row['step'])] = row
        elif 'step' in row:
            val[row['step']] = row
    return [train[i] for i in sorted(train)], [val[i] for i in sorted(val)]


def seconds_per_iter(rows: Sequence[Dict[str, Any]]) -> float:
    """Median over the log of the seconds an iteration took, loading included; the first entries are warm-up."""
    times = [row['time'] for row in rows if 'time' in row]
    return statistics.median(times[len(times) // 5:] or [float('nan')])


# ---------------------------------------------------------------------------------------------------------------------
# running


class Progress:
    """One line for all stages: rewritten on a terminal, repeated every so often in a log.

    Args:
        stages: all of them, the finished ones too.
        lanes: how many run at a time.
        name: of the whole, for the text.
    """

    def __init__(self, stages: Sequence[Stage], lanes: int, out: Optional[TextIO] = None, every: float = 20.0,
                 name: str = 'demo') -> None:
        self.stages, self.lanes, self.out, self.every, self.name = stages, lanes, out or sys.stdout, every, name
        self.seconds: Dict[Tuple[str, str], float] = {}  # measured seconds an iteration by speed
        self.tail = 15.0  # what comes after the stages
        self.last = 0.0

    def guess(self, stage: Stage) -> float:
        """Seconds an iteration: measured, or scaled from what was measured, or a guess."""
        if stage.speed in self.seconds:
            return self.seconds[stage.speed]
        known = {s.speed: self.seconds[s.speed] / s.cost for s in self.stages if s.speed in self.seconds}
        same = [unit for speed, unit in known.items() if speed[0] == stage.speed[0]]
        units = same or list(known.values()) or [0.22]
        return stage.cost * sum(units) / len(units)

    def work(self, stage: Stage, done_iters: int) -> Tuple[float, float]:
        """Seconds of this stage (done, in all); starting a process and evaluating count as well."""
        each = self.guess(stage)
        return done_iters * each, stage.total_iters * each + stage.fixed

    def show(self, done: Set[str], running: Dict[str, int], force: bool = False) -> None:
        """``done``: titles of finished stages, ``running``: {title: iterations done}."""
        now = time.time()
        terminal = self.out.isatty()
        if not force and now - self.last < (1.0 if terminal else self.every):
            return
        self.last = now
        spent = whole = 0.0
        for stage in self.stages:
            part, full = self.work(stage, running.get(stage.title, 0))
            spent += full if stage.title in done else part
            whole += full
        left = (whole - spent) / self.lanes + self.tail
        percent = 100 * spent / (whole + self.tail * self.lanes)
        texts = []
        for stage in self.stages:
            if stage.title in running:
                iters = running[stage.title]
                texts.append(f'{self.label(stage)} {stage.title}  '
                             + (f'iter {iters}/{stage.total_iters}' if iters else 'starting'))
        text = '  '.join([*texts, f'whole {self.name}: {percent:.0f} %, about {describe_time(left)} left'])
        if terminal:
            width = shutil.get_terminal_size().columns
            self.out.write('\r\x1b[2K' + text[-(width - 1):])
        else:
            self.out.write(text + '\n')
        self.out.flush()

    def label(self, stage: Stage) -> str:
        return f'[{self.name} {self.stages.index(stage) + 1}/{len(self.stages)}]'

    def note(self, text: str) -> None:
        if self.out.isatty():
            self.out.write('\r\x1b[2K')
        self.out.write(text + '\n')
        self.out.flush()


def describe_time(seconds: float) -> str:
    return f'{seconds / 60:.0f} min' if seconds >= 90 else f'{max(5, round(seconds / 5) * 5):.0f} s'


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def environment(threads: int) -> Dict[str, str]:
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), MPLBACKEND='Agg')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    return env


def run_stages(stages: Sequence[Stage], lanes: int, progress: Progress, keep_going: bool = False,
               threads: Optional[int] = None) -> Dict[str, str]:
    """Run all stages, ``lanes`` at a time, each as a process of its own.

    Two trainings with one thread each get more out of two cores than one training with two threads: these networks
    are too small to share a convolution among threads.

    Args:
        stages: in the order in which they should start.
        lanes: how many at a time.
        progress: :class:`Progress` of these stages.
        keep_going: go on with the others when one fails; what needs it is left out.
        threads: of each process. Default: the cores, shared by the lanes.

    Returns:
        dict: title -> why it failed; empty unless ``keep_going``.

    Raises:
        StageError: one failed.
    """
    env = environment(threads or max(1, cores() // lanes))
    done = {s.title for s in stages if s.state() == 'done'}
    waiting = [s for s in stages if s.title not in done]
    for stage in stages:
        if stage.title in done:
            progress.note(f'{progress.label(stage)} {stage.title}: finished before, skipped')
    running: Dict[str, Tuple[Stage, 'subprocess.Popen[bytes]']] = {}
    failed: Dict[str, str] = {}
    again: Set[str] = set()
    try:
        while waiting or running:
            for stage in list(waiting):
                lost = [need.title for need in stage.needs if need.title in failed]
                if lost:
                    waiting.remove(stage)
                    failed[stage.title] = f'{stage.title} left out: it needs {lost[0]}'
                elif len(running) < lanes and all(need.title in done for need in stage.needs):
                    waiting.remove(stage)
                    running[stage.title] = (stage, start(stage, env, progress.name))
            time.sleep(0.5)
            counts: Dict[str, int] = {}
            for title, (stage, process) in list(running.items()):
                rows, _ = read_scalars(stage.work_dir)
                counts[title] = rows[-1]['iter' if 'iter' in rows[-1] else 'step'] if rows else 0
                if rows:
                    progress.seconds[stage.speed] = seconds_per_iter(rows)
                if process.poll() is None:
                    continue
                del running[title]
                if process.returncode or stage.checkpoint() is None:
                    reason = failure(stage, process.returncode, progress.name)
                    if not keep_going:
                        raise StageError(reason)
                    failed[title] = reason
                    progress.note(reason)
                    continue
                if not stage.evaluated() and title not in again:
                    progress.note(f'{progress.label(stage)} {title}: was interrupted in its last evaluation, is '
                                  'trained again')
                    again.add(title)
                    shutil.rmtree(stage.work_dir)
                    waiting.insert(0, stage)
                    continue
                stage.write_stamp(finished=True)
                done.add(title)
            progress.show(done, counts)
    finally:  # also on Ctrl-C: no training is left behind
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def start(stage: Stage, env: Dict[str, str], name: str) -> 'subprocess.Popen[bytes]':
    """Start a process that holds a lock on its folder for as long as it lives.

    The process inherits the lock: should the parent be killed in a way that leaves the training behind, a second one
    is not let into the same folder.
    """
    stage.work_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(stage.lock, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(f'another training is still writing to {stage.work_dir}, most likely left behind by a '
                             f'{name} that was killed. Wait until it has ended or end it (find it with: pgrep -af '
                             f'{stage.work_dir}), then run the same {name} command again') from None
        stage.prepare()
        with open(stage.log, 'a', encoding='utf-8') as log:
            log.write('$ ' + ' '.join(stage.command()) + '\n')
            log.flush()
            return subprocess.Popen(stage.command(), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, pass_fds=(lock.fileno(),))


def failure(stage: Stage, code: int, name: str) -> str:
    lines = [line for line in stage.log.read_text(errors='replace').splitlines() if line.strip()] or ['(empty log)']
    reason = f'exit code {code}' if code else 'no checkpoint was written'
    if code in (-9, 137):
        reason += ': killed, most likely because memory ran out'
    return (f'{stage.title} failed ({reason}).\n  last line: {lines[-1][:300]}\n  log:       {stage.log}\n'
            f'  command:   {" ".join(stage.command())}\n'
            f'  Mend the cause and run the same {name} command again: finished stages are skipped, this one resumes '
            'from its last checkpoint.')


# ---------------------------------------------------------------------------------------------------------------------
# real data


def find_data(given: Optional[Path], folder: str, host: str, command: str) -> Path:
    """The folder of a real data set.

    Args:
        given: what the user named with --data-root, or None for the environment variable KD_MM_DATA.
        folder: of this set, below that.
        host: 'mmdet' (COCO layout) or 'mmseg' (Cityscapes layout).
        command: what the user typed, for the messages.

    Raises:
        StageError: no folder named, or one that lacks something.
    """
    root = given or os.environ.get('KD_MM_DATA')
    if not root:
        raise StageError(f'{command} needs --data-root PATH (or the environment variable KD_MM_DATA): the folder that '
                         f'contains {folder}/')
    path = Path(root).resolve() / folder
    wanted = ['annotations/instances_train.json', 'annotations/instances_val.json', 'train', 'val']
    if host == 'mmseg':
        wanted = [f'{kind}/{split}' for kind in ('leftImg8bit', 'gtFine') for split in ('train', 'val')]
    missing = [name for name in wanted if not (path / name).exists()]
    if missing:
        raise StageError(f'{command}: {path} lacks {", ".join(missing)}. Name the folder that contains {folder}/ with '
                         '--data-root PATH or in the environment variable KD_MM_DATA.')
    return path
