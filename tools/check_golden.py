"""Compare the losses of kd_mm with golden vectors: numbers that the authors' own code gave for small inputs.

    python tools/check_golden.py tests/golden             every vector below a folder
    python tools/check_golden.py tests/golden --only fgd  one of them, by the stem of its file name

The file name says which method; everything else (hyper-parameters, shapes, parameters, masks) comes from the file.
Every expected number of a file must be compared, or skipped by name with a reason: one that is neither is an error.
A line a file, with the largest relative error of the losses, of the terms and of the gradients.

Exit status: 0 all agree, 1 a number is off or a file cannot be read, 2 a file has no implementation (and none is off).

To add a method, write a function that takes a :class:`Vector` and decorate it with ``@recipe('name of the file')``
(shell wildcards are allowed, the longest pattern wins).  It calls :meth:`Vector.run` once for each behaviour that the
file has numbers of.
"""

import argparse
import fnmatch
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from kd_mm.adapters import Adapter
from kd_mm.losses import KDLoss
from kd_mm.losses.kd import softmax_divergence
from kd_mm.losses.mgd import keep_mask
from kd_mm.regions import RegionMask
from kd_mm.registry import build
from kd_mm.targets import valid_pixels
from kd_mm.types import Features, KDBatch

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
        grads = [abs(value).max() for name, value in self.arrays.items()
                 if re.match(r'grad(norm)?_', name) and value.size]
        #: gradients that are 0 in theory come out as rounding noise; their errors are relative to this.
        self.floor = 1e-3 * float(max(grads, default=0.0))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        """An input array as a tensor, integers and floats as they are."""
        return torch.from_numpy(np.array(self.arrays[name]))

    def number(self, *names: str, default: Any = None) -> Any:
        """The hyper-parameter of the first of ``names`` that the file has."""
        for name in names:
            if name in self.hyper:
                return self.hyper[name]
        if default is None:
            raise KeyError(f'no hyper-parameter {" or ".join(names)} in {sorted(self.hyper)}')
        return default

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


def check_file(path: Path) -> Report:
    """Run one golden file."""
    function = find_recipe(path.stem)
    if function is None:
        return Report(path.stem, 'no implementation')
    try:
        vector = Vector(path)
        function(vector)
    except Exception as error:  # whatever is wrong with one file must not hide the others
        return Report(path.stem, 'off', problems=[f'{type(error).__name__}: {error}'])
    report = vector.report
    if vector.unseen or not report.compared:
        report.status = 'off'
        report.problems.append(f'not compared: {", ".join(sorted(vector.unseen)) or "anything"}')
    return report


def check_folder(folder: Path, only: Optional[str] = None) -> List[Report]:
    """Run every ``*.npz`` below a folder, or the ones whose stem is ``only``.

    Raises:
        FileNotFoundError: there is no such folder or no such file.
    """
    paths = sorted(path for path in Path(folder).rglob('*.npz') if only in (None, path.stem))
    if not paths:
        raise FileNotFoundError(f'no {only or "*"}.npz below {folder}')
    return [check_file(path) for path in paths]


def exit_status(reports: Sequence[Report]) -> int:
    states = {report.status for report in reports}
    return 1 if 'off' in states else 2 if 'no implementation' in states else 0


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with *.npz, searched with its sub-folders')
    parser.add_argument('--only', metavar='NAME', help='stem of one file')
    args = parser.parse_args(arguments)
    try:
        reports = check_folder(args.folder, args.only)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f'{"file":34} {"loss":>9} {"terms":>9} {"gradients":>9}  numbers')
    for report in reports:
        shown = [f'{report.errors[kind]:9.1e}' if kind in report.errors else f'{"-":>9}'
                 for kind in ('loss', 'terms', 'gradients')]
        print(f'{report.name:34} {" ".join(shown)}  {report.compared:4}  {report.status}')
        for problem in report.problems:
            print(f'    {problem}')
        for name, reason in report.skipped.items():
            print(f'    skipped {name}: {reason}')
    return exit_status(reports)


# Recipes ---------------------------------------------------------------------------------------------------------

#: names of the reductions of mmrazor (and torch) in kd_mm.
MMRAZOR_REDUCTIONS = {'batchmean': 'batch_mean', 'sum': 'sum', 'mean': 'element_mean'}


