#!/usr/bin/env python3
"""What each method costs at full size, measured for every shipped config, and written into the methods' cards.

    python tools/studies/cost.py --task det                     all configs of configs/det, 2 images of 800x1333
    python tools/studies/cost.py --task seg --only cwd mgd      some methods; 2 images of 512x1024
    python tools/studies/cost.py --task det --render            only write the cards from the results
    python tools/studies/cost.py --task det --check             only list what costs more than its arithmetic explains

Configs with the same student and teacher are one group and one process: the losses of all of them sit in one distiller,
so that the plain step is measured once and one recorded step gives every term its real features.  Networks have random
weights, images are random; nothing is read from a data set or fetched, and a loss that learns from the teacher
beforehand gets random tokens.

Results go to configs/<task>/cost.json as they come, the tables to configs/<task>/<method>/README.md.  The same command
goes on where it was interrupted; a result counts as long as the config, the sources of its losses and the settings are
the same.  What fails is noted (and not tried again without --retry) and stops nothing else.

Columns of the tables, medians of at least --steps turns:

  loss          forward and backward of all terms of the config, with what the method does for itself after both
                networks have run: adapters, regions, another head on the same features, the step of an opponent.
                Not in it: the optimizer's step on parameters of the method
  plain step    of the student: forward with its losses, backward, optimizer
  teacher       forward as far as the last tap of the config: as the host runs it (`speed='exact'`, what the other
                columns count with) / in the form that training uses (by default `speed='auto'`)
  added         loss / (plain step + teacher)
  FLOP share    the same in FLOPs.  Matrix products, convolutions and attention are counted, nothing that goes element
                by element (nor RoIAlign and the like)
  over          added less FLOP share; more than 10 % is on the list of --check
  peak          most memory that the terms take beyond the recorded features, gradients included, and how many times
                the largest tensor that they tap in the student this is
  own           parameters and buffers of the terms (adapters, banks, opponents)
"""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from kd_mm.lab.configs import hook_arguments, hook_entries, read_config, training_length
from kd_mm.lab.models import scope_of

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import machine  # noqa: E402
import sources as origins  # noqa: E402
import stages as engine  # noqa: E402
from cost_cards import (  # noqa: E402
    SHAPES,
    STEPS,
    Record,
    describe,
    plain_ms,
    render,
    summary,
)

if TYPE_CHECKING:
    from kd_mm.lab.cost import Bench, Recording

#: Shape, batch, device and options of a measurement.
Settings = Dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# what is to be measured


class Entry:
    """One shipped config.

    Args:
        path: of the file.
        home: configs/<task>.
        settings: shape, batch, device and options of the measurement.
    """

    def __init__(self, path: Path, home: Path, settings: Settings) -> None:
        from kd_mm.ops.problems import Problems

        self.path, self.name, self.method = path, path.relative_to(home).as_posix(), path.parent.name
        self.cfg: Any = None
        self.error: Optional[str] = None
        self.group = self.name
        parts = [path.read_text(), json.dumps(settings, sort_keys=True)]
        try:
            self.cfg = read_config(str(path), settings['options'])
            hooks = hook_entries(self.cfg)
            if len(hooks) != 1:
                raise ValueError(f'custom_hooks must have one kd_mm.DistillHook, and has {len(hooks)}')
            problems = Problems()
            self.arguments = hook_arguments(hooks[0], problems)
            problems.raise_any()
            parts += [as_text(self.cfg.model), *sources(self.arguments['losses'])]
            self.group = self.key()
        except Exception as error:  # a config can be wrong in any way, and the others are still measured
            self.error = last_line(error)
        self.hash = engine.hash_of(*parts)

    def key(self) -> str:
        """Equal for configs whose plain step and teacher are the same."""

        wrapper = {key: value for key, value in self.cfg.get('optim_wrapper', {}).items() if key != 'clip_grad'}
        # Weights cost nothing: neither where they are from nor whether the student inherits some.
        others = {key: value for key, value in self.arguments.items()
                  if key not in ('losses', 'inherit', 'teacher_ckpt')}
        return engine.hash_of(*map(as_text, (
            self.cfg.model, self.cfg.get('data_preprocessor'), wrapper, others, training_length(self.cfg))))

    def losses(self, index: int) -> Dict[str, Dict[str, Any]]:
        """The losses under names that are unique in the group; random tokens where files are wanted."""
        from kd_mm.registry import MODELS

        result = {}
        for name, loss in self.arguments['losses'].items():
            loss = dict(loss)
            learned = getattr(MODELS.get(loss['type']), 'learned', None)
            if learned is not None:
                loss[learned] = 'random'
            result[f'loss_{self.method}_{index}_{name.removeprefix("loss_")}'] = loss
        return result


