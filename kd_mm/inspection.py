"""What the tools share: build a config's student, teacher and distiller without a Runner, data or downloads, and look.

``tools/check_config.py``, ``tools/list_taps.py`` and ``tools/profile.py`` are command lines over this module.
"""

import copy
import fnmatch
import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple
from urllib.parse import urlparse

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from kd_mm import checkpoint as ckpt
from kd_mm.distiller import Distiller
from kd_mm.engine.term import Term
from kd_mm.hooks.distill_hook import DistillHook
from kd_mm.modes import eval_mode, preserved_random_state
from kd_mm.problems import Problems
from kd_mm.registry import accepted_arguments
from kd_mm.synthetic import synthetic_batch
from kd_mm.taps import Tap, TokenSizeError
from kd_mm.teacher import (
    RANDOM,
    build_model,
    class_names,
    default_weights,
    forward_tensor,
    load_config,
)

HOSTS = ('mmdet', 'mmseg')
#: Steps of an epoch where the length of training is needed and only epochs are known: about COCO's at 16 images a
#: step.  No data set is opened.
ASSUMED_EPOCH = 7000

# ---------------------------------------------------------------------------------------------------- configs


def read_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """A config file (or an installed one, ``mmdet::...``) with the options of a command line applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is for no host of kd_mm, or has no model.
    """
    file = str(ckpt.zoo_config(path)) if '::' in path else os.path.expanduser(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f'no such config: {path} (looked at {os.path.abspath(file)})')
    cfg = Config.fromfile(file)
    cfg.merge_from_dict(options or {})
    if cfg.get('default_scope') not in HOSTS:
        raise ValueError(f'default_scope={cfg.get("default_scope")!r} in {path} is no host of kd_mm '
                         f'({", ".join(HOSTS)}); '
                         "inherit from a config of the host, such as 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'")
    if not cfg.get('model') or 'type' not in cfg.model:
        raise ValueError(f'{path} has no `model` with a `type`')
    return cfg


def hook_entries(cfg: Config) -> List[Dict[str, Any]]:
    """The entries of ``custom_hooks`` that are distillation hooks."""
    return [entry for entry in cfg.get('custom_hooks') or [] if hasattr(entry, 'get') and _type_name(entry) ==
            DistillHook.__name__]


