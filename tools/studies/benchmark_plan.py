"""What ``tools/studies/benchmark.py`` trains: entries of a pair, the configs that it writes, and the stages."""

import functools
import pprint
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import sources
import stages as engine
from benchmark_data import Data, hash_files

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / 'configs' / 'benchmark'
#: Seconds an iteration relative to the plain student: a first guess.
COST = {'teacher': 2.5, 'plain': 1.0}
QUICK = 12
#: Digits of a hash that results keep.
CODE = 16
#: Name of the row that has what ``kd-mm distill --recipe auto`` takes.
RECIPE = 'recipe:auto'
#: Ends of names: weights measured in training; the plain student, trained longer.
AUTO, LONGER = ':auto', 'plain:x'
#: What an entry says for the table alone.
ABOUT = ('note', 'against')
#: The losses of a method, by name.
Losses = Dict[str, Dict[str, Any]]


def single(name: str) -> bool:
    """Whether a name is that of one method by itself, with its published weight."""
    return name not in ('teacher', 'plain') and not set(':+') & set(name)


class Run(engine.Training):
    """One training of the benchmark: a teacher, or a student with or without a method.

    Args:
        name: 'teacher', 'plain', a method or another row.
        seed: of the training.
        config: file to train.
        work_dir: its folder.
        options: for ``--cfg-options``.
        needs: the teacher, and what was learned from it.
        code: hash of the code of its losses.
    """

    def __init__(self, name: str, seed: int, config: Path, work_dir: Path, options: Sequence[str],
                 needs: Sequence[engine.Stage] = (), code: str = '') -> None:
        self.name, self.seed, self.config, self.work_dir, self.options = name, seed, config, work_dir, options
        self.needs, self.code = tuple(needs), code
        self.title = f'{name}, seed {seed}'
        self.speed = ('train', name)
        self.cost = COST.get(name, 1.6)

    @property
    def teacher(self) -> Optional['Run']:
        """The benchmark's training that it learns from, if it does."""
        return next((need for need in self.needs if isinstance(need, Run)), None)

    def weights(self) -> Optional[str]:
        """Hash of its checkpoint; None without one."""
        path = self.checkpoint()
        return None if path is None else hash_files([path])[:CODE]

    def command(self) -> List[str]:
        return engine.train_command(self.config, self.work_dir, [*self.options, *teacher_options(self)])


class Lesson(engine.Stage):
    """``tools/learn_tokens.py`` for one method and teacher; ``files`` are what it writes."""

    def __init__(self, name: str, config: Path, work_dir: Path, options: Sequence[str], steps: int,
                 files: Sequence[Path], teacher: Run) -> None:
        self.name, self.config, self.work_dir, self.options = name, config, work_dir, options
        self.total_iters, self.files, self.needs = steps, files, (teacher,)
        self.title = f'{name}, learned from the teacher' + (f' of seed {teacher.seed}' if teacher.seed else '')
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
# entries


def read_settings(pair: str) -> Any:
    """``configs/benchmark/<pair>.py``; what a base of it has and ``left_out`` names is not there."""
    from mmengine.config import Config  # heavy; not needed for --help

    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's, on every installed config
    settings = Config.fromfile(str(HOME / f'{pair}.py'), import_custom_modules=False)
    for name in settings.get('left_out', {}):
        settings.methods.pop(name, None)
    return settings


def entries(settings: Any) -> Dict[str, Dict[str, Any]]:
    """Every row of a pair but the teacher, the plain student and the recipe, by name.

    Besides ``methods``: each of them with weights that are measured, ``combinations`` and ``rows``, which have students
    or teachers of their own.
    """
    found = {name: entry.to_dict() for name, entry in settings.methods.items()}
    if settings.get('weights') == 'both':
        found.update({f'{name}{AUTO}': with_auto_weights(entry) for name, entry in found.items()})
    for part in ('combinations', 'rows'):
        found.update({name: entry.to_dict() for name, entry in settings.get(part, {}).items()})
    return found