def as_text(value: Any) -> str:
    """A config without the marks that mmengine leaves in a base found by ``mmdet::``."""
    def plain(item: Any) -> Any:
        if hasattr(item, 'items'):
            return {str(key): plain(part) for key, part in item.items() if key != '_scope_'}
        return [plain(part) for part in item] if isinstance(item, (list, tuple)) else item
    return json.dumps(plain(value), sort_keys=True, default=str)


def sources(losses: Dict[str, Dict[str, Any]]) -> List[str]:
    """Source files of losses, regions and adapters that a config names."""
    from kd_mm.registry import MODELS

    parts: Dict[Any, Any] = {
        (name, part): value for name, loss in losses.items()
        for part, value in (('loss', loss), ('region', loss.get('region')), ('adapter', loss.get('adapter')))}
    # One that does not exist is for the distiller to complain about.
    return origins.loss_sources({key: value for key, value in parts.items()
                                   if hasattr(value, 'get') and MODELS.get(value.get('type')) is not None})


def last_line(error: Union[str, Exception]) -> str:
    """The last line of an error, without paths of this machine."""
    lines = str(error).strip().splitlines() or ['no message']
    text = lines[-1].strip() if isinstance(error, str) else f'{type(error).__name__}: {lines[-1].strip()}'
    return re.sub(r'(?<![\w.:/])/[\w.+/-]*/', '', text)[:300]


