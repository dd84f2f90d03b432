"""Where a teacher comes from, besides a config of the host with its checkpoint.

========================================  =============================================================================
``teacher=``                              the teacher
========================================  =============================================================================
path, ``'mmdet::...'``, config dict       a model of the host (:mod:`kd_mm.teachers.base`)
``'student'``                             another copy of the student, with the weights of ``teacher_ckpt`` (born again)
``'self'``                                the student's own pass, at the taps ``teacher_at`` (no second model)
``dict(type='EMATeacher', ...)``          the running average of the student (mean teacher)
``dict(type='PeerTeacher', ...)``         a second student, trained in the same run (:mod:`kd_mm.teachers.peer`)
``dict(type='package.Class', ...)``       any class or function that gives an ``nn.Module``
========================================  =============================================================================
"""

import copy
from typing import Any, Dict, List, Optional, Sequence

from torch import nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.weights import load_weights
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.registry import accepted_arguments
from kd_mm.teachers.base import RANDOM, Teacher
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.peer import PeerTeacher
from kd_mm.teachers.plain import build_plain

SELF = 'self'
STUDENT = 'student'
_HOSTS = ('mmdet', 'mmseg', 'mmengine', 'mmcv', 'mmpretrain')


def build_copy(student: nn.Module, checkpoint: Optional[str], strict: bool, seed: int,
               classes: Optional[Sequence[str]]) -> Teacher:
    """Another copy of the student with weights of its own.

    Raises:
        ValueError: no weights are named, or they do not fit.
    """
    if checkpoint is None:
        raise ValueError("teacher='student' needs the weights of an earlier training: teacher_ckpt='path'")
    model: Any = copy.deepcopy(student)
    notes: List[str] = []
    if checkpoint == RANDOM:
        with preserved_random_state(seed):
            for module in model.modules():
                if hasattr(module, '_is_init'):
                    module._is_init = False
            if hasattr(model, 'init_weights'):
                model.init_weights()
    else:
        notes = load_weights(model, ckpt.load(checkpoint), checkpoint, strict)
    teacher = Teacher(model, student, 'copy of the student', list(classes) if classes else None)
    teacher.notes += [f'teacher checkpoint {checkpoint} {note}' for note in notes]
    return teacher


def build_teacher(source: Any, student: nn.Module, checkpoint: Optional[str], strict: bool, scope: Optional[str],
                  seed: int, classes: Optional[Sequence[str]]) -> Teacher:
    """One teacher from any of the sources of this module but ``'self'``."""
    if isinstance(source, str) and source == STUDENT:
        return build_copy(student, checkpoint, strict, seed, classes)
    kind = source.get('type') if hasattr(source, 'get') and 'model' not in source else None
    ours = kind.removeprefix('kd_mm.') if isinstance(kind, str) else ''
    if ours in ('EMATeacher', 'PeerTeacher'):
        arguments = {key: value for key, value in source.items() if key != 'type'}
        known = ['config', 'optim_wrapper'] if ours == 'PeerTeacher' else [
            name for name in accepted_arguments(EMATeacher) if name not in ('student', 'classes')]
        wrong = sorted(set(arguments) - set(known))
        if wrong or (ours == 'PeerTeacher' and 'config' not in arguments):
            fault = f'has no argument {wrong[0]!r}' if wrong else 'needs `config`'
            raise ValueError(f'{ours} {fault}; it takes {", ".join(known)}')
        if ours == 'PeerTeacher':
            return PeerTeacher.create(arguments['config'], student, checkpoint, strict, scope, seed,
                                      arguments.get('optim_wrapper'))
        return EMATeacher(student, classes=list(classes) if classes else None, **arguments)
    if isinstance(kind, str) and '.' in kind and kind.split('.')[0] not in _HOSTS:
        return build_plain(dict(source), student, checkpoint, strict, seed)
    return Teacher.build(source, student, checkpoint, strict, scope, seed)


def build_teachers(student: nn.Module, teacher: Any, checkpoint: Optional[str], strict: bool, teachers: Any,
                   problems: Problems, scope: Optional[str] = None, seed: int = 0,
                   classes: Optional[Sequence[str]] = None) -> Dict[str, Teacher]:
    """All teachers of a config by name; what is wrong goes to ``problems``.

    ``teacher='self'`` needs none.
    """
    if teachers is None:
        entries: Dict[str, Any] = {'teacher': dict(teacher=teacher, teacher_ckpt=checkpoint, teacher_strict=strict)}
    elif teacher is not None:
        problems.add('give either `teacher` or `teachers`, not both')
        return {}
    elif not hasattr(teachers, 'items') or not teachers or any(not hasattr(e, 'get') for e in teachers.values()):
        problems.add(f'teachers={teachers!r}: give a dict, teachers=dict(name=dict(teacher=..., teacher_ckpt=...))')
        return {}
    else:
        entries = dict(teachers)
    built: Dict[str, Teacher] = {}
    for name, entry in entries.items():
        where = '' if teachers is None else f'teachers[{name!r}]: '
        wrong = sorted(set(entry) - {'teacher', 'teacher_ckpt', 'teacher_strict'})
        if wrong or name in (SELF, STUDENT):
            problems.add(f'{where}unknown key {wrong[0]!r}; known are teacher, teacher_ckpt, teacher_strict' if wrong
                         else f'{where}choose another name')
            continue
        source = entry.get('teacher')
        if isinstance(source, str) and source == SELF:
            if teachers is not None:
                problems.add(f"{where}the student itself is always there; losses name it with teacher='self'")
            continue
        try:
            built[name] = build_teacher(source, student, entry.get('teacher_ckpt'), entry.get('teacher_strict', True),
                                        scope, seed, classes)
        except (KeyError, ValueError, FileNotFoundError) as error:
            problems.add(ValueError(f'{where}{error.args[0]}') if where and isinstance(error, (KeyError, ValueError))
                         else error)
    return built
