"""Check a distillation config: build student, teacher and distiller without Runner, data or downloads; run one step.

``tools/check_config.py`` is the command line over this module.
"""

from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

from mmengine.config import Config
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import build_optim_wrapper
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn

from kd_mm.engine.branches import branch_faults
from kd_mm.engine.conditions import check_folded, check_loop, unfit
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import SEVERAL_OPTIMIZERS, folder_of, one_text
from kd_mm.engine.term import need_masks
from kd_mm.hosts.models import class_names, inner_dataset, scope_of_config
from kd_mm.hosts.optim import autocast, in_full_precision
from kd_mm.hosts.packages import lacking
from kd_mm.hosts.semi import inner_student
from kd_mm.hosts.table import host_of_config
from kd_mm.lab.configs import (
    ASSUMED_EPOCH,
    all_random,
    dropped_hooks,
    faults,
    hook_arguments,
    hook_entries,
    lost_weights,
    training_length,
    without_download,
)
from kd_mm.lab.models import build_whole, hint_of, make_distiller, probe_step, random_batch, scope_of
from kd_mm.lab.recipes import next_best
from kd_mm.lab.step import StepReport, dry_step
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems

NO_HOOK = 'custom_hooks has no kd_mm.DistillHook: this config trains without distillation'
UNBUILT = 'the student of this config cannot be built'


@dataclass
class Report:
    """What a check of a config found.

    Attributes:
        problems: what keeps the config from training, all of it.
        warnings: what may be meant so.
        student: what is distilled.
        whole: the model of the config, which holds it.
        weights: where the teacher's weights came from.
        step: the dry step, if there was nothing to keep it from running.
        instead: where a loss was refused, what would run for this pair.
    """

    problems: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    student: Optional[nn.Module] = None
    whole: Optional[nn.Module] = None
    distiller: Optional[Distiller] = None
    weights: Any = None
    step: Optional[StepReport] = None
    instead: Optional[str] = None


def check(cfg: Config, shape: Tuple[int, int] = (256, 256), batch: int = 2, device: Any = 'cpu',
          teacher_random: bool = False, plain: bool = False, samples: Optional[int] = None) -> Report:
    """Everything that the hook checks before the first step, and one training step on random images.

    Opens no data set and downloads nothing.

    Args:
        cfg: a config of :func:`read_config`.
        shape: (H, W) of the random images.
        batch: their number.
        device: where the models go.
        teacher_random: random teacher weights, whatever the config names.
        plain: a config without distillation will do: its model is built, and no step is tried.
        samples: of the training set, where it was opened: they say how long an epoch is.
    """
    report = Report()
    try:
        report.warnings.extend(dropped_hooks(cfg))
    except (OSError, SyntaxError) as error:
        report.warnings.append(f'the _base_ chain cannot be followed, so dropped hooks are not looked for: {error}')
    host = host_of_config(cfg)
    if host is not None and host.note is not None:
        report.warnings.append(host.note)
    entries = hook_entries(cfg)
    if not entries and not plain:
        report.problems.append(f"{NO_HOOK}. Add dict(type='kd_mm.DistillHook', teacher=..., losses=...) to "
                               'custom_hooks')
        return report
    if not entries:
        report.warnings.append(f'{NO_HOOK}. Only the model and the data were looked at')
    dataset: Any = (cfg.get('train_dataloader') or {}).get('dataset')
    names = None
    while names is None and hasattr(dataset, 'get'):
        names, dataset = (dataset.get('metainfo') or {}).get('classes'), inner_dataset(dataset)
    if isinstance(names, str):
        report.warnings.append(one_text(names))
    problems = Problems()
    for problem in [*faults(cfg), *lost_weights(cfg)]:
        problems.add(problem)
    with scope_of(cfg), preserved_random_state(0):
        try:
            whole = build_whole(cfg, device)
            report.whole, report.student = whole, inner_student(whole)
        except Exception as error:  # the registry and the models raise anything
            cause = lacking(error) or f'{type(error).__name__}: {error}{_base_scope(cfg, error)}'
            problems.add(f'{UNBUILT}: {cause}')
        else:
            _look_at_training(cfg, whole, problems)
        for entry in entries:
            arguments = hook_arguments(entry, problems)
            if teacher_random:
                arguments = all_random(arguments)
            arguments, missing = without_download(arguments, folder_of(cfg))
            if missing:
                report.warnings.append(missing)
            teachers: Any = arguments.get('teachers')
            report.weights = {name: entry.get('teacher_ckpt') for name, entry in teachers.items()
                              if hasattr(entry, 'get')} if hasattr(teachers, 'items') else arguments.get('teacher_ckpt')
            if report.student is None:
                continue
            try:
                report.distiller = make_distiller(cfg, report.student, arguments, samples)
                for fault in branch_faults(whole, report.distiller, entry.get('branches')):
                    problems.add(fault)
                check_folded(report.distiller, cfg)
                check_loop(report.distiller, (cfg.get('train_dataloader') or {}).get('batch_size'),
                           not (cfg.get('train_cfg') or {}).get('max_iters'))
            except Exception as error:
                for problem in _sentences(error, 'the distiller cannot be built'):
                    problems.add(problem)
        if entries and problems.found and report.student is not None:
            report.instead = next_best(report.student, entries[0], problems.found, scope_of_config(cfg),
                                       folder_of(cfg), class_names(cfg))
        if not problems.found and report.student is not None and report.distiller is not None:
            _try_step(report, cfg, shape, batch, device, problems, samples)
    report.problems = problems.found
    return report