def groups_of(entries: Sequence[Entry]) -> List[List[Entry]]:
    """Lists of entries that can be measured together, in the order of their first ones."""
    groups: Dict[str, List[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# measuring: one process for each group


def measure(job: Dict[str, Any]) -> None:
    """Measure a group, config by config, into the file ``job['out']``."""
    from kd_mm.lab.cost import Bench

    home = Path(job['home'])
    entries = [Entry(home / name, home, job['settings']) for name in job['configs']]
    settings, found = job['settings'], {}

    def note(entry: Entry, **record: Any) -> None:
        found[entry.name] = record
        write_json(Path(job['out']), found)
        print(f'  {entry.name}: ' + (record['error'] if 'error' in record else describe(record)), flush=True)

    cfg = entries[0].cfg
    with scope_of(cfg):
        import torch
        torch.manual_seed(0)
        bench = Bench(cfg, settings['batch'], padded(settings['shape']), settings['device'], augment=False)
        mend_labels(bench)
        plain = bench.plain_cost(job['steps'])
        about = dict(
            input_shape=list(bench.data['inputs'].shape[-2:]), threads=torch.get_num_threads(), steps=job['steps'],
            batch=settings['batch'], torch=torch.__version__.split('+')[0], load_average=round(os.getloadavg()[0], 2),
            device=torch.cuda.get_device_name(bench.device) if bench.device.type == 'cuda' else 'CPU',
            processor=machine.processor(), versions=machine.installed(), plain=plain)
        print(f'  plain step: {plain_ms(plain):.0f} ms', flush=True)
        measure_together(bench, entries, about, job['steps'], note)


def padded(shape: Sequence[int]) -> Tuple[int, int]:
    """Height and width as the hosts' detectors pad them: multiples of 32."""
    height, width = (-(-edge // 32) * 32 for edge in shape)
    return height, width


def mend_labels(bench: 'Bench') -> None:
    """mmseg 1.2.2's PIDNet looks up the class weight of the label 255 and fails (open-mmlab/mmsegmentation#3734)."""
    head = getattr(bench.student, 'decode_head', None)
    if any(cls.__name__ == 'PIDHead' for cls in type(head).__mro__):
        for sample in bench.data['data_samples']:
            labels = sample.gt_sem_seg.data
            labels[labels == 255] = 0


def measure_together(bench: 'Bench', entries: Sequence[Entry], about: Record, steps: int,
                     note: Callable[..., None]) -> None:
    """One distiller for these configs; where that is not possible, one for each half of them."""
    names = {entry.name: entry.losses(index) for index, entry in enumerate(entries)}
    merged = dict(entries[0].arguments, inherit=(), losses={
        name: loss for losses in names.values() for name, loss in losses.items()})
    try:
        bench.distil(merged, trained=False)
        asleep = len(merged['losses']) - len(bench.distiller.active_terms())
        if asleep and len(entries) > 1:
            raise ValueError(f'{asleep} of the terms have no weight at the step where most have one')
        recording = bench.record()
    except Exception as error:
        why = reason(error)
        recording = None
    if recording is None and len(entries) == 1:
        note(entries[0], error=why)
    if recording is None:
        forget(bench)
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]) if middle else ():
            measure_together(bench, half, about, steps, note)
        return
    teachers: Dict[Any, Record] = {}
    for entry in entries:
        try:
            note(entry, **about, **measure_config(bench, list(names[entry.name]), recording, steps, teachers))
        except Exception as error:
            note(entry, error=reason(error))
    forget(bench)


def measure_config(bench: 'Bench', names: Sequence[str], recording: 'Recording', steps: int,
                   teachers: Dict[Any, Record]) -> Record:
    """The terms of one config together, and each alone if there are several; the teacher as far as they need it."""
    from kd_mm.lab.cost import paths_of

    active = [term for term in bench.distiller.active_terms() if term.name in names]
    cost = bench.terms_cost([term.name for term in active], recording, steps)
    paths = paths_of(active, 'teacher')
    # Whether an auxiliary head runs depends on the paths too.
    stop = bench.stop_of(paths), frozenset(path.split('.')[0] for path in paths)
    if stop not in teachers:
        teachers[stop] = bench.teacher_cost(steps, paths)
    record = dict(loss=cost, teacher=teachers[stop])
    if len(names) > 1:
        record['terms'] = {
            term.name.split('_', 1)[1]: bench.terms_cost([term.name], recording, steps) for term in active}
    return record


def forget(bench: 'Bench') -> None:
    """Free the distiller, its teacher and the taps on it."""
    for name in ('distiller', 'teacher', '_stops'):
        vars(bench).pop(name, None)
    gc.collect()


def reason(error: Exception) -> str:
    traceback.print_exception(error)
    return last_line(error)


def write_json(path: Path, content: Any) -> None:
    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value

    partial = path.with_suffix('.part')
    partial.write_text(json.dumps(rounded(content), indent=1, ensure_ascii=False) + '\n')
    partial.replace(path)


class Book:
    """``cost.json``: one record a config, with what was measured or why not.

    Args:
        home: configs/<task>.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / 'cost.json'
        self.records = json.loads(self.path.read_text())['configs'] if self.path.exists() else {}

    def save(self) -> None:
        kept = {name: record for name, record in sorted(self.records.items()) if (self.path.parent / name).exists()}
        write_json(self.path, dict(configs=kept))

    def has(self, entry: Entry, retry: bool) -> bool:
        record = self.records.get(entry.name)
        return record is not None and record['hash'] == entry.hash and not (retry and 'error' in record)


def run_group(entries: Sequence[Entry], home: Path, settings: Settings, steps: int, book: Book) -> None:
    """Measure a group in a process of its own and take over what it has written, however it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / 'out.json', Path(folder) / 'errors'
        job = Path(folder) / 'job.json'
        job.write_text(json.dumps(dict(
            home=str(home), configs=[entry.name for entry in entries], settings=settings, steps=steps, out=str(out))))
        threads = os.environ.get('OMP_NUM_THREADS') or engine.cores()
        code = None  # interrupted
        try:
            with open(errors, 'w', encoding='utf-8') as stream:
                command = [sys.executable, str(ROOT / 'tools' / 'studies' / 'cost.py'), '--job', str(job)]
                code = subprocess.run(command, cwd=ROOT, stderr=stream, env=engine.environment(int(threads))).returncode
        finally:
            found = json.loads(out.read_text()) if out.exists() else {}
            lines = [line for line in errors.read_text(errors='replace').splitlines() if line.strip()]
            lost = 'killed, most likely because memory ran out' if code in (-9, 137) else last_line(
                lines[-1] if lines else f'exit code {code}')
            for entry in entries:
                if entry.name in found:
                    book.records[entry.name] = dict(found[entry.name], hash=entry.hash)
                elif code is not None:
                    book.records[entry.name] = dict(error=lost, hash=entry.hash)
                    print(f'  {entry.name}: {lost}', flush=True)
            book.save()


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=tuple(SHAPES))
    parser.add_argument('--only', nargs='+', metavar='NAME', help='methods (folders), or parts of config file names')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='of the images; default by task')
    parser.add_argument('--batch', type=int, default=2, help='images (default 2)')
    parser.add_argument('--steps', type=int, default=STEPS, help='measured turns, more for what is short (default 3)')
    parser.add_argument('--device', default='cpu', help='cpu (default) or cuda')
    parser.add_argument('--retry', action='store_true', help='measure again what has failed')
    parser.add_argument('--render', action='store_true', help='only write the cards from the results')
    parser.add_argument('--check', action='store_true', help='only list what is over the limit; exit code 1 if any is')
    parser.add_argument('--home', type=Path, help='folder of the methods; default configs/<task>')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='change settings of all configs: KEY=VALUE ...')
    parser.add_argument('--job', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.task is None and args.job is None:
        parser.error('--task is needed')
    if args.steps < 1 or args.batch < 1:
        parser.error('--steps and --batch must be at least 1')
    return args


def choose(home: Path, only: Optional[Sequence[str]]) -> List[Path]:
    """Paths of the configs that are asked for."""
    paths = sorted(home.glob('*/*.py'))
    if only is None:
        return paths
    chosen = {name: [path for path in paths if path.parent.name == name]
              or [path for path in paths if name in path.relative_to(home).as_posix()] for name in only}
    unknown = [name for name, found in chosen.items() if not found]
    if unknown:
        raise engine.StageError(f'no config below {home.name} has {", ".join(unknown)} in its name')
    return [path for path in paths if any(path in found for found in chosen.values())]


def parse_options(options: Sequence[str]) -> Dict[str, Any]:
    """KEY=VALUE as mmengine's tools read it."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *options] if options else []).cfg_options


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    if args.job:
        measure(json.loads(args.job.read_text()))
        return 0
    # Like Ctrl-C: without this, `kill` would end this process and leave the one that measures running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = (args.home or ROOT / 'configs' / args.task).resolve()
    book = Book(home)
    if args.check:
        return int(summary(args.task, book) > 0)
    if not args.render:
        settings = dict(shape=list(args.shape or SHAPES[args.task]), batch=args.batch, device=args.device,
                        options=parse_options(args.cfg_options))
        try:
            entries = [Entry(path, home, settings) for path in choose(home, args.only)]
            measure_all(entries, home, settings, args, book)
        except engine.StageError as error:
            print(f'cost: {error}', file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print('\ncost: interrupted; the same command continues where it stopped', file=sys.stderr)
            return 130
    render(args.task, home, book)
    summary(args.task, book)
    return 0


def measure_all(entries: Sequence[Entry], home: Path, settings: Settings, args: argparse.Namespace, book: Book) -> None:
    """Measure what has no valid record, group by group; the cards are written after each."""
    groups = groups_of(entries)
    for number, group in enumerate(groups, 1):
        todo = [entry for entry in group if not book.has(entry, args.retry)]
        print(f'[cost {number}/{len(groups)}] {group[0].path.stem}: '
              + (f'{len(todo)} of {len(group)} configs' if todo else 'measured before'), flush=True)
        for entry in todo:
            if entry.error:
                book.records[entry.name] = dict(error=entry.error, hash=entry.hash)
                print(f'  {entry.name}: {entry.error}', flush=True)
        todo = [entry for entry in todo if not entry.error]
        if todo:
            run_group(todo, home, settings, args.steps, book)
        book.save()
        render(args.task, home, book)


if __name__ == '__main__':
    sys.exit(main())
