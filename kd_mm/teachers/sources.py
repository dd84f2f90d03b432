"""Where a teacher comes from, besides a config of the host with its checkpoint.

========================================  =============================================================================
``teacher=``                              the teacher
========================================  =============================================================================
path, ``'mmdet::...'``, config dict       a model of the host (:mod:`kd_mm.teachers.base`)
``'student'``                             another copy of the student, with the weights of ``teacher_ckpt`` (born again)
``'self'``                                the student's own pass, at the taps ``teacher_at`` (no second model)
``dict(type='EMATeacher', ...)``          the running average of the student (mean teacher)
``dict(type='PeerTeacher', ...)``         a second student, trained in the same run (:mod:`kd_mm.teachers.peer`)
``dict(type='timm', name=..., ...)``      a backbone of another package (:mod:`kd_mm.teachers.foundation`)
``dict(type='MySource', ...)``            a source that you registered yourself
``dict(type='package.Class', ...)``       any class or function that gives an ``nn.Module``
========================================  =============================================================================

A source of your own is a function (or class) that gets a :class:`~kd_mm.teachers.spec.TeacherSpec` and the other keys
of the config, and gives a :class:`~kd_mm.teachers.base.Teacher` or an ``nn.Module``::

    @TEACHERS.register_module()
    def Halves(spec, factor=0.5):
        model = copy.deepcopy(spec.student)
        ...
        return model

    teacher=dict(type='Halves', factor=0.25)     # with custom_imports=dict(imports=['my_package.halves'])
"""

import copy
import inspect
import os
import re
from typing import Any, Dict, Optional, Sequence

import torch
from torch import nn

from kd_mm.hosts.files import find, is_relative, places
from kd_mm.hosts.table import packages
from kd_mm.ops.classes import check_classes
from kd_mm.ops.problems import Problems
from kd_mm.registry import TEACHERS
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.foundation.hub_source import hub_backbone
from kd_mm.teachers.foundation.mmpretrain_source import mmpretrain_backbone
from kd_mm.teachers.foundation.timm_source import timm_backbone
from kd_mm.teachers.foundation.transformers_source import transformers_backbone
from kd_mm.teachers.peer import PeerTeacher
from kd_mm.teachers.plain import build_plain
from kd_mm.teachers.spec import OWN, RANDOM, TeacherSpec
from kd_mm.teachers.speed import AUTO, speed_of

SELF = 'self'
STUDENT = 'student'
_KEYS = ('teacher', 'teacher_ckpt', 'teacher_strict', 'speed', 'view', 'input_key', 'classes')
#: Packages besides the hosts whose classes are built from a config of the host.
_BUILT = ('mmengine', 'mmcv', 'mmpretrain')


def build_copy(spec: TeacherSpec) -> Teacher:
    """Another copy of the student with weights of its own.

    Raises:
        ValueError: no weights are named, or they do not fit.
    """
    if spec.checkpoint is None:
        raise ValueError("teacher='student' needs the weights of an earlier training: teacher_ckpt='path'")
    model: Any = copy.deepcopy(spec.student)
    if not spec.wants_file:
        with spec.drawn():
            for module in model.modules():
                if hasattr(module, '_is_init'):
                    module._is_init = False
            if hasattr(model, 'init_weights'):
                model.init_weights()
    notes = spec.load(model)
    teacher = Teacher(model, spec.student, 'copy of the student', spec.class_names)
    teacher.notes += notes
    return teacher


@TEACHERS.register_module(name='EMATeacher')
def running_average(spec: TeacherSpec, momentum: Any = 0.001, share: bool = True) -> Teacher:
    """The running average of the student, see :class:`kd_mm.teachers.ema.EMATeacher`."""
    return EMATeacher(spec.student, momentum, share, spec.class_names)


@TEACHERS.register_module(name='PeerTeacher')
def second_student(spec: TeacherSpec, config: Any, optim_wrapper: Any = None) -> Teacher:
    """A second student, see :class:`kd_mm.teachers.peer.PeerTeacher`."""
    return PeerTeacher.create(spec, config, optim_wrapper)


for _kind, _source in (('timm', timm_backbone), ('transformers', transformers_backbone), ('torch.hub', hub_backbone),
                       ('mmpretrain', mmpretrain_backbone)):
    TEACHERS.register_module(name=_kind, module=_source)


def from_registry(factory: Any, spec: TeacherSpec) -> Teacher:
    """What a registered source makes of a spec and of the other keys of ``teacher=dict(type=..., ...)``.

    Raises:
        ValueError: a key that it does not take, one that is missing, or a result that is no teacher.
    """
    kind = spec.source['type']
    name = kind.removeprefix('kd_mm.') if isinstance(kind, str) else kind.__name__
    arguments = {key: value for key, value in spec.source.items() if key != 'type'}
    parameters = list(inspect.signature(factory).parameters.values())[1:]  # the first takes the spec
    known = [parameter.name for parameter in parameters]
    wrong = sorted(set(arguments) - set(known))
    missing = [parameter.name for parameter in parameters
               if parameter.default is parameter.empty and parameter.name not in arguments]
    if wrong or missing:
        fault = f'has no argument {wrong[0]!r}' if wrong else f'needs `{missing[0]}`'
        raise ValueError(f'{name} {fault}; it takes {", ".join(known) or "no arguments"}')
    found = factory(spec, **arguments)
    if isinstance(found, nn.Module):
        found = Teacher(found, spec.student, name, spec.class_names)
    if not isinstance(found, Teacher):
        raise ValueError(f'{name} gives {type(found).__name__}: a source of teachers gives a '
                         'kd_mm.teachers.base.Teacher, or an nn.Module that is fed as its own data preprocessor says')
    return found


