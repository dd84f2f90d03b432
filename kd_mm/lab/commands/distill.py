"""``kd-mm distill``: from two configs to a better small model, and what it was worth."""

import gc
import json
import os
import os.path as osp
import re
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import click
import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from kd_mm.lab import check as inspection
from kd_mm.lab.commands import REFUSALS, export, fail, program
from kd_mm.lab.commands import train as training
from kd_mm.lab.commands.evaluate import evaluate, own_name, primary, sign, span, with_span
from kd_mm.lab.commands.init import WRITTEN, Plan, default_name, make_plan, pair_options, print_recipe, write_new
from kd_mm.lab.cost import profile_config
from kd_mm.lab.data import picture_size
from kd_mm.lab.logs import STATE, last_checkpoint, read_state
from kd_mm.ops.words import count
from kd_mm.teachers.spec import RANDOM

#: Folders of a run in its work dir, and the configs with and without distillation.
PARTS, CONFIGS = ('distilled', 'baseline', 'teacher'), ('distilled.py', 'baseline.py')
#: (H, W) of the random images of the check, and of the cost where no training picture can be read.
SMALL = (256, 256)
#: What is said where the host's evaluation gives no number.
NOTHING = 'nothing was detected on the validation data, so that there is no score'
#: What may be chance on a scale that ends at 1, at 100, or nobody knows where.
POINTS = {1: '0.01 or 0.02', 100: '1 or 2', None: 'a hundredth or two of the score'}
#: Flags of train that distill sets itself.
TAKEN = ('work_dir', 'resume', 'overwrite', 'score_teacher', 'score_images')


#: Entries of a run's description as a user knows them.
NAMES = dict(flags='flags after --', weights='--teacher-ckpt', images='--score-images')


def _typed(value: Any) -> str:
    return (' '.join(value) or 'none') if isinstance(value, list) else 'none' if value is None else str(value)


class Sieve:
    """The console without what fills pages and stands in the log file too: records of several lines, no warnings.

    Args:
        stream: where the rest goes.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        if not re.search(r' - \S*INFO\S* - ', text) or '\n' not in text.rstrip('\n'):
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """A Runner inside writes its environment, its config and its hooks to the log file alone."""
    with redirect_stdout(Sieve(sys.stdout)):  # type: ignore[type-var]
        yield


def heading(text: str) -> None:
    """A line before each part."""
    click.secho(f'\n== {text}', bold=True)


class Run:
    """One distillation in its folder; every part that is done is noted, and not done again.

    Args:
        folder: the work dir.
        what: what makes it this run and no other: configs, weights, recipe, flags.
    """

    def __init__(self, folder: str, what: Dict[str, Any]):
        self.folder, self.path = folder, osp.join(folder, STATE)
        self.what, self.results = what, {}  # type: Dict[str, Any], Dict[str, Any]

    def open(self, overwrite: bool) -> bool:
        """Make the folder, or find what is there; whether there was something to continue.

        Nothing is noted before something was done: what fails at its start does not take the folder.

        Raises:
            SystemExit: it cannot be written.
            ValueError: something else is in it.
        """
        training.check_folder(self.folder)
        found = read_state(self.folder)
        trained = sorted(Path(self.folder).rglob('*.pth'))
        if found is None:
            self._refuse_foreign(trained, overwrite)
            return False
        if found['what'] == self.what and not overwrite:
            self.results = found['results']
            return True
        if not overwrite and (trained or set(found['results']) - {'cost'}):
            names = [key for key in {**self.what, **found['what']} if found['what'].get(key) != self.what.get(key)]
            there = '; '.join(f'{NAMES.get(key, key)}: {_typed(found["what"].get(key))} there, '
                              f'{_typed(self.what.get(key))} now' for key in names)
            raise ValueError(f'{self.folder} has another distillation ({there}). Repeat what was given there to '
                             'continue it, choose another --work-dir, or start anew with --overwrite')
        parts = [Path(self.folder, name).resolve() for name in (*PARTS, 'student.pth')]
        kept = Path(self.what['weights']).resolve()
        if any(part == kept or part in kept.parents for part in parts):
            raise ValueError(f"the teacher's weights {kept} are in {self.folder}, and --overwrite would remove them. "
                             'Choose another --work-dir')
        for name in PARTS:
            shutil.rmtree(osp.join(self.folder, name), ignore_errors=True)
        self.save()
        return False

    def _refuse_foreign(self, trained: Sequence[Path], overwrite: bool) -> None:
        """A folder that no distillation has made must have nothing that one would lose, or take for its own."""
        own = [path for path in trained if path.relative_to(self.folder).parts[0] in PARTS]
        if own or trained and not overwrite:
            raise ValueError(f'{self.folder} has checkpoints of something else ({(own or trained)[0]}). Choose another '
                             '--work-dir')
        files = [osp.join(self.folder, name) for name in (*CONFIGS, 'report.md')]
        lost = [file for file in files if osp.exists(file) and not _written(file)]
        if lost:
            raise ValueError(f'{lost[0]} is there already, and would be overwritten. Choose another --work-dir')

    def save(self) -> None:
        """Write the state, the file as a whole or not at all."""
        text = json.dumps(dict(what=self.what, results=self.results), indent=1)
        Path(f'{self.path}.part').write_text(text, encoding='utf-8')
        os.replace(f'{self.path}.part', self.path)

    def note(self, name: str, value: Any) -> None:
        """Keep a result."""
        self.results[name] = value
        self.save()


def model_shape(cfg: Config) -> Optional[Tuple[int, int]]:
    """(H, W) that the model crops or pads every training image to; None if it takes them as they come."""
    size = (cfg.model.get('data_preprocessor') or {}).get('size')
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) and len(size) == 2 else None


def loaded(path: str, folder: str, flags: Sequence[str]) -> Tuple[Config, Any]:
    """A config as ``kd-mm train`` would train it, with its arguments."""
    args = training.parse_args([path, '--work-dir', folder, '--resume', *flags])
    cfg = training.load_config(args)
    if (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=0)  # the baseline has the same
    own_name(cfg)
    return cfg, args


def check(cfg: Config) -> None:
    """Stop with all problems of a config; warnings are printed."""
    report = inspection.check(cfg, model_shape(cfg) or SMALL)
    for warning in report.warnings:
        click.echo(f'note: {warning}')
    if report.problems:
        fail('this distillation cannot be trained:\n' + '\n'.join(
            f'  {number}. {problem}' for number, problem in enumerate(report.problems, 1)))


def cost(cfg: Config) -> Dict[str, Any]:
    """Seconds and memory of a step with and without distillation: random images of the training's size, measured."""
    shape = model_shape(cfg) or picture_size(cfg) or SMALL
    batch = int(cfg.train_dataloader.get('batch_size') or 2)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    found = profile_config(cfg, batch, shape, 2, device)
    memory = found['peak_memory']
    return dict(plain_seconds=found['plain_step_ms'] / 1e3, kd_seconds=found['kd_step_ms'] / 1e3, device=device,
                batch=batch, shape=found['input_shape'], plain_bytes=memory['plain_bytes'],
                kd_bytes=memory['kd_bytes'])