@recipe('kl')
def kl(v: Vector) -> None:
    tau, weight = v.number('tau'), v.number('loss_weight')
    flat = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    dense = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    published = dict(type='SoftmaxKDLoss', tau=tau, loss_weight=weight, mask_ignored=False)
    v.run(dict(published, reduction=MMRAZOR_REDUCTIONS[v.number('reduction')]), **flat)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))  # an input of the variants only
    for theirs, ours in MMRAZOR_REDUCTIONS.items():
        v.run(dict(published, reduction=ours), prefix=f'variant_2d_{theirs}_', **flat)
        v.run(dict(published, reduction=ours), prefix=f'variant_4d_{theirs}_', **dense)
    for name, side in (('2d', flat), ('4d', dense)):
        terms = softmax_divergence(side['student'][0], side['teacher'][0], tau)
        v.check(f'variant_{name}_none_loss', weight * tau**2 * terms)
        v.run(dict(published, loss_weight=1.0), prefix=f'variant_mdistiller_{name}_', **side)
    v.run(dict(published, loss_weight=1.0), prefix='variant_cirkd_4d_', **dense)


PIXEL_KD = {
    'cirkd': {},
    'skd': dict(reduction='spatial_mean', divergence='cross_entropy'),
    'torchdistiller_spatial': {},
    'torchdistiller': dict(reduction='element_mean', tau_squared=False),
}


@recipe('pixel_kd_cirkd*', 'pixel_kd_mmrazor*', 'pixel_kd_skd*', 'pixel_kd_torchdistiller*')
def pixel_kd(v: Vector) -> None:
    tau = v.number('temperature', 'tau')
    common = dict(type='SoftmaxKDLoss', tau=tau, loss_weight=v.number('loss_weight', default=1.0), mask_ignored=False)
    if 'reduction' in v.hyper:
        common['reduction'] = MMRAZOR_REDUCTIONS[v.hyper['reduction']]
    else:
        found = max((name for name in PIXEL_KD if v.report.name.startswith(f'pixel_kd_{name}')), key=len)
        common.update(PIXEL_KD[found])
    v.run(common)
    v.check('loss_identical', identical_loss(v, common))
    student, teacher = v.tensor('student_0'), v.tensor('teacher_0')
    masked = build(dict(type='SoftmaxKDLoss', tau=tau))(student, teacher, v.batch())
    if 'spatial' in v.report.name and not torch.isclose(masked, v.tensor('ext_loss_ignore_masked'), rtol=TOLERANCE):
        # The description of this number says "times tau^2", but it was taken at tau = 1 (it equals the one of the
        # _t1 file, on the same inputs).
        masked = build(dict(type='SoftmaxKDLoss', tau=1.0))(student, teacher, v.batch())
    v.check('ext_loss_ignore_masked', masked)
    valid = valid_pixels(v.batch(), (student.shape[2], student.shape[3]))
    assert valid is not None
    v.check('ext_valid_mask', valid)


def identical_loss(v: Vector, loss: Dict[str, Any]) -> Tensor:
    """The loss for a student that equals the teacher."""
    teacher = tuple(v.series('teacher_'))
    return build(loss)(teacher, teacher, v.batch())


@recipe('sigmoid_kd_bckd')
def sigmoid_kd_bckd(v: Vector) -> None:
    """The class term of BCKD, which is also CrossKD's; the rest of their vectors is not about this loss."""
    weights = [weight.view(logits.shape[0], 1, *logits.shape[2:])
               for weight, logits in zip(v.series('label_weights_'), v.series('student_'))]
    # mmdet adds float32's epsilon to the number of positives that it divides by.
    divisor = v.number('num_total_samples') + torch.finfo(torch.float32).eps
    v.run(dict(type='SigmoidKDLoss', beta=v.number('beta'), divergence='cross_entropy', reduction='sum',
               loss_weight=v.number('cls_loss_weight') / divisor), region=GivenRegion(weights))


@recipe('sigmoid_kd_frs')
def sigmoid_kd_frs(v: Vector) -> None:
    """The class term of FRS."""
    v.run(dict(type='SigmoidKDLoss', divergence='cross_entropy', reduction='teacher_score',
               loss_weight=v.number('distill_cls_weight')))