def _type_name(entry: Any) -> str:
    """Class name of a hook entry, without its scope."""
    kind = entry.get('type') if hasattr(entry, 'get') else type(entry)
    return kind.split('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _hook_types(cfg: Config) -> List[str]:
    return [_type_name(entry) for entry in cfg.get('custom_hooks') or []]


def dropped_hooks(cfg: Config) -> List[str]:
    """Hooks that a list of ``custom_hooks`` took away from the config it inherits from, as sentences.

    mmengine merges dicts and replaces lists, so a child that writes ``custom_hooks`` to add one hook loses those of
    its base.  Every file of the ``_base_`` chain is looked at, except those that a host ships: what they leave out is
    left out on purpose.  Configs in the ``read_base()`` style are not followed.
    """
    final = _hook_types(cfg)
    sentences: List[str] = []

    def visit(file: str, own: List[str]) -> None:
        for base in _base_files(file):
            inherited = _hook_types(_read_quietly(base))
            lost = [name for name in inherited if name not in own and name not in final]
            if lost:
                sentences.append(f'custom_hooks of {_short(file)} replaces the list of {_short(base)} and drops '
                                 f'{", ".join(lost)}: a list replaces the base\'s list. Repeat those entries beside '
                                 'the distillation hook, unless they are unwanted')
            if not _is_installed(base):
                visit(base, inherited)

    if cfg.filename and not _is_installed(cfg.filename):
        visit(cfg.filename, final)
    return list(dict.fromkeys(sentences))


def _base_files(file: str) -> List[str]:
    """Paths of the files that ``file`` names in ``_base_``."""
    if file.endswith('.py') and Config._is_lazy_import(file):
        return []
    names = [name for name in Config._get_base_files(file) if isinstance(name, str)]
    return [str(ckpt.zoo_config(name)) if '::' in name else os.path.join(os.path.dirname(file), name)
            for name in names]


def _read_quietly(file: str) -> Config:
    try:
        return Config.fromfile(file)
    except Exception:  # a fragment that is no config on its own has no hooks to lose
        return Config()


def _is_installed(file: str) -> bool:
    """Whether a host ships this file."""
    roots = [ckpt.package_folder(host) for host in HOSTS]
    return any(root is not None and root.resolve() in Path(file).resolve().parents for root in roots)


def _short(file: str) -> str:
    """A path for messages: below the ``configs`` folder of a host, else as it is seen from here."""
    for host in HOSTS:
        root = ckpt.package_folder(host)
        if root is not None and (root / 'configs').resolve() in Path(file).resolve().parents:
            return f'{host}::{Path(file).resolve().relative_to((root / "configs").resolve())}'
    relative = os.path.relpath(file)
    return file if relative.startswith('..') else relative


def training_length(cfg: Config) -> Tuple[int, bool]:
    """Steps of the whole training, and whether that is a guess (an epoch's length depends on the data set)."""
    loop = cfg.get('train_cfg') or {}
    if loop.get('max_iters'):
        return int(loop['max_iters']), False
    return int(loop.get('max_epochs') or 0) * ASSUMED_EPOCH, True


def unsupported(cfg: Config) -> List[str]:
    """Problems of the config that the hook would meet in the Runner, as sentences."""
    problems = []
    entries = hook_entries(cfg)
    if len(entries) > 1:
        problems.append(f'custom_hooks lists kd_mm.DistillHook {len(entries)} times; put all losses into the `losses` '
                        'of one')
    runner = cfg.get('runner_type')
    if runner not in (None, 'Runner', 'mmengine.Runner'):
        problems.append(f'runner_type={runner!r}: kd_mm.DistillHook works with mmengine.runner.Runner only; the '
                        'strategies of FlexibleRunner (DeepSpeed, FSDP, ColossalAI) are not supported')
    wrapper = cfg.get('optim_wrapper') or {}
    if _type_name(wrapper) == 'OptimWrapperDict' or (wrapper and 'optimizer' not in wrapper and any(
            hasattr(part, 'get') and 'optimizer' in part for part in wrapper.values())):
        problems.append('optim_wrapper has several optimizers (OptimWrapperDict), which are not supported')
    return problems


def hook_arguments(entry: Dict[str, Any], problems: Problems) -> Dict[str, Any]:
    """What :class:`~kd_mm.distiller.Distiller` is given for a hook entry; wrong arguments become problems."""
    accepted = accepted_arguments(DistillHook)
    arguments = {key: value for key, value in entry.items() if key not in ('type', 'priority')}
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        problems.add(f'DistillHook got unknown argument(s) {", ".join(map(repr, unknown))}. It accepts: '
                     f'{", ".join(accepted)}')
    for required in ('teacher', 'losses'):
        arguments.setdefault(required, None)  # the distiller says what is missing
    return DistillHook(**{key: value for key, value in arguments.items() if key in accepted}).config


def all_random(arguments: Dict[str, Any]) -> Dict[str, Any]:
    """``arguments`` with random weights for every teacher."""
    if arguments.get('teachers') is None:
        return dict(arguments, teacher_ckpt=RANDOM)
    return dict(arguments, teachers={name: dict(entry, teacher_ckpt=RANDOM)
                                     for name, entry in arguments['teachers'].items()})


def without_download(arguments: Dict[str, Any]) -> Tuple[Dict[str, Any], Optional[str]]:
    """``arguments`` with teacher weights that are on this machine.

    Returns:
        The arguments, and a sentence if the weights would have to be fetched; they are random then.
    """
    if arguments.get('teachers') is not None:
        entries, notes = {}, []
        for name, entry in arguments['teachers'].items():
            found, note = without_download(dict(entry)) if hasattr(entry, 'get') else (entry, None)
            entries[name] = found
            notes.extend([note] if note else [])
        return dict(arguments, teachers=entries), '; '.join(notes) or None
    source = arguments.get('teacher_ckpt')
    if source is None and not isinstance(arguments.get('teacher'), nn.Module):
        try:
            path = load_config(arguments.get('teacher'))[2]
        except (FileNotFoundError, KeyError, ValueError):
            return arguments, None  # building reports it
        source = default_weights(path)
    if not isinstance(source, str) or urlparse(source).scheme not in ('http', 'https'):
        return arguments, None
    local = ckpt.cached(source)
    if local is not None:
        return dict(arguments, teacher_ckpt=local), None
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    return dict(arguments, teacher_ckpt=RANDOM), (
        'the weights of the teacher are not on this machine and nothing was fetched: random ones stand in. Training '
        f'fetches {source} into {folder}; or fetch it yourself and give its path as teacher_ckpt')


# ---------------------------------------------------------------------------------------------------- models, data


@contextmanager
def scope_of(cfg: Config) -> Iterator[None]:
    """The config's default scope inside, and the counters that some parts of a model read from the Runner's log.

    The hosts are quiet meanwhile: they log several lines for every parameter that they initialise.
    """
    hub, logger = MessageHub.get_current_instance(), MMLogger.get_current_instance()
    for key in ('iter', 'epoch'):
        if hub.get_info(key) is None:
            hub.update_info(key, 0)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')), warnings.catch_warnings():
            warnings.filterwarnings('ignore', module=r'mm(det|seg|cv|engine)')
            warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
            yield
    finally:
        logger.setLevel(level)


def build_student(cfg: Config, device: Any = 'cpu') -> nn.Module:
    """The config's model on ``device``, with random weights: nothing is loaded or fetched."""
    model = build_model(cfg, cfg.get('default_scope'))
    if hasattr(model, 'init_weights'):
        model.init_weights()  # type: ignore[operator]
    return model.to(device)


def random_batch(model: nn.Module, batch: int, shape: Tuple[int, int], device: Any = 'cpu',
                 training: bool = True) -> Dict[str, Any]:
    """One random batch that went through the model's data preprocessor; the images have ``shape``."""
    preprocessor: Any = model.data_preprocessor
    size = getattr(preprocessor, 'size', None)
    try:
        if size is not None:
            preprocessor.size = tuple(shape)  # mmseg pads to its crop size
        return preprocessor(synthetic_batch(model, batch, shape, device=device), training)
    finally:
        if size is not None:
            preprocessor.size = size


def make_distiller(cfg: Config, student: nn.Module, arguments: Dict[str, Any]) -> Distiller:
    """The distiller as the hook builds it, except that the class names come from the config and not from the data.

    Raises:
        ConfigProblems: the configuration is wrong.
    """
    return Distiller(student, classes=class_names(cfg), scope=cfg.get('default_scope'),
                     max_steps=training_length(cfg)[0], **arguments)


def probe_step(distiller: Distiller) -> int:
    """The earliest of some steps at which most terms have a weight: a warm-up starts at 0, a window opens late."""
    length = distiller.max_steps
    steps = [0, 1, 100, 1000, *(length * part // 8 for part in range(1, 8)), length - 1]
    counts: Dict[int, int] = {}
    for step in sorted({step for step in steps if 0 <= step < max(length, 1)} or {0}):
        distiller.step = step
        counts[step] = len(distiller.active_terms())
    distiller.step = 0
    return max(counts, key=lambda step: (counts[step], -step))


# ---------------------------------------------------------------------------------------------------- taps


@dataclass
class Output:
    """What one module returned in a forward pass, as a tap sees it."""

    path: str
    type: str
    calls: int
    shapes: List[Tuple[int, ...]]


def observe(model: nn.Module, shape: Tuple[int, int]) -> List[Output]:
    """Outputs of every sub-module in one forward pass (eval, no losses) on a random image, in model order.

    A tap on each module sees what a distillation tap there would see: a tensor an item of a tuple, one more for every
    further call, tokens as maps.
    """
    device = next(model.parameters()).device
    taps = [Tap(model, name) for name, _ in model.named_modules() if name and not name.startswith('data_preprocessor')]
    with preserved_random_state(0), torch.no_grad(), eval_mode(model):
        data = random_batch(model, 1, shape, device, training=False)
        try:
            for tap in taps:
                tap.arm(tuple(data['inputs'].shape[-2:]))
            forward_tensor(model, data['inputs'], data['data_samples'], [tap.path for tap in taps])
            rows = []
            for tap in taps:
                owner = type(tap.owner).__name__
                try:
                    shapes = [tuple(tensor.shape) for tensor in tap.read()]
                except RuntimeError:  # it was not called, or returned no tensor
                    shapes = []
                except TokenSizeError as error:  # a loss there has to say tokens=
                    shapes = error.shapes
                rows.append(Output(tap.path, owner, tap.calls, shapes))
            return rows
        finally:
            for tap in taps:
                tap.clear()


def matches(path: str, pattern: Optional[str]) -> bool:
    """Whether a path contains ``pattern``, or fits it if it has wildcards."""
    if not pattern:
        return True
    return fnmatch.fnmatchcase(path, pattern) if any(letter in pattern for letter in '*?[') else pattern in path


def shape_text(shapes: Sequence[Sequence[int]]) -> str:
    """``1x256x32x32, 1x256x16x16``; equal neighbours are counted, long lists cut."""
    parts: List[List[Any]] = []
    for shape in shapes:
        text = 'x'.join(map(str, shape)) or 'scalar'
        if parts and parts[-1][0] == text:
            parts[-1][1] += 1
        else:
            parts.append([text, 1])
    texts = [text if count == 1 else f'{count} times {text}' for text, count in parts]
    return ', '.join(texts[:8]) + (f', ... ({len(shapes)} in all)' if len(texts) > 8 else '')


# ---------------------------------------------------------------------------------------------------- one step


@dataclass
class LevelReport:
    """One level of a term in the dry step.

    Attributes:
        student, teacher: shape of what is compared; of a head's view that of its class logits.
        weight: of the level at this step.
        loss: weighted.
    """

    student: Tuple[int, ...]
    teacher: Tuple[int, ...]
    weight: float
    loss: float


@dataclass
class TermReport:
    """One term in the dry step.

    Attributes:
        loss: weighted sum over the levels, as it enters the training loss; None if the weight is 0 at this step.
        gradient: Euclidean norm of this term's gradient on the student's parameters.
        extras_gradient: the same on the term's own parameters.
    """

    name: str
    method: str
    student_at: List[str]
    teacher_at: List[str]
    adapter: str
    region: str
    extras: int
    levels: List[LevelReport] = field(default_factory=list)
    loss: Optional[float] = None
    gradient: float = 0.0
    extras_gradient: float = 0.0


@dataclass
class StepReport:
    """One training step on random images."""

    step: int
    images: int
    shape: Tuple[int, int]
    task: Dict[str, float]
    total: float
    gradient: float
    terms: List[TermReport]


def level_shapes(side: Any) -> List[Tuple[int, ...]]:
    """Shape of each level of what a term compares: a tensor's, or that of the class logits in a view."""
    levels = side if isinstance(side, (tuple, list)) else side.logits
    return [tuple(level.shape) for level in levels]


def describe_adapter(term: Term) -> str:
    """Class names of a term's adapter, and whether it was chosen automatically."""
    if term.adapter is None:
        return 'none needed' if term.adapter_cfg == 'auto' else 'none'
    parts = list(getattr(term.adapter, 'adapters', None) or [term.adapter])
    return ' + '.join(type(part).__name__ for part in parts) + (' (automatic)' if term.adapter_cfg == 'auto' else '')


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _norm(parameters: Sequence[Tensor]) -> float:
    squares = [parameter.grad.double().square().sum() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def dry_step(student: nn.Module, distiller: Distiller, data: Dict[str, Any]) -> StepReport:
    """One training step with the distiller attached, term by term; no weight is changed.

    Args:
        student: the model; it is put into training mode and left without gradients.
        data: one preprocessed batch.

    Raises:
        Anything that the step raises.
    """
    student.train()
    distiller.train()
    own, extras = list(student.parameters()), list(distiller.parameters())
    reports = []
    for term in distiller.terms.values():
        assert isinstance(term, Term)
        reports.append(TermReport(
            term.name, type(term.loss).__name__, term.student_paths, term.teacher_paths, describe_adapter(term),
            type(term.region).__name__ if term.region is not None else 'none', parameter_count(term)))
    step = distiller.current
    with step.open(data['inputs'], copy.deepcopy(data['data_samples'])):
        own_losses = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        step.hear()
        comparisons = step.read()
        found = {comparison.term: step.evaluate(comparison) for comparison in comparisons}
        losses = distiller.add(own_losses, list(found.values()))
    total, log = student.parse_losses(losses)  # type: ignore[operator]

    def backward(value: Tensor) -> None:
        for parameter in (*own, *extras):
            parameter.grad = None
        value.backward(retain_graph=True)

    for report in reports:
        term = distiller.terms[report.name]
        assert isinstance(term, Term)
        if term not in found:
            continue
        comparison = next(comparison for comparison in comparisons if comparison.term is term)
        evaluation = found[term]
        report.levels = [
            LevelReport(s, t, weight, weight * float(level.detach())) for s, t, weight, level in zip(
                level_shapes(comparison.student), level_shapes(comparison.teacher), evaluation.weights,
                evaluation.levels)]
        report.loss = float(evaluation.total.detach())
        backward(evaluation.total)
        report.gradient, report.extras_gradient = _norm(own), _norm(extras)
    backward(total)
    gradient = _norm(own)
    for parameter in (*own, *extras):
        parameter.grad = None
    task = {name: float(torch.as_tensor(value).detach()) for name, value in log.items()
            if 'loss' in name and name != 'loss' and name not in distiller.terms}
    return StepReport(distiller.step, len(data['data_samples']), tuple(data['inputs'].shape[-2:]), task,
                      float(total.detach()), gradient, reports)


# ---------------------------------------------------------------------------------------------------- the check


@dataclass
class Report:
    """What a check of a config found.

    Attributes:
        problems: what keeps the config from training, all of it.
        warnings: what may be meant so.
        weights: where the teacher's weights came from.
        step: the dry step, if there was nothing to keep it from running.
    """

    problems: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    student: Optional[nn.Module] = None
    distiller: Optional[Distiller] = None
    weights: Any = None
    step: Optional[StepReport] = None


def check(cfg: Config, shape: Tuple[int, int] = (256, 256), batch: int = 2, device: Any = 'cpu',
          teacher_random: bool = False) -> Report:
    """Everything that the hook checks before the first step, and one training step on random images.

    Opens no data set and downloads nothing.

    Args:
        cfg: a config of :func:`read_config`.
        shape: (H, W) of the random images.
        batch: their number.
        device: where the models go.
        teacher_random: random teacher weights, whatever the config names.
    """
    report = Report()
    try:
        report.warnings.extend(dropped_hooks(cfg))
    except (OSError, SyntaxError) as error:
        report.warnings.append(f'the _base_ chain cannot be followed, so dropped hooks are not looked for: {error}')
    entries = hook_entries(cfg)
    if not entries:
        report.problems.append("custom_hooks has no kd_mm.DistillHook: this config trains without distillation. Add "
                               "dict(type='kd_mm.DistillHook', teacher=..., losses=...) to custom_hooks")
        return report
    problems = Problems()
    for problem in unsupported(cfg):
        problems.add(problem)
    with scope_of(cfg), preserved_random_state(0):
        try:
            report.student = build_student(cfg, device)
        except Exception as error:  # the registry and the models raise anything
            problems.add(f'the student of this config cannot be built: {type(error).__name__}: {error}')
        for entry in entries:
            arguments = hook_arguments(entry, problems)
            if teacher_random:
                arguments = all_random(arguments)
            arguments, missing = without_download(arguments)
            if missing:
                report.warnings.append(missing)
            report.weights = arguments.get('teacher_ckpt') if arguments.get('teachers') is None else {
                name: entry.get('teacher_ckpt') for name, entry in arguments['teachers'].items()}
            if report.student is None:
                continue
            try:
                report.distiller = make_distiller(cfg, report.student, arguments)
            except Exception as error:
                found = getattr(error, 'found', None)
                for problem in found or [f'the distiller cannot be built: {type(error).__name__}: {error}']:
                    problems.add(problem)
        if not problems.found and report.student is not None and report.distiller is not None:
            _try_step(report, cfg, shape, batch, device, problems)
    report.problems = problems.found
    return report


def _try_step(report: Report, cfg: Config, shape: Tuple[int, int], batch: int, device: Any,
              problems: Problems) -> None:
    student, distiller = report.student, report.distiller
    assert student is not None and distiller is not None
    for teacher in distiller.teachers.values():
        report.warnings.extend(teacher.notes)
    try:
        distiller.step = probe_step(distiller)
        report.step = dry_step(student, distiller, random_batch(student, batch, shape, device))
    except Exception as error:
        problems.add(f'a training step on random images of {shape[0]}x{shape[1]} fails: {type(error).__name__}: '
                     f'{error} (if the model needs another size, give --shape H W)')
        return
    for term in report.step.terms:
        if term.loss is None:
            report.warnings.append(f'{term.name} has the weight 0 at step {report.step.step}, where most terms are '
                                   'active, and was not computed')
        elif term.gradient == 0:
            report.warnings.append(f'{term.name} has no gradient on the student in this step (loss {term.loss:.4g})')
    if report.step.step:
        guess = f' (an epoch taken as {ASSUMED_EPOCH} steps)' if training_length(cfg)[1] else ''
        report.warnings.append(f'not all terms have a weight at step 0; step {report.step.step} was tried{guess}')