def cost_text(found: Dict[str, Any]) -> str:
    """One line of it."""
    text = (f'{found["kd_seconds"]:.3g} s a step instead of {found["plain_seconds"]:.3g} s ('
            f'{count(found["batch"], "image")} of '
            f'{"x".join(map(str, found["shape"]))}, {found["device"]})')
    if found['plain_bytes'] and found['kd_bytes']:
        text += f', {found["kd_bytes"] / 2**20:.0f} MiB instead of {found["plain_bytes"] / 2**20:.0f} MiB'
    return text


def score_text(metrics: Mapping[str, float]) -> str:
    """The metric that says it in one number, with its value."""
    key, value = primary(metrics)
    return f'{with_span(key)} {value:.4g}'


def train_and_score(run: Run, name: str, path: str, plain: Config, flags: Sequence[str]) -> None:
    """Train a config in a folder of its own and score its last checkpoint, if that was not done before."""
    if name in run.results:
        return
    folder = osp.join(run.folder, name)
    cfg, args = loaded(path, folder, flags)
    heading(f'training the student {"without distillation" if name == "baseline" else "with distillation"}; log and '
            f'checkpoints: {folder}')
    run.save()  # before the first checkpoint: whose it is must be known
    start = time.time()
    with quiet():
        training.train(cfg, args)
    gc.collect()
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        fail(f'{folder} has no checkpoint after the training: default_hooks.checkpoint of the config saves none')
    found: Dict[str, Any] = dict(checkpoint=checkpoint, seconds=time.time() - start)
    if plain.get('val_cfg'):
        with quiet():
            found['metrics'] = evaluate(plain, checkpoint, osp.join(folder, 'evaluation'),
                                        images=run.what.get('images'))
        if found['metrics']:
            click.echo(f'{name}: {score_text(found["metrics"])}')
        else:
            click.echo(f'{name}: {NOTHING}')
    run.note(name, found)


