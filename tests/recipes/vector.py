"""One file of golden numbers, and the bookkeeping of what was compared; recipes register themselves here."""

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from kd_mm.adapters.base import Adapter
from kd_mm.losses.base.loss import KDLoss
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.types.batch import Features, KDBatch

#: largest relative error that counts as agreement, in float64.
TOLERANCE = 1e-9

#: names of the arrays that hold results; all other arrays are inputs.
EXPECTED = re.compile(r'(loss|grad_|gradnorm_|variant_|ext_|fixed_|generated)')

Rules = Sequence[Tuple[str, str]]
Recipe = Callable[['Vector'], None]
RECIPES: Dict[str, Recipe] = {}


def recipe(*patterns: str) -> Callable[[Recipe], Recipe]:
    """Register a function as the check of the files whose stem matches one of ``patterns``."""

    def register(function: Recipe) -> Recipe:
        for pattern in patterns:
            RECIPES[pattern] = function
        return function

    return register


def find_recipe(stem: str) -> Optional[Recipe]:
    """The recipe of the longest pattern that matches a file's stem; None if there is none."""
    matching = [pattern for pattern in RECIPES if fnmatch.fnmatchcase(stem, pattern)]
    return RECIPES[max(matching, key=len)] if matching else None


@dataclass
class Outcome:
    """What one run of a loss gave: the loss, its level terms, gradients, and the modules with their gradients."""

    loss: Tensor
    levels: List[Tensor]
    grads: List[Tensor]
    modules: nn.ModuleDict
    student: List[Tensor]
    teacher: List[Tensor]


@dataclass
class Report:
    """The comparison of one file."""

    name: str
    status: str = 'ok'
    errors: Dict[str, float] = field(default_factory=dict)
    compared: int = 0
    problems: List[str] = field(default_factory=list)
    skipped: Dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


class GivenRegion(RegionMask):
    """Region weights that a file holds, one (N, 1, H, W) a level."""

    def __init__(self, masks: Sequence[Tensor]):
        super().__init__()
        self.masks = tuple(masks)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        return self.masks


