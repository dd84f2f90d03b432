"""Which models a report compares, on which data: from a work dir, or from configs and checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config

from kd_mm.engine.hook import folder_of
from kd_mm.hosts.files import find
from kd_mm.hosts.models import default_weights, load_config, scope_of_config
from kd_mm.lab.configs import hook_entries, read_config
from kd_mm.lab.logs import checkpoints, last_checkpoint, log_rows, read_state
from kd_mm.registry import TEACHERS
from kd_mm.teachers.sources import SELF, STUDENT, weights_file
from kd_mm.teachers.spec import RANDOM

#: The models that may be compared, and what they are called, in the order in which a row reads. The student is always
#: there.
ROLES = {'teacher': 'teacher', 'student': 'student', 'plain': 'plain student'}


@dataclass
class Side:
    """One model.

    Attributes:
        cfg: config with its ``model``.
        config: what names it.
        weights: path or URL of its checkpoint.
    """

    cfg: Config
    config: str
    weights: str


@dataclass
class Source:
    """What a report is about.

    Attributes:
        cfg: config of the student, whose validation data are used.
        sides: role (of :data:`ROLES`) -> model.
        history: (step, path) of the student's checkpoints, in order.
        logged: name of a ``kd_agree_...`` in the log -> [(step, value)].
        notes: what was left out and why, as sentences.
        folder: the work dir; None without.
    """

    cfg: Config
    sides: Dict[str, Side]
    history: List[Tuple[int, str]] = field(default_factory=list)
    logged: Dict[str, List[Tuple[int, float]]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    folder: Optional[str] = None


def _config_in(folder: Path) -> Optional[Path]:
    """The config that a training has written into its folder, with every option applied."""
    written = sorted(folder.glob('*/vis_data/config.py')) or sorted(folder.glob('*.py'))
    return written[-1] if written else None


def _agreement_log(folder: Path) -> Dict[str, List[Tuple[int, float]]]:
    found: Dict[str, Dict[int, float]] = {}
    for row in log_rows(folder):
        for key, value in row.items():
            if key.startswith('kd_agree_'):
                found.setdefault(key, {})[int(row.get('iter', row.get('step', 0)))] = float(value)
    return {key: sorted(values.items()) for key, values in found.items()}


def from_work_dir(folder: str) -> Source:
    """What a training or ``kd-mm distill`` has left in its folder.

    Raises:
        ValueError: there is nothing to report on yet.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f'no such work dir: {folder} (looked at {path.absolute()}). Give the work dir of kd-mm '
                         'distill or of a training, or --student CONFIG CHECKPOINT')
    run, plain = path, None
    if read_state(path) is not None:
        run = path / 'distilled'
        plain = path / 'baseline'
        if last_checkpoint(run) is None:
            raise ValueError(f'{folder}: this distillation has no student yet. Finish it by the same kd-mm distill')
    config, weights = _config_in(run), last_checkpoint(run)
    if config is None or weights is None:
        missing = 'config (*.py)' if config is None else 'checkpoint (iter_*.pth, epoch_*.pth)'
        raise ValueError(f'{folder} has no {missing}: it is no work dir of a training. Give one, or --student CONFIG '
                         'CHECKPOINT')
    cfg = read_config(str(config))
    source = Source(cfg, {'student': Side(cfg, str(config), weights)}, checkpoints(run), _agreement_log(run),
                    folder=folder)
    if plain is not None:
        own, trained = _config_in(plain), last_checkpoint(plain)
        if own is not None and trained is not None:
            source.sides['plain'] = Side(read_config(str(own)), str(own), trained)
        else:
            source.notes.append('There is no plain student to compare with: kd-mm distill trains one with --baseline, '
                                'or give one with --plain CONFIG CHECKPOINT.')
    return source


def add_teacher(source: Source) -> None:
    """The teacher that the student's config names in its distillation hook; a note where it cannot predict."""
    entries = hook_entries(source.cfg)
    if not entries:
        source.notes.append('The config of the student has no kd_mm.DistillHook, so no teacher is known: give one with '
                            '--teacher CONFIG CHECKPOINT.')
        return
    entry: Dict[str, Any] = dict(entries[0])
    if entry.get('teachers'):
        name, entry = next(iter(entry['teachers'].items()))
        source.notes.append(f'Of several teachers the first, {name}, is compared.')
    teacher: Any = entry.get('teacher')
    given, folder = entry.get('teacher_ckpt'), folder_of(source.cfg)
    kind = teacher.get('type') if hasattr(teacher, 'get') and 'model' not in teacher else None
    listed = isinstance(kind, str) and kind.removeprefix('kd_mm.') in TEACHERS.module_dict
    if teacher == SELF or listed or given == RANDOM:
        what = 'has random weights' if given == RANDOM else f'({kind or teacher}) makes no predictions of its own'
        source.notes.append(f'The teacher {what}, so nothing is compared with it.')
        return
    if teacher == STUDENT:
        if given:
            source.sides['teacher'] = Side(source.cfg, STUDENT, str(weights_file(given, folder)))
        return
    cfg, name, path = load_config(teacher, folder)
    weights = weights_file(given, folder) or default_weights(path)
    if weights is None:
        raise ValueError(f'no weights for the teacher {name}: give them with --teacher CONFIG CHECKPOINT')
    if scope_of_config(cfg) not in (None, scope_of_config(source.cfg)):
        source.notes.append(f'The teacher {name} is a model of {scope_of_config(cfg)}, so its predictions cannot be '
                            'compared.')
        return
    source.sides['teacher'] = Side(cfg, name, str(weights))


def from_files(config: str, weights: str) -> Source:
    """A student by its config and checkpoint."""
    cfg = read_config(config)
    return Source(cfg, {'student': Side(cfg, config, _existing(weights, 'student'))})


def side(role: str, config: str, weights: str) -> Side:
    """A model that was given by config and checkpoint.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    return Side(load_config(config)[0], config, _existing(weights, role))


def _existing(weights: str, role: str) -> str:
    if '://' in weights:
        return weights
    found, _ = find(weights, None)
    if found is None:
        raise FileNotFoundError(f'no such checkpoint of the {ROLES[role]}: {weights} (looked at '
                                f'{Path(weights).absolute()})')
    return found


def spread(history: Sequence[Tuple[int, str]], most: int) -> List[Tuple[int, str]]:
    """At most so many of the checkpoints, evenly spread, the last one among them.

    Example:
        >>> [step for step, _ in spread([(step, '') for step in range(1, 11)], 4)]
        [1, 4, 7, 10]
    """
    if len(history) <= most or most < 2:
        return list(history)[-most:] if most else []
    return [history[round(index * (len(history) - 1) / (most - 1))] for index in range(most)]