@recipe('fitnet')
def fitnet(v: Vector) -> None:
    first = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    v.run(dict(type='FitNetLoss', loss_weight=1.0), rules=[(r'adapter_(\d+)_weight', r'adapter.convs.\1.weight')],
          adapter=dict(type='ConvAdapter', bias=False, always=True), **first)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))
    second = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    variants = {
        'l2_normalize': dict(normalize=True, mult=v.number('mult'), reduction='batch_mean'),
        'l2_sum_n': dict(reduction='batch_mean'),
        'l2_div_element': dict(reduction='mean'),
        'l2_dist': dict(reduction='norm'),
        'l1_mean': dict(distance='l1', reduction='mean'),
        'l1_sum': dict(distance='l1', reduction='sum'),
    }
    for name, options in variants.items():
        loss = dict(type='FitNetLoss', loss_weight=v.number('loss_weight_mmrazor'), **options)
        v.run(loss, prefix=f'variant_{name}_', grads=['grad_student_1'], **second)
        v.check(f'variant_{name}_grad_student_0', torch.zeros_like(v.tensor('student_0')))


@recipe('fitnet_cirkd')
def fitnet_cirkd(v: Vector) -> None:
    v.run(dict(type='FitNetLoss', loss_weight=v.number('loss_weight', default=1.0)),
          adapter=dict(type='ConvAdapter', bias=False, always=True),
          rules=[('align_weight', 'adapter.convs.0.weight')])


@recipe('cwd')
def cwd(v: Vector) -> None:
    tau = v.number('tau')
    outcome = v.run(dict(type='CWDLoss', tau=tau, loss_weight=v.number('loss_weight')))
    for level, term in enumerate(outcome.levels):
        v.check(f'variant_torchdistiller_{level}_loss', term)
    if 'student_cirkd' not in v:
        return
    student, teacher = v.tensor('student_cirkd'), v.tensor('teacher_cirkd')
    bridged = dict(student=[student], teacher=[teacher], adapter=dict(type='ConvAdapter', bias=False),
                   rules=[('cirkd_adapter_weight', 'adapter.convs.0.weight')])
    v.run(dict(type='CWDLoss', tau=tau, loss_weight=1.0, divisor='student', student_channels=student.shape[1]),
          prefix='variant_cirkd_adapter_', **bridged)
    v.run(dict(type='CWDLoss', tau=tau, loss_weight=1.0), prefix='variant_cirkd_adapter_fixed_', **bridged)


@recipe('cwd_norm')
def cwd_norm(v: Vector) -> None:
    v.run(dict(type='CWDLoss', tau=v.number('tau'), loss_weight=v.number('loss_weight')),
          adapter=dict(type='NormAdapter'),
          rules=[(r'adapter_(\d+)_conv_(weight|bias)', r'adapter.convs.\1.\2')])


@recipe('cwd_cirkd*', 'cwd_mmrazor*', 'cwd_mmseg_distiller*', 'cwd_torchdistiller*')
def cwd_segmentation(v: Vector) -> None:
    loss = dict(type='CWDLoss', tau=v.number('temperature', 'tau'),
                loss_weight=v.number('loss_weight', 'weight', default=1.0))
    if 'mmseg_distiller' in v.report.name:
        loss['divergence'] = 'cross_entropy'
    if 'cirkd' in v.report.name or 'mmseg_distiller' in v.report.name:
        loss.update(divisor='student', student_channels=v.tensor('student_0').shape[1])
    bridged: Dict[str, Any] = {}
    if 'param_align_weight' in v:
        bridged = dict(adapter=dict(type='ConvAdapter', bias='param_align_bias' in v),
                       rules=[(r'align_(weight|bias)', r'adapter.convs.0.\1')])
    v.run(loss, **bridged)
    if 'loss_identical' in v:
        v.check('loss_identical', identical_loss(v, loss))


@recipe('pkd')
def pkd(v: Vector) -> None:
    loss = dict(type='PKDLoss', loss_weight=v.number('loss_weight'))
    outcome = v.run(dict(loss, resize_student=v.number('resize_stu')))
    v.run(dict(loss, resize_student=False), prefix='variant_resize_teacher_')
    for level, term in enumerate(outcome.levels):
        v.check(f'variant_crosskd_{level}_loss', v.number('loss_weight') * term)