def with_auto_weights(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """An entry whose losses have measured weights."""
    return dict(entry, losses={name: dict(loss, loss_weight='auto') for name, loss in entry['losses'].items()})


@functools.lru_cache(maxsize=None)
def recipe_entry(student: Path, teacher: Path) -> Tuple[str, Dict[str, Any]]:
    """Name and entry of the recipe that ``kd-mm distill --recipe auto`` takes for two configs."""
    from mmengine.config import Config

    from kd_mm.hosts.models import build_model
    from kd_mm.lab.recipes import choose

    models = [build_model(Config.fromfile(str(path)), None) for path in (student, teacher)]
    choice = choose(*models)
    return choice.recipe.name, dict(losses={name: dict(loss) for name, loss in choice.losses.items()})


# ---------------------------------------------------------------------------------------------------------------------
# configs


def write_config(path: Path, base: Path, changes: Mapping[str, Any]) -> Path:
    """A config that differs from its base in some entries."""
    text = f'_base_ = {str(base)!r}\n' + ''.join(
        f'{key} = {pprint.pformat(value, sort_dicts=False, width=118)}\n' for key, value in changes.items())
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def stretched(config: Any, iters: int, wanted: int, factor: float = 1.0) -> Dict[str, Any]:
    """What to change in a config so that its schedule fits ``wanted`` iterations.

    Args:
        config: of a student or teacher.
        iters: the iterations that its schedules are written for.
        wanted: those that it will have.
        factor: of the length of its loop.
    """
    changes: Dict[str, Any] = {}
    if factor != 1:
        key = 'max_iters' if config.train_cfg.get('max_iters') else 'max_epochs'
        length = config.train_cfg[key] * factor
        if length != int(length):
            raise engine.StageError(f'{key}={config.train_cfg[key]} times {factor:g} is no whole number; take other '
                                    'factors in `longer`')
        changes['train_cfg'] = {key: int(length), 'val_interval': int(length)}
    if wanted != iters:
        last = max(item.get('end', 0) for item in config.param_scheduler)
        half = max(1, wanted // 2)  # a set of few pictures: the warm-up takes half of the training at most
        changes['param_scheduler'] = [
            dict(item, begin=min(item.get('begin', 0), half),
                 end=wanted if item.get('end') == last else min(item.get('end', half), half))
            for item in config.param_scheduler]
    return changes


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


def folder_of(name: str) -> str:
    """A row's name as that of a file."""
    return name.replace(':', '_').replace('+', '_and_')


# ---------------------------------------------------------------------------------------------------------------------
# the plan


class Planner:
    """Writes the configs of a pair and makes its stages.

    Args:
        settings: of the pair.
        data: what it is trained on.
        work_dir: for everything.
        quick: a few iterations of each training.
        teachers: how many teachers; seed S learns from teacher ``S % teachers``.
    """

    def __init__(self, settings: Any, data: Data, work_dir: Path, quick: bool = False, teachers: int = 1) -> None:
        self.settings, self.data, self.work_dir, self.quick = settings, data, work_dir, quick
        self.teachers, self.first = teachers, {}  # type: int, Dict[int, Run]
        self.lessons: Dict[Tuple[str, int], Lesson] = {}
        self.roles: Dict[Tuple[str, float], Tuple[Path, str, Any, int]] = {}
        self.entries = entries(settings)

    def role(self, file: str, factor: float = 1.0) -> Tuple[Path, str, Any, int]:
        """Of a config of the benchmark, on this data and with its schedule stretched: path, text without what the data
        changes, loop and iterations."""
        from mmengine.config import Config

        key = (file, factor)
        if key not in self.roles:
            base = HOME / file
            config = Config.fromfile(str(base), import_custom_modules=False)
            iters = engine.count_iters(config, self.data.images)
            written = max((item.get('end', 0) for item in config.get('param_scheduler', ())), default=0)
            # Own sets: the schedule is as it is written; others: its end moves with the number of pictures.
            wanted = round(iters * factor)
            changes = stretched(config, written if self.data.changes else iters, wanted, factor)
            text = '\n'.join([config.pretty_text, pprint.pformat(changes), sources.imports_hash(config)])
            changes.update(self.data.changes)
            heads = self.data.heads(config.model)
            if heads:
                changes['model'] = heads
            stem = Path(file).stem + (f'_x{factor:g}' if factor != 1 else '')
            path = write_config(self.work_dir / 'configs' / f'{stem}.py', base, changes) if changes else base
            self.roles[key] = (path, text, config.train_cfg, wanted)
        return self.roles[key]

    def options(self, seed: int, loop: Any) -> List[str]:
        chosen = [f'randomness.seed={seed}', *self.data.options()]
        if self.quick:
            key = 'max_iters' if loop.get('max_iters') else 'max_epochs'
            steps = QUICK if key == 'max_iters' else 1
            chosen += [f'train_cfg.{key}={steps}', f'train_cfg.val_interval={steps}',
                       'default_hooks.logger.interval=4']
        return chosen

    def run(self, name: str, seed: int, file: str, config: Optional[Path] = None, needs: Sequence[engine.Stage] = (),
            extra: Sequence[str] = (), factor: float = 1.0, code: str = '') -> Run:
        path, text, loop, iters = self.role(file, factor)
        options = self.options(seed, loop)
        stage = Run(name, seed, config or path, self.work_dir / f'{folder_of(name)}_seed{seed}', options, needs, code)
        stage.config_hash = engine.hash_of(text, *options[1 + len(self.data.options()):], str(seed), self.data.hash,
                                           *extra)
        if self.quick:
            iters = QUICK if loop.get('max_iters') else iters // loop.max_epochs
        stage.total_iters = iters
        return stage

    def teacher(self, seed: int) -> List[Run]:
        """The teacher of a seed, in a list that is empty where it is planned already."""
        turn = seed % self.teachers
        if turn in self.first:
            return []
        self.first[turn] = self.run('teacher', turn, self.settings.teacher)
        return [self.first[turn]]

    def longer(self, seed: int) -> List[Run]:
        """The plain student with more steps, for the comparison at equal time."""
        return [self.run(f'{LONGER}{factor:g}', seed, self.settings.student, factor=factor)
                for factor in self.settings.get('longer', ())]

    def method(self, name: str, seed: int) -> List[Job]:
        """What is to be trained for a row with one seed: its lesson, if it has one, and the student."""
        entry = self.entries[name]
        losses = entry.get('losses', {})
        if 'num_classes' in str(losses) and self.data.classes is not None:
            losses = {key: dict(loss, num_classes=len(self.data.classes)) if 'num_classes' in loss else loss
                      for key, loss in losses.items()}
        student = entry.get('student', self.settings.student)
        if not losses:  # another student without any method
            return [self.run(name, seed, student)]
        own = entry.get('hook', {})
        teacher = None if 'teacher' in own else self.first[seed % self.teachers]
        turn = f'_t{teacher.seed}' if teacher is not None and teacher.seed else ''
        losses, files = with_files(losses, self.work_dir / 'learned', folder_of(name) + turn)
        hook = dict(type='kd_mm.DistillHook', teacher=str(self.role(self.settings.teacher)[0]), losses=losses)
        path = write_config(self.work_dir / 'configs' / f'{folder_of(name)}{turn}.py', self.role(student)[0],
                            dict(custom_hooks=[{**hook, **own}]))
        code = sources.losses_hash(losses)
        settings = {key: value for key, value in entry.items() if key not in ABOUT}
        depends = [pprint.pformat(settings), code, *([teacher.config_hash] if teacher is not None else [])]
        stages: List[Job] = []
        needs: List[engine.Stage] = [teacher] if teacher is not None else []
        if files and teacher is not None:
            key = (name, teacher.seed)
            if key not in self.lessons:
                steps = QUICK if self.quick else entry['learn']
                lesson = Lesson(name, path, self.work_dir / f'{folder_of(name)}{turn}_learned', self.data.options(),
                                steps, files, teacher)
                lesson.config_hash = engine.hash_of(*depends, str(steps), self.data.hash)
                self.lessons[key] = lesson
                stages.append(lesson)
            needs.append(self.lessons[key])
        stages.append(self.run(name, seed, student, path, needs, depends, code=code))
        return stages


def plan(settings: Any, methods: Sequence[str], seeds: int, data: Data, work_dir: Path, quick: bool = False,
         teachers: int = 1, longer: bool = False) -> List[Job]:
    """All stages in the order in which they should start: seed by seed, so that an end at any time leaves whole seeds.

    Args:
        settings: of the pair.
        methods: rows besides the teacher and the plain student, in this order.
        seeds: students of each kind.
        data: what they are trained on.
        work_dir: for everything.
        quick: a few iterations of each.
        teachers: how many.
        longer: the plain student with more steps, too.
    """
    planner = Planner(settings, data, work_dir, quick, teachers)
    if RECIPE in methods:
        recipe, planner.entries[RECIPE] = recipe_entry(planner.role(settings.student)[0],
                                                       planner.role(settings.teacher)[0])
        print(f'[benchmark] --recipe auto takes {recipe} for {settings.title}', flush=True)
    stages: List[Job] = []
    for seed in range(seeds):
        stages += planner.teacher(seed)
        stages.append(planner.run('plain', seed, settings.student))
        for method in methods:
            stages += planner.method(method, seed)
        stages += planner.longer(seed) if longer else []
    return stages
