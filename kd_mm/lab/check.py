"""What the tools share: build a config's student, teacher and distiller without a Runner, data or downloads, and look.

``tools/check_config.py``, ``tools/list_taps.py`` and ``tools/measure.py`` are command lines over this module.
"""

from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

from mmengine.config import Config
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.lab.configs import (
    ASSUMED_EPOCH,
    all_random,
    dropped_hooks,
    faults,
    hook_arguments,
    hook_entries,
    training_length,
    without_download,
)
from kd_mm.lab.models import build_student, make_distiller, probe_step, random_batch, scope_of
from kd_mm.lab.step import StepReport, dry_step
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems


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
    for problem in faults(cfg):
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
            teachers: Any = arguments.get('teachers')
            report.weights = {name: entry.get('teacher_ckpt') for name, entry in teachers.items()
                              if hasattr(entry, 'get')} if hasattr(teachers, 'items') else arguments.get('teacher_ckpt')
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