def report(run: Run) -> str:
    """The end: a table of scores, what was gained, and where everything is, as Markdown."""
    rows, names = [], (('baseline', 'student without distillation'), ('distilled', 'student, distilled'),
                       ('teacher', 'teacher'))
    for key, label in names:
        metrics = run.results.get(key, {}).get('metrics')
        if metrics:
            rows.append((key, label, *primary(metrics)))
    lines = [f'# {run.what["recipe"]}: {run.what["student"]} from {run.what["teacher"]}', '']
    if rows:
        lines += [f'| model | {with_span(rows[0][2])} |', '|---|---|']
        lines += [f'| {label} | {value:.4g} |' for _, label, _, value in rows]
        if run.what.get('images'):
            lines += ['', f'All scores are those on the first {run.what["images"]} validation images.']
    else:
        lines += ['The config has no validation, so nothing was scored.']
    scores = {key: value for key, _, _, value in rows}
    better = sign(rows[0][2]) if rows else 1
    if 'teacher' in scores and 'distilled' in scores and better * scores['teacher'] <= better * scores.get(
            'baseline', scores['distilled']):
        lines += ['', '**The teacher is no better than the student on this data:** there is little to learn from it. '
                  'Look at its weights, its preprocessing and its classes, or take a better one.']
    if len(scores) == 3:
        gap, gain = scores['teacher'] - scores['baseline'], scores['distilled'] - scores['baseline']
        closed = f', {100 * gain / gap:.0f} % of the gap to the teacher' if better * gap > 0 else ''
        lines += ['', f'Against the student without distillation: {gain:+.4g}{closed}. One seed: a difference of '
                  f'{POINTS[span(rows[0][2])]} may be chance; kd-mm compare looks at several.']
    elif 'distilled' in scores:
        lines += ['', 'Whether distillation helped is not known without a student of the same seed: --baseline trains '
                  'one.']
    if 'cost' in run.results:
        lines += ['', f'Cost: {cost_text(run.results["cost"])}.']
    lines += ['', f'Plain student: `{run.results["student"]}`, which stock tools load. Config: '
              f'`{run.results["config"]}`.', '',
              'Where it still loses against its teacher, with pictures:', f'`kd-mm report {shlex.quote(run.folder)}`']
    return '\n'.join(lines) + '\n'