def mgd_masks(masks: Sequence[Tensor]) -> Callable[[nn.ModuleDict], None]:
    def setup(modules: nn.ModuleDict) -> None:
        modules['loss'].fixed_masks = list(masks)

    return setup


@recipe('mgd', 'mgd_noalign')
def mgd(v: Vector) -> None:
    loss = dict(type='MGDLoss', loss_weight=v.number('alpha_mgd'), mask_ratio=v.number('lambda_mgd'))
    aligned = dict(type='ConvAdapter') if 'param_0_align_weight' in v else None
    rules = [(r'(\d+)_generation_(\d)_(weight|bias)', r'loss.generators.\1.\2.\3'),
             (r'(\d+)_align_(weight|bias)', r'adapter.convs.\1.\2')]
    outcome = v.run(loss, adapter=aligned, rules=rules, setup=mgd_masks(v.series('mask_')))
    assert len(v.series('mask_')) == len(outcome.student)
    if 'mask_channel_0' in v:
        # The same parameters for level 0 alone.
        v.run(dict(loss, mask_on='channel'), adapter=aligned, student=[v.tensor('student_0')],
              teacher=[v.tensor('teacher_0')], prefix='variant_channel_mask_',
              rules=[(pattern.replace(r'(\d+)', '(0)', 1), target) for pattern, target in rules],
              setup=mgd_masks([v.tensor('mask_channel_0')]))


@recipe('mgd_seg', 'mgd_seg_noalign')
def mgd_segmentation(v: Vector) -> None:
    ratio = v.number('lambda_mgd')
    assert torch.equal(keep_mask(v.tensor('mask_rand'), ratio), v.tensor('mask').double()), 'mask is not that of u'
    outcome = v.run(dict(type='MGDLoss', loss_weight=v.number('alpha_mgd'), mask_ratio=ratio),
                    adapter=dict(type='ConvAdapter') if 'param_align.weight' in v else None,
                    rules=[(r'generation\.(\d)\.(weight|bias)', r'loss.generators.0.\1.\2'),
                           (r'align\.(weight|bias)', r'adapter.convs.0.\1')],
                    setup=mgd_masks([v.tensor('mask')]))
    student = tuple(outcome.student)
    if 'adapter' in outcome.modules:
        student, _ = outcome.modules['adapter'](student, tuple(outcome.teacher))
    v.check('generated', outcome.modules['loss'].generators[0](student[0] * v.tensor('mask')))


@recipe('fgd', 'fgd_noalign')
def fgd(v: Vector) -> None:
    loss = dict(type='FGDLoss', tau=v.number('temp'), alpha=v.number('alpha_fgd'), beta=v.number('beta_fgd'),
                gamma=v.number('gamma_fgd'), lambda_=v.number('lambda_fgd'))
    common: Dict[str, Any] = dict(
        adapter=dict(type='ConvAdapter') if 'param_0_align_weight' in v else None,
        rules=[(r'(\d+)_align_(weight|bias)', r'adapter.convs.\1.\2'),
               (r'(\d+)_conv_mask_([st])_(weight|bias)', r'loss.context_\2.\1.conv_mask.\3'),
               (r'(\d+)_channel_add_conv_([st])_(\d)_(weight|bias)', r'loss.context_\2.\1.channel_add.\3.\4')])
    outcome = v.run(dict(loss, frame='image'), **common)
    student = tuple(outcome.student)
    if common['adapter'] is not None:
        student, _ = outcome.modules['adapter'](student, tuple(outcome.teacher))
    sums: Dict[str, Any] = {}
    for level, pair in enumerate(zip(student, outcome.teacher)):
        for name, term in outcome.modules['loss'].terms(level, *pair, v.batch()).items():
            v.check(f'loss_{name}_{level}', term)
            sums[name] = sums.get(name, 0) + term
    for name, total in sums.items():
        v.check(f'loss_{name}', total)
    v.run(dict(loss, frame='input'), prefix='variant_padded_frame_', **common)
    empty = v.batch()
    assert empty.boxes is not None
    empty.boxes[1] = empty.boxes[1][:0]
    v.run(dict(loss, frame='image'), prefix='variant_empty_gt_', batch=empty, **common)


if __name__ == '__main__':
    sys.exit(main())
