"""Any ``nn.Module`` as a teacher."""

import difflib
import importlib
from typing import Any, Dict, Mapping, Optional

import torch
from torch import nn

from kd_mm.ops.checks import entries, number, one_of, pair, positive
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.preprocess import Normalisation
from kd_mm.teachers.spec import TeacherSpec

_PREPROCESS = ('mean', 'std', 'channels', 'pad_value', 'size')


class PlainTeacher(Teacher):
    """Any ``nn.Module`` that takes a batch of images, for example a self-supervised backbone.

    Args:
        model: the network; it is called as ``model(images)``.
        student: the student, whose data preprocessor made the batches.
        name: for messages.
        preprocess: what it expects: ``mean`` and ``std`` (3 numbers, in units of 0..255; default: those of the student
            are kept), ``channels`` (``'rgb'`` or ``'bgr'``, default ``'rgb'``), ``pad_value`` (0), ``size`` ((H, W) to
            which the batch is resized; default: as it is). None feeds it the student's own batch.
        input_key: see :meth:`kd_mm.teachers.base.Teacher.look`.
    """

    def __init__(self, model: nn.Module, student: nn.Module, name: str, preprocess: Optional[Dict[str, Any]] = None,
                 input_key: Optional[str] = None):
        super().__init__(model, student, name, None, input_key)
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


def find(name: str) -> Any:
    """What a dotted name means: a class, a function, or a member of one: ``package.module.Class.from_name``.

    Raises:
        ValueError: nothing of that name, or it cannot be called.

    Example:
        >>> list(find('collections.OrderedDict.fromkeys')('ab'))
        ['a', 'b']
    """
    parts = name.split('.')
    for count in range(len(parts) - 1, 0, -1):
        module = '.'.join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            # Either there is no such module, and a shorter name may be one; or one that is there cannot be imported.
            absent = isinstance(error, ModuleNotFoundError) and f'{module}.'.startswith(f'{error.name}.')
            if absent and count > 1:
                continue
            raise ValueError(f'teacher type={name!r} cannot be imported: {error}. Install the package that has it, or '
                             'mend the name') from error
        for part in parts[count:]:
            if not hasattr(found, part):
                close = difflib.get_close_matches(part, dir(found), n=3)
                raise ValueError(f'teacher type={name!r} cannot be imported: {getattr(found, "__name__", found)} has '
                                 f'no {part!r}' + (f'. Did you mean {" or ".join(close)}?' if close else ''))
            found = getattr(found, part)
        if not callable(found):
            raise ValueError(f'teacher type={name!r} is no class, function or method, but {type(found).__name__}')
        return found
    raise ValueError(f'teacher type={name!r} has no package in front: write package.Class')


def build_plain(spec: TeacherSpec) -> PlainTeacher:
    """A teacher from ``dict(type='package.Class', preprocess=..., **arguments)``; a function or a method that gives an
    ``nn.Module`` does as well (``timm.create_model``, ``package.Class.from_name``).

    Raises:
        ValueError: no such class, or weights that do not fit or are not named.
    """
    arguments = dict(spec.source)
    name, preprocess = arguments.pop('type'), arguments.pop('preprocess', None)
    factory = find(name)
    if spec.checkpoint is None:
        raise ValueError(f"no weights for teacher {name}: give teacher_ckpt='path or URL', teacher_ckpt='own' if it "
                         "loads them itself (or teacher_ckpt='random' to test)")
    with spec.drawn():
        try:
            model = factory(**arguments)
        except TypeError as error:
            raise ValueError(f'teacher type={name!r} does not take {arguments}: {error}') from error
        if not isinstance(model, nn.Module):
            raise ValueError(f'teacher type={name!r} gives {type(model).__name__}, not an nn.Module')
    notes = spec.load(model)
    teacher = PlainTeacher(model, spec.student, name, preprocess, spec.input_key)
    teacher.notes += notes
    return teacher