def build_teacher(spec: TeacherSpec) -> Teacher:
    """One teacher from any of the sources of this module but ``'self'``, in the form that the spec asks for."""
    teacher = _from_source(spec)
    teacher.look(spec.view, spec.input_key)
    teacher.go(spec.speed)
    return teacher


def _from_source(spec: TeacherSpec) -> Teacher:
    source = spec.source
    if isinstance(source, str) and source == STUDENT:
        return build_copy(spec)
    kind = source.get('type') if hasattr(source, 'get') and 'model' not in source else None
    if isinstance(kind, str):
        TEACHERS.import_from_location()
        factory = TEACHERS.module_dict.get(kind.removeprefix('kd_mm.'))
        if factory is not None:
            return from_registry(factory, spec)
        if '.' in kind and kind.split('.')[0] not in (*_BUILT, *packages()):
            return build_plain(spec)
    elif kind is not None and kind in TEACHERS.module_dict.values():
        return from_registry(kind, spec)
    return Teacher.from_spec(spec)


def build_teachers(student: nn.Module, teacher: Any, checkpoint: Optional[str], strict: bool, teachers: Any,
                   problems: Problems, scope: Optional[str] = None, seed: int = 0,
                   classes: Optional[Sequence[str]] = None, speed: Any = AUTO,
                   folder: Optional[str] = None, view: Any = None,
                   input_key: Optional[str] = None, class_map: Any = None) -> Dict[str, Teacher]:
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
    if all('speed' in entry or _is_self(entry) for entry in entries.values()):
        try:  # no teacher looks at it
            speed_of('kd_mm', speed, next(student.parameters(), torch.zeros(())).device)
        except ValueError as error:
            problems.add(error)
    for name, entry in entries.items():
        where = '' if teachers is None else f'teachers[{name!r}]: '
        wrong = sorted(set(entry) - set(_KEYS))
        if wrong or name in (SELF, STUDENT):
            problems.add(f'{where}unknown key {wrong[0]!r}; known are {", ".join(_KEYS)}' if wrong
                         else f'{where}choose another name')
            continue
        source = entry.get('teacher')
        if _is_self(entry):
            if teachers is not None:
                problems.add(f"{where}the student itself is always there; losses name it with teacher='self'")
            elif view is not None or input_key is not None:
                problems.add("teacher='self' is the student's own pass, on its own pictures: leave view and "
                             'input_key out')
            continue
        try:
            checkpoint = weights_file(entry.get('teacher_ckpt'), folder)
            built[name] = build_teacher(TeacherSpec(
                source, student, checkpoint, entry.get('teacher_strict', True), scope, seed, classes,
                entry.get('speed', speed), folder, entry.get('view', view), entry.get('input_key', input_key)))
            mapped = entry.get('classes', class_map)
            built[name].class_map = None if mapped is None else check_classes(f'teacher {name!r}', mapped)
            given = (_config_of(source), entry.get('teacher_ckpt'))
            built[name].files += [find(path, folder)[1] for path in given
                                  if is_relative(path) and path not in (STUDENT, RANDOM, OWN)]
        except Exception as error:  # the registry and the models raise anything
            problems.add(where + _in_words(error, source))
    return built


def _is_self(entry: Any) -> bool:
    source = entry.get('teacher')
    return isinstance(source, str) and source == SELF


def weights_file(path: Any, folder: Optional[str]) -> Any:
    """A checkpoint beside the config, where the current folder has none; everything else as it is.

    Raises:
        FileNotFoundError: neither has it.
    """
    if folder is None or not is_relative(path) or path in (RANDOM, OWN):
        return path
    found = find(path, folder)[0]
    if found is None:
        raise FileNotFoundError(f'no such checkpoint: {path} (looked at {" and ".join(places(path, folder))})')
    return path if os.path.exists(os.path.expanduser(path)) else found


def _config_of(source: Any) -> Any:
    """The path of a teacher's or peer's config, if it is given as one."""
    if hasattr(source, 'get'):
        return source.get('config') if 'model' not in source else None
    return source


def _in_words(error: Exception, source: Any) -> str:
    """What went wrong with a teacher, in a sentence that says that it is the teacher's."""
    text = str(error.args[0]) if error.args and isinstance(error, (KeyError, ValueError)) else str(error)
    # Ours say it already; a path with the word in it does not.
    if (isinstance(error, ValueError) and re.search(r'\b(teacher|peer|EMATeacher|PeerTeacher)', text)) or (
            isinstance(error, FileNotFoundError) and text.startswith('teacher ')):
        return text
    config: Any = _config_of(source) if hasattr(source, 'get') else None
    named = next((item for item in (source, config) if isinstance(item, (str, os.PathLike))), None)
    if named is None:
        content: Any = config if hasattr(config, 'get') else source if hasattr(source, 'get') else {}
        kind = (content.get('model') or content).get('type')
        named = f'of type {kind!r}' if kind else 'as it is given'
    kind_of_error = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    return f'teacher {named} cannot be built: {kind_of_error}{text}'