def _base_scope(cfg: Config, error: Exception) -> str:
    """The cause of a class that no registry has: mmengine notes the scope of a base in each of its parts."""
    name = str(error).strip('"\'').split(' ')[0]
    own = cfg.get('default_scope')

    def noted(part: Any) -> Any:
        if isinstance(part, (list, tuple)):
            return next(filter(None, map(noted, part)), None)
        if not hasattr(part, 'get'):
            return None
        return part.get('_scope_') if part.get('type') == name else noted(list(part.values()))

    scope = noted(cfg.model) if isinstance(error, KeyError) else None
    return '' if scope in (None, own) else (f". Its part of the config comes from a _base_ of {scope} and is looked "
                                            f"for there (_scope_={scope!r}): write type='{own}.{name}'")


def _look_at_training(cfg: Config, student: nn.Module, problems: Problems) -> None:
    """What the Runner and the hook need of the student and of its optimizer."""
    refused = unfit(student)
    if refused is not None:
        problems.add(refused)
    if cfg.get('optim_wrapper') and SEVERAL_OPTIMIZERS not in problems.found:
        try:
            build_optim_wrapper(student, in_full_precision(cfg.optim_wrapper))
        except Exception as error:
            problems.add(f'the optim_wrapper of this config cannot be built: {type(error).__name__}: {error}')


def _sentences(error: Exception, what: str) -> List[str]:
    """Errors that say what to do as they are, others after what was tried."""
    found = getattr(error, 'found', None)
    return found or [str(error) if isinstance(error, ValueError) else f'{what}: {type(error).__name__}: {error}']


def _try_step(report: Report, cfg: Config, shape: Tuple[int, int], batch: int, device: Any,
              problems: Problems, samples: Optional[int]) -> None:
    student, distiller = report.student, report.distiller
    assert student is not None and distiller is not None
    for teacher in distiller.teachers.values():
        report.warnings.extend(teacher.notes)
    wrapper = cfg.get('optim_wrapper') or {}
    try:
        distiller.start_peers(wrapper)
        # As the Runner does it after the distiller was built.
        for option, turn_on in (('activation_checkpointing', turn_on_activation_checkpointing),
                                ('efficient_conv_bn_eval', turn_on_efficient_conv_bn_eval)):
            if cfg.get(option) is not None:
                turn_on(student, cfg[option])
    except Exception as error:
        for problem in _sentences(error, 'the training cannot be started'):
            problems.add(problem)
        return
    try:
        distiller.step = probe_step(distiller)
        report.step = dry_step(student, distiller, random_batch(
            student, batch, shape, device, masks=need_masks(distiller.all_terms())),
                               autocast(wrapper, device))
    except Exception as error:
        problems.add(f'a training step on random images of {shape[0]}x{shape[1]} fails: {type(error).__name__}: '
                     f'{error} ({hint_of(error)})')
        return
    for term in report.step.terms:
        if term.loss is None:
            report.warnings.append(f'{term.name} has the weight 0 at step {report.step.step}, where most terms are '
                                   'active, and was not computed')
        elif term.gradient == 0:
            report.warnings.append(f'{term.name} has no gradient on the student in this step (loss {term.loss:.4g})')
    if report.step.step:
        guess = f' (an epoch taken as {ASSUMED_EPOCH} steps)' if training_length(cfg, samples)[1] else ''
        report.warnings.append(f'not all terms have a weight at step 0; step {report.step.step} was tried{guess}')
