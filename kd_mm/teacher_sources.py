"""Where a teacher comes from, besides a config of the host with its checkpoint.

========================================  =============================================================================
``teacher=``                              the teacher
========================================  =============================================================================
path, ``'mmdet::...'``, config dict       a model of the host (:mod:`kd_mm.teacher`)
``'student'``                             another copy of the student, with the weights of ``teacher_ckpt`` (born again)
``'self'``                                the student's own pass, at the taps ``teacher_at`` (no second model)
``dict(type='EMATeacher', ...)``          the running average of the student (mean teacher)
``dict(type='PeerTeacher', ...)``         a second student, trained in the same run (:mod:`kd_mm.peer`)
``dict(type='package.Class', ...)``       any class or function that gives an ``nn.Module``
========================================  =============================================================================
"""

import copy
import importlib
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

from kd_mm import checkpoint as ckpt
from kd_mm.checks import boolean, entries, number, one_of, pair, positive
from kd_mm.modes import preserved_random_state
from kd_mm.peer import PeerTeacher
from kd_mm.problems import Problems
from kd_mm.registry import accepted_arguments
from kd_mm.schedules import Weight
from kd_mm.teacher import RANDOM, Normalisation, Teacher, load_weights

SELF = 'self'
STUDENT = 'student'
#: ``teacher_ckpt`` of a class that loads its weights itself.
OWN = 'own'
_HOSTS = ('mmdet', 'mmseg', 'mmengine', 'mmcv', 'mmpretrain')
_PREPROCESS = ('mean', 'std', 'channels', 'pad_value', 'size')


class EMATeacher(Teacher):
    """The exponential moving average of the student (Tarvainen & Valpola, Mean teachers are better role models,
    NeurIPS 2017).

    After every step ``theta_t <- (1 - m) * theta_t + m * theta_s`` for parameters; buffers (batch statistics) are
    copied.  It starts as the student, is kept under the checkpoint's side key, and is restored on a resume.  When the
    config has an ``EMAHook``, whose average is what will be validated, that one is used and no second average is kept.

    Args:
        momentum: m, in (0, 1]: a number or a schedule by iteration (:class:`kd_mm.schedules.Weight`). Default 0.001
            (the 0.999 of the paper's longer phase).
        share: use the average of the config's ``EMAHook`` when there is one (its momentum counts then). Default True.
    """

    def __init__(self, student: nn.Module, momentum: Any = 0.001, share: bool = True,
                 classes: Optional[List[str]] = None):
        super().__init__(copy.deepcopy(student), student, 'EMA of the student', classes)
        self.momentum = Weight(momentum, 'momentum', 'EMATeacher', partial(positive, high=1))
        self.momentum.check(1)
        self.share, self.shared = boolean('EMATeacher', 'share', share), False
        self._student = [student]  # in a list: no part of the teacher

    def use(self, average: nn.Module) -> None:
        """Share the tensors of an average that someone else updates."""
        theirs: Dict[str, Tensor] = {**dict(average.named_parameters()), **dict(average.named_buffers())}
        own: Dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in own.items():
            tensor.data = theirs[name].data
        self.shared = True

    def start(self, resumed: bool) -> None:
        if not resumed and not self.shared:
            self._blend(1.0)

    def after_step(self, step: int, max_steps: int) -> None:
        if not self.shared:
            self._blend(self.momentum.at(step, max_steps, 1)[0])

    @torch.no_grad()
    def _blend(self, momentum: float) -> None:
        student = self._student[0]
        for mean, value in zip(self.model.parameters(), student.parameters()):
            mean.lerp_(value.to(mean.dtype), momentum)
        for own, theirs in zip(self.model.buffers(), student.buffers()):
            own.copy_(theirs)

    def state(self) -> Dict[str, Tensor]:
        return {} if self.shared else dict(self.model.state_dict())

    def load(self, state: Dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class PlainTeacher(Teacher):
    """Any ``nn.Module`` that takes a batch of images, for example a self-supervised backbone.

    Args:
        model: the network; it is called as ``model(images)``.
        student: the student, whose data preprocessor made the batches.
        name: for messages.
        preprocess: what it expects: ``mean`` and ``std`` (3 numbers, in units of 0..255; default: those of the student
            are kept), ``channels`` (``'rgb'`` or ``'bgr'``, default ``'rgb'``), ``pad_value`` (0), ``size`` ((H, W) to
            which the batch is resized; default: as it is). None feeds it the student's own batch.
    """

    def __init__(self, model: nn.Module, student: nn.Module, name: str, preprocess: Optional[Dict[str, Any]] = None):
        super().__init__(model, student, name)
        if preprocess is None:
            self._to, self.same_input = self._from, self.channels[0] in (None, self.channels[1])
            return
        owner = f'teacher {name}'
        if not isinstance(preprocess, Mapping):
            raise ValueError(f'{owner}: preprocess={preprocess!r} is no dict; its keys are {", ".join(_PREPROCESS)}')
        wrong = sorted(set(preprocess) - set(_PREPROCESS))
        if wrong:
            raise ValueError(f'{owner}: preprocess has no {wrong[0]!r}; it takes {", ".join(_PREPROCESS)}')
        channels = one_of(owner, 'preprocess channels', preprocess.get('channels', 'rgb'), ('rgb', 'bgr'))
        expected = Normalisation(None)
        for part, check in (('mean', number), ('std', positive)):
            values = preprocess.get(part)
            setattr(expected, part, getattr(self._from, part) if values is None else torch.tensor(
                entries(owner, f'preprocess {part}', values, check)).reshape(-1, 1, 1))
        expected.swapped = channels == 'rgb'
        expected.pad_value = number(owner, 'preprocess pad_value', preprocess.get('pad_value', 0))
        self._to = expected.to(self._from.mean.device)
        self.same_input = self._same_input()
        size = preprocess.get('size')
        self.size = None if size is None else pair(owner, 'preprocess size', size)


def build_plain(cfg: Dict[str, Any], student: nn.Module, checkpoint: Optional[str], strict: bool,
                seed: int) -> PlainTeacher:
    """A teacher from ``dict(type='package.Class', preprocess=..., **arguments)``.

    Raises:
        ValueError: no such class, or weights that do not fit or are not named.
    """
    arguments = dict(cfg)
    name, preprocess = arguments.pop('type'), arguments.pop('preprocess', None)
    module, _, attribute = name.rpartition('.')
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'teacher type={name!r} cannot be imported: {error}') from error
    if checkpoint is None:
        raise ValueError(f"no weights for teacher {name}: give teacher_ckpt='path or URL', teacher_ckpt='own' if it "
                         "loads them itself (or teacher_ckpt='random' to test)")
    with preserved_random_state(seed):
        model = factory(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f'teacher type={name!r} gives {type(model).__name__}, not an nn.Module')
    notes: List[str] = []
    if checkpoint not in (RANDOM, OWN):
        notes = load_weights(model, ckpt.load(checkpoint), checkpoint, strict)
    teacher = PlainTeacher(model, student, name, preprocess)
    teacher.notes += [f'teacher checkpoint {checkpoint} {note}' for note in notes]
    return teacher


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