def show(run: Run) -> None:
    """Print the report's table and sentences."""
    console, table = Console(), None
    for line in report(run).splitlines():
        if line.startswith('|---'):
            continue
        if line.startswith('| '):
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            if table is None:
                table = Table(*cells)
            else:
                table.add_row(*cells)
            continue
        if table is not None:
            console.print(table)
            table = None
        if not line.startswith('# ') and line:
            console.print(line.replace('**', '').replace('`', ''), highlight=False, soft_wrap=True)
    if table is not None:
        console.print(table)


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags that distill sets itself; those that kd-mm train does not know end the program, as there.

    Raises:
        ValueError: naming the flag and what to do.
    """
    given = vars(training.parse_args(['STUDENT', *flags], f'{program()} STUDENT --teacher TEACHER --'))
    usual = vars(training.parse_args(['STUDENT']))
    if given['launcher'] != usual['launcher']:
        raise ValueError('distill trains in one process. For several write the config with kd-mm init, and train '
                         'it with torchrun: tools/dist_train.sh CONFIG NPROC')
    for name in TAKEN:
        if given[name] != usual[name]:
            raise ValueError(f'--{name.replace("_", "-")} after -- is set by distill itself: it continues and scores '
                             'the teacher by itself, and --work-dir, --overwrite and --score-images stand before --')


def write_configs(plan: Plan, run: Run, again: bool) -> Tuple[str, str]:
    """The configs with and without distillation, as files in the work dir; their paths.

    Raises:
        ValueError: one was changed since the distillation that is continued began.
    """
    paths = config, plain = osp.join(run.folder, CONFIGS[0]), osp.join(run.folder, CONFIGS[1])
    for path, text in ((config, plan.text()), (plain, plan.plain_text())):
        if again and osp.exists(path) and not _same_config(path, text):
            raise ValueError(f'{path} was changed since this distillation began. Train it by itself with kd-mm train '
                             f'{shlex.quote(path)}; or take it away, and it is written anew')
        write_new(path, text, overwrite=True)
    return paths


def _same_config(path: str, text: str) -> bool:
    """Whether a file says the same as a text: remarks and quotes may differ."""
    if Path(path).read_text(encoding='utf-8', errors='replace') == text:
        return True
    try:
        return bool(Config.fromfile(path).to_dict() == Config.fromstring(text, '.py').to_dict())
    except Exception:  # a config is a program, and may raise anything
        return False


def _written(path: str) -> bool:
    """Whether one of our commands wrote a file."""
    return Path(path).read_text(encoding='utf-8', errors='replace').startswith(WRITTEN)


def distill(plan: Plan, run: Run, flags: List[str], baseline: bool, measure: bool, again: bool) -> None:
    """All parts, each once; ``again`` where a part may have been done before."""
    config, plain = write_configs(plan, run, again)
    cfg, _ = loaded(config, run.folder, flags)
    stock, _ = loaded(plain, run.folder, flags)
    training.check_data(cfg, training.phases(cfg))
    if 'distilled' not in run.results:
        heading('checking the distillation')
        check(cfg)
        click.echo('check: ok')
        if measure and 'cost' not in run.results:
            run.note('cost', cost(cfg))
    if 'cost' in run.results:
        click.echo(f'cost: {cost_text(run.results["cost"])}')
    if 'teacher' not in run.results and stock.get('val_cfg'):
        heading(f'scoring the teacher on the validation data; log: {osp.join(run.folder, "teacher")}')
        with quiet():
            metrics = evaluate(stock, plan.weights, osp.join(run.folder, 'teacher'), plan.teacher,
                               run.what.get('images'))
        if not metrics:
            raise ValueError(f'the teacher ({plan.source}, {plan.weights}): {NOTHING}. Nothing can be learned from it: '
                             'look at its weights and its preprocessing, or train it longer')
        run.note('teacher', dict(metrics=metrics))
        click.echo(f'teacher: {score_text(metrics)}')
    if baseline:
        train_and_score(run, 'baseline', plain, stock, flags)
    train_and_score(run, 'distilled', config, stock, flags)
    heading('exporting the plain student')
    student, checkpoint = osp.join(run.folder, 'student.pth'), run.results['distilled']['checkpoint']
    moved = last_checkpoint(osp.join(run.folder, 'distilled'))
    checkpoint = checkpoint if osp.isfile(checkpoint) else moved
    if checkpoint is not None:
        export.main([checkpoint, student, '--overwrite'])
    elif not osp.isfile(student):
        raise ValueError(f'{osp.join(run.folder, "distilled")} has no checkpoint any more, and {student} was not '
                         'written before. Start anew with --overwrite')
    run.results.update(student=student, config=config)
    run.save()
    Path(run.folder, 'report.md').write_text(report(run), encoding='utf-8')
    show(run)


@click.command('distill', context_settings=dict(ignore_unknown_options=False))
@pair_options
@click.option('--work-dir', help='Folder of everything. Default: work_dirs/STUDENT_from_TEACHER_RECIPE.')
@click.option('--baseline', is_flag=True, help='Also train the student without distillation, with the same seed.')
@click.option('--score-images', type=click.IntRange(1), metavar='N', help='Score teacher and students on the first N '
              'validation images alone.')
@click.option('--no-cost', is_flag=True, help='Do not measure what a step costs.')
@click.option('--overwrite', '--force', 'overwrite', is_flag=True,
              help='Start anew in a work dir with another distillation.')
@click.argument('flags', nargs=-1, type=click.UNPROCESSED)
def command(student: str, teacher: str, teacher_ckpt: Optional[str], recipe: str, explain: bool,
            work_dir: Optional[str], baseline: bool, score_images: Optional[int], no_cost: bool, overwrite: bool,
            flags: Tuple[str, ...]) -> None:
    """Distil TEACHER into STUDENT: choose losses, check, train, evaluate, export, report.

    After -- come flags of kd-mm train: kd-mm distill STUDENT --teacher TEACHER -- --amp --cfg-options
    data_root=/data/coco. The same command with the same flags again continues where it was interrupted.
    """
    try:
        check_flags(flags)
        plan = make_plan(student, teacher, teacher_ckpt, recipe)
        if plan.weights == RANDOM:
            raise ValueError('nothing can be learned from random weights: give those of the teacher with '
                             '--teacher-ckpt FILE (kd-mm init takes random, to write a config for a dry try)')
        folder = work_dir or osp.join('work_dirs', default_name(plan, student, teacher))
        run = Run(folder, dict(student=plan.file, teacher=plan.source, weights=plan.weights,
                               recipe=plan.choice.recipe.name, flags=list(flags),
                               **({} if score_images is None else dict(images=score_images))))
        again = run.open(overwrite)
        print_recipe(plan, explain)
        if again:
            click.echo(f'continuing in {folder}; done: {", ".join(run.results) or "nothing yet"}')
        distill(plan, run, list(flags), baseline, not no_cost, again)
    except REFUSALS as error:
        fail(error)