class Vector:
    """One golden file, the bookkeeping of what was compared, and shortcuts for recipes."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {name: archive[name] for name in archive.files}
        self.meta = json.loads(str(self.arrays.pop('meta')))
        self.hyper: Dict[str, Any] = self.meta['hyper_parameters']
        self.report = Report(path.stem)
        self.unseen = {name for name in self.arrays if EXPECTED.match(name)}
        #: hyper-parameters and inputs that nobody has asked for yet; what is left at the end was not tested.
        self.unread = set(self.hyper) | (set(self.arrays) - self.unseen)
        grads = [abs(value).max() for name, value in self.arrays.items()
                 if re.match(r'grad(norm)?_', name) and value.size]
        #: gradients that are 0 in theory come out as rounding noise; their errors are relative to this.
        self.floor = 1e-3 * float(max(grads, default=0.0))
        for side, short in (('student', 's'), ('teacher', 't')):
            for name in (f'{side}_channels', f'{short}_channels'):
                if f'{side}_0' in self:
                    self.agree(name, self.arrays[f'{side}_0'].shape[1])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        """An input array as a tensor, integers and floats as they are."""
        self.unread.discard(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def number(self, *names: str, default: Any = None) -> Any:
        """The hyper-parameter of the first of ``names`` that the file has."""
        for name in names:
            if name in self.hyper:
                self.unread.discard(name)
                return self.hyper[name]
        if default is None:
            raise KeyError(f'no hyper-parameter {" or ".join(names)} in {sorted(self.hyper)}')
        return default

    def words(self, name: str, pattern: str) -> Tuple[str, ...]:
        """The groups of ``pattern`` in a hyper-parameter that is a text, such as 'GroupNorm groups=2'.

        Raises:
            ValueError: the whole text does not match: it says something that the recipe does not know.
        """
        text = str(self.number(name))
        found = re.fullmatch(pattern, text)
        if found is None:
            raise ValueError(f'{name} is {text!r}; the recipe can read {pattern!r}')
        return found.groups()

    def connector(self, name: str) -> Optional[Dict[str, Any]]:
        """The adapter that a text such as '3x3 conv pad 1 + ReLU' or 'conv1x1 (no bias) + BN, train mode' describes.

        Returns:
            Its config, or None for 'none'.  The convolution is there also where the channels agree.
        """
        text = str(self.number(name)).lower()
        if text == 'none':
            return None
        kernel = re.search(r'\b(?:conv)?([13])x\1\b', text)
        if kernel is None:
            raise ValueError(f'{name} is {text!r}; the recipe can read one convolution, 1x1 or 3x3')
        return dict(type='ConvAdapter', kernel_size=int(kernel[1]), always=True, bias='no bias' not in text,
                    norm='+ bn' in text, relu='+ relu' in text)

    def as_maps(self, *patterns: str) -> None:
        """Two more axes for arrays of rows and for weights of linear layers, by shell patterns: maps of one cell, and
        weights of 1x1 convolutions."""
        for name, value in self.arrays.items():
            if value.ndim == 2 and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                self.arrays[name] = value[:, :, None, None]

    def only(self, name: str, *values: Any) -> None:
        """A hyper-parameter for which our code has these values and no others; a file need not have it.

        Raises:
            ValueError: the file has another value.
        """
        if name in self.hyper and self.number(name) not in values:
            raise ValueError(f'{name} is {self.hyper[name]!r}; only {", ".join(map(repr, values))} is implemented')

    def agree(self, name: str, found: Any) -> None:
        """A hyper-parameter that the arrays say as well; a file need not have it.

        Raises:
            ValueError: the two differ.
        """
        if name not in self.hyper:
            return
        if np.shape(self.number(name)) != np.shape(found) or not np.allclose(self.hyper[name], found, atol=0):
            raise ValueError(f'{name} is {self.hyper[name]!r}, and the arrays say {found!r}')

    def ignore(self, reason: str, *patterns: str) -> None:
        """Hyper-parameters and inputs, by shell patterns, on which no number of the file depends."""
        for name in sorted(self.unread):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                self.unread.discard(name)
                self.report.skipped[name] = reason

    def series(self, prefix: str) -> List[Tensor]:
        """The inputs ``<prefix>0``, ``<prefix>1``, ... as far as they go."""
        found: List[Tensor] = []
        while f'{prefix}{len(found)}' in self:
            found.append(self.tensor(f'{prefix}{len(found)}'))
        return found

    def batch(self) -> KDBatch:
        """Targets of the file."""
        boxes = self.series('gt_bboxes_')
        shapes = [(int(shape[0]), int(shape[1])) for shape in self.series('img_shape_')]
        frame = self.tensor('batch_input_shape').tolist() if 'batch_input_shape' in self else None
        return KDBatch(
            input_shape=None if frame is None else (frame[0], frame[1]),
            boxes=boxes or None,
            img_shapes=shapes or None,
            seg_map=self.tensor('gt_seg_map') if 'gt_seg_map' in self else None)

    def check(self, name: str, value: Any) -> None:
        """Compare a number or an array with the one called ``name``; nothing happens if the file has no such."""
        if name not in self:
            return
        wanted = np.asarray(self.arrays[name], dtype=np.float64)
        got = value.detach().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
        self.unseen.discard(name)
        self.unread.discard(name)
        self.report.compared += 1
        kind = 'gradients' if 'grad' in name else 'loss' if name == 'loss' else 'terms'
        if wanted.shape != got.shape:
            error = float('inf')
        elif not wanted.size:
            error = 0.0
        else:
            # loss_identical is 0 in theory: its errors are relative to the loss itself.
            floor = self.floor if kind == 'gradients' else float(abs(self.arrays['loss']).max()) * (
                1.0 if name == 'loss_identical' else 0.0)
            scale = max(float(abs(wanted).max()), floor, 1e-300)
            error = float(abs(wanted - got).max()) / scale
        self.report.errors[kind] = max(self.report.errors.get(kind, 0.0), error if error == error else float('inf'))
        if not error <= TOLERANCE:  # this way round NaN is off as well
            self.report.status = 'off'
            self.report.problems.append(f'{name}: relative error {error:.2e}')

    def skip(self, pattern: str, reason: str) -> None:
        """Leave out the expected arrays that match a shell pattern, for a reason that is printed."""
        for name in sorted(self.unseen):
            if fnmatch.fnmatchcase(name, pattern):
                self.unseen.discard(name)
                self.report.skipped[name] = reason

    def run(self, loss: Dict[str, Any], *, student: Optional[List[Tensor]] = None,
            teacher: Optional[List[Tensor]] = None, adapter: Optional[Dict[str, Any]] = None,
            region: Optional[RegionMask] = None, batch: Optional[KDBatch] = None, rules: Rules = (),
            setup: Optional[Callable[[nn.ModuleDict], None]] = None, prefix: str = '',
            grads: Optional[Sequence[str]] = None) -> Outcome:
        """Build loss and adapter by their registered names, run them on the file's inputs and compare.

        Args:
            loss: config of the loss.
            student: inputs; all ``student_<i>`` when None.
            teacher: inputs; all ``teacher_<i>`` when None.
            adapter: config of the adapter.
            region: where to imitate, such as a :class:`GivenRegion`.
            batch: targets; those of the file when None.
            rules: pairs (regular expression, replacement) that turn the name of a ``param_*`` array, without
                ``param_``, into the name of a parameter of ``modules`` (``loss.`` or ``adapter.`` in front). The last
                rule that matches counts. Parameters that are set get their gradients compared.
            setup: called with the modules before the run.
            prefix: of the names to compare, such as ``'variant_sum_'``.
            grads: names of the student gradients without prefix, one an input; ``grad_student_<i>`` when None.
        """
        student = [s.clone().requires_grad_() for s in (self.series('student_') if student is None else student)]
        teacher = self.series('teacher_') if teacher is None else teacher
        modules = nn.ModuleDict({'loss': build(loss, KDLoss, 'loss')})
        if adapter is not None:
            modules['adapter'] = build(adapter, Adapter, 'adapter')
        bridge, method = modules['adapter'] if adapter is not None else None, modules['loss']
        adapted = bridge(tuple(student), tuple(teacher)) if bridge is not None else (tuple(student), tuple(teacher))
        assert isinstance(method, KDLoss)
        method.prepare(*adapted)
        loaded = self._load(modules, rules)
        if setup is not None:
            setup(modules)
        if bridge is not None:
            adapted = bridge(tuple(student), tuple(teacher))
        batch = self.batch() if batch is None else batch
        total = method(*adapted, batch, region)
        levels = method.per_level(*adapted, batch, region)
        wanted = [*student, *loaded.values()]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        derived = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found)]
        self.check(f'{prefix}loss', total)
        for level, (term, weight) in enumerate(zip(levels, method.weight.at(0, 0, len(levels)))):
            self.check(f'{prefix}loss_level_{level}', term * weight)
        names = [f'grad_student_{index}' for index in range(len(student))] if grads is None else grads
        for name, grad in zip(names, derived):
            self.check(f'{prefix}{name}', grad)
        for name, grad in zip(loaded, derived[len(student):]):
            self.check(f'{prefix}grad_param_{name}', grad)
            self.check(f'{prefix}gradnorm_param_{name}', grad.norm())
        return Outcome(total, levels, derived[:len(student)], modules, student, teacher)

    def _load(self, modules: nn.ModuleDict, rules: Rules) -> Dict[str, nn.Parameter]:
        parameters, loaded = dict(modules.named_parameters()), {}
        for name in [name[len('param_'):] for name in self.arrays if name.startswith('param_')]:
            for pattern, replacement in rules:
                if re.fullmatch(pattern, name):
                    target = parameters[re.sub(pattern, replacement, name)]
                    value = self.tensor(f'param_{name}')
                    if target.shape != value.shape:
                        raise ValueError(f'param_{name} is {tuple(value.shape)}, ours {tuple(target.shape)}')
                    target.data = value.clone()
                    loaded[name] = target
        if rules and len(loaded) != len(parameters):
            raise ValueError(f'the file sets {len(loaded)} of {len(parameters)} parameters: {sorted(parameters)}')
        return loaded


def identical_loss(v: Vector, loss: Dict[str, Any]) -> Tensor:
    """The loss for a student that equals the teacher."""
    teacher = tuple(v.series('teacher_'))
    return build(loss)(teacher, teacher, v.batch())


def identity_check(v: Vector, loss: Dict[str, Any]) -> None:
    """Compare the loss for a student that equals the teacher with that of the file's ``meta``, if it has one."""
    wanted = v.meta.get('identity_check', {}).get('loss(student==teacher)')
    if wanted is not None:
        scale = float(abs(v.arrays['loss']).max())
        found = float(identical_loss(v, loss))
        if not abs(found - wanted) <= TOLERANCE * scale:
            v.report.status = 'off'
            v.report.problems.append(f'loss of equal inputs: {found:.3e} instead of {wanted:.3e}')
