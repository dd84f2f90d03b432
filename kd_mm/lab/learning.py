"""What methods learn from the teacher alone before they distil: the loop behind ``tools/learn_tokens.py``.

A loss with ``learned`` has a :class:`~kd_mm.losses.base.learner.Learner`.  The teacher of a distillation config,
frozen and in eval mode, runs on the config's own training data; at the tap the learner replaces the features that the
teacher continues with, and adds its own loss.  The teacher's task losses and the learners' are summed; only learners
are updated.
"""

import contextlib
import itertools
import math
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.term import Term
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.paths import expand_paths, resolve
from kd_mm.hosts.swap import swapped
from kd_mm.hosts.taps import StopForward
from kd_mm.losses.base.learner import RANDOM, Learner
from kd_mm.losses.base.loss import KDLoss, Pretrained
from kd_mm.ops.problems import Problems
from kd_mm.registry import MODELS, choices
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.sources import weights_file

#: The learning rate ends at this fraction of the first one.
FINAL_RATE = 1e-4


class Exchange:
    """Replaces, while it is active, the tensors that modules of a model return, in the order they are returned.

    Args:
        model: the model.
        paths: module paths, as for taps; their outputs are counted together, path after path.
        change: gets the path and the number of the tensor among those of that path, and returns its replacement.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], change: Callable[[str, int, Tensor], Tensor]):
        self.change = change
        self.places = [(path, *resolve(model, path, 'teacher')) for path in paths]

    def __enter__(self) -> 'Exchange':
        with contextlib.ExitStack() as stack:
            for path, owner, name in self.places:
                stack.enter_context(swapped(owner, name, self._wrap(path, getattr(owner, name))))
            self._swaps = stack.pop_all()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._swaps.close()

    def _wrap(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        count = itertools.count()

        def exchanged(*args: Any, **kwargs: Any) -> Any:
            return self._replace(path, count, original(*args, **kwargs))

        return exchanged

    def _replace(self, path: str, count: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.change(path, next(count), output) if output.is_floating_point() else output
        if isinstance(output, dict):
            return type(output)((key, self._replace(path, count, value)) for key, value in output.items())
        if isinstance(output, (tuple, list)):
            return type(output)(self._replace(path, count, value) for value in output)
        return output


@dataclass
class Lesson:
    """One loss of a config that learns from the teacher, and the file that it wants.

    Attributes:
        name: key of the config's ``losses``.
        term: built without the file.
        learner: what is trained.
        target: path to write.
        paths: taps of the teacher; filled by the first pass.
        spots: (path, number of the tensor) -> level; filled by the first pass.
    """

    name: str
    term: Term
    learner: Learner
    target: str
    paths: List[str] = field(default_factory=list)
    spots: Dict[Tuple[str, int], int] = field(default_factory=dict)


def find_lessons(losses: Any, out: Optional[str] = None) -> List[Lesson]:
    """The losses of a config that learn something, built as they are but for the file.

    Losses of one type may share a file: the first by name learns (MasKD on a head and on its
    auxiliary head).

    Args:
        losses: the config's dict of losses.
        out: folder for the files; None for the paths that the config names.

    Raises:
        ValueError: no loss learns anything, a config is wrong, or a loss names no file; all problems in one.
    """
    problems, lessons = Problems(), []
    seen: Dict[str, Lesson] = {}
    for name, cfg in sorted(losses.items()):
        try:
            argument = _learned_argument(cfg)
            if argument is None:
                continue
            target = cfg.get(argument)
            term = Term(name, dict(cfg, **{argument: RANDOM}))
            if out is not None:
                target = os.path.join(out, f'{name}.pth')
            if not isinstance(target, str) or target == RANDOM:
                raise ValueError(f"{name}: {argument}={target!r} is no file to write. Give "
                                 f"{argument}='work_dirs/learned/{name}.pth' in the config, or a folder with --out")
            first = seen.get(cfg.get(argument))
            if first is not None:
                if type(term.loss) is not type(first.term.loss):
                    raise ValueError(f'{name}: {target} is the file of {first.name} too, which is a '
                                     f'{type(first.term.loss).__name__}. Give each its own')
                continue
            assert isinstance(term.loss, Pretrained)
            lessons.append(Lesson(name, term, term.loss.learner(), target))
            if cfg.get(argument) not in (None, RANDOM):
                seen[cfg[argument]] = lessons[-1]
        except (KeyError, ValueError) as error:
            problems.add(error)
    if not lessons and not problems.found:
        problems.add(f'no loss of this config learns from the teacher beforehand: {", ".join(losses)}. Train it with '
                     'tools/train.py')
    problems.raise_any()
    return lessons


def _learned_argument(cfg: Any) -> Optional[str]:
    """Name of the argument of a loss's config that takes the file; None if it learns nothing (or is no loss)."""
    kind = cfg.get('type') if hasattr(cfg, 'get') else None
    if isinstance(kind, str):
        name = kind[len('kd_mm.'):] if kind.startswith('kd_mm.') else kind
        kind = MODELS.module_dict[name] if name in choices(KDLoss) else None
    return getattr(kind, 'learned', None)


class School:
    """A frozen teacher and the learners that listen to it.

    Args:
        model: the teacher's network, frozen and in eval mode.
        lessons: from :func:`find_lessons`.
        data: its first batch, raw; every learner is sized by it.

    Raises:
        ValueError: a tap is wrong or gives no maps (N, C, H, W), or two learners change the same tensor.
    """

    def __init__(self, model: Any, lessons: Sequence[Lesson], data: Any):
        self.model, self.lessons = model, list(lessons)
        self.paths: List[str] = []
        self.task = any(lesson.learner.task_loss for lesson in self.lessons)
        self._size(data)

    def _size(self, data: Any) -> None:
        """One pass that looks at the features, and creates the learners' parameters."""
        found: Dict[str, List[Tensor]] = {}

        def look(path: str, number: int, tensor: Tensor) -> Tensor:
            found.setdefault(path, []).append(tensor)
            return tensor

        for lesson in self.lessons:
            lesson.paths = expand_paths(self.model, lesson.term.reader.at['teacher'])
            self.paths.extend(path for path in lesson.paths if path not in self.paths)
        with torch.no_grad(), Exchange(self.model, self.paths, look):
            self._run(data)
        taken: Dict[Tuple[str, int], str] = {}
        for lesson in self.lessons:
            spots = [(path, number) for path in lesson.paths for number in range(len(found.get(path, [])))]
            if not spots:
                raise ValueError(f'{lesson.name}: the teacher does not run {lesson.paths} in training')
            if lesson.term.reader.levels['teacher'] is not None:
                spots = [spots[index] for index in lesson.term.reader.levels['teacher']]
            features = [found[path][number] for path, number in spots]
            if any(tensor.dim() != 4 for tensor in features):
                raise ValueError(f'{lesson.name}: {lesson.paths} gives '
                                 f'{[tuple(tensor.shape) for tensor in features]}; a learner needs maps (N, C, H, W)')
            for spot in spots:
                if lesson.learner.task_loss and spot in taken:
                    raise ValueError(f'{lesson.name} and {taken[spot]} both change the output of {spot[0]!r}: learn '
                                     'them with two configs')
                taken[spot] = lesson.name
            lesson.spots = {spot: level for level, spot in enumerate(spots)}
            lesson.learner.prepare(tuple(tensor.detach() for tensor in features))
            lesson.learner.to(features[0].device).train()

    def _run(self, data: Any) -> Dict[str, Tensor]:
        batch = self.model.data_preprocessor(data, True)
        if self.task:
            total, _ = self.model.parse_losses(self.model(**batch, mode='loss'))
            return {'task': total}
        with contextlib.suppress(StopForward):
            forward_tensor(self.model, batch['inputs'], batch.get('data_samples'), self.paths)
        return {}

    def step(self, data: Any) -> Dict[str, Tensor]:
        """The losses of one batch: ``task`` (if a learner wants it) and one for each lesson, averaged over levels."""
        parts: Dict[str, List[Tensor]] = {lesson.name: [] for lesson in self.lessons}
        left = sum(len(lesson.spots) for lesson in self.lessons)

        def teach(path: str, number: int, tensor: Tensor) -> Tensor:
            nonlocal left
            result = tensor
            for lesson in self.lessons:
                level = lesson.spots.get((path, number))
                if level is None:
                    continue
                with torch.enable_grad(), torch.autocast(tensor.device.type, enabled=False):
                    shown, own = lesson.learner(level, tensor if lesson.learner.task_loss else tensor.detach())
                parts[lesson.name].append(own)
                if lesson.learner.task_loss:
                    result = shown.to(tensor.dtype)
                left -= 1
            if left == 0 and not self.task:
                raise StopForward
            return result

        with torch.set_grad_enabled(self.task), Exchange(self.model, self.paths, teach):
            losses = self._run(data)
        for name, values in parts.items():
            losses[name] = torch.stack(values).mean()
        return losses


def learn(model: Any, lessons: Sequence[Lesson], batches: Iterable[Any], iters: Optional[int] = None,
          lr: Optional[float] = None, report: Optional[Callable[[int, int, Dict[str, float]], None]] = None) -> None:
    """Train the learners of all lessons together.

    Args:
        model: the frozen teacher.
        batches: raw batches of training data, again and again if they end.
        iters: steps; None for the longest that a learner asks for.
        lr: first learning rate; None for each learner's own.
        report: called every 50 steps and at the end with the step, their number and the losses.

    Raises:
        ValueError: see :class:`School`, or there are no data.
        FloatingPointError: a loss is not finite.
    """
    endless = _again(batches)
    school = School(model, lessons, next(endless))
    steps = max(lesson.learner.iters for lesson in lessons) if iters is None else iters
    optimizer = torch.optim.Adam([
        dict(params=list(lesson.learner.parameters()), lr=lesson.learner.lr if lr is None else lr,
             weight_decay=lesson.learner.weight_decay) for lesson in lessons])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))
    for step in range(steps):
        losses = school.step(next(endless))
        total = torch.stack(list(losses.values())).sum()
        if not bool(torch.isfinite(total)):
            values = ', '.join(f'{name} {float(value):g}' for name, value in losses.items())
            raise FloatingPointError(f'a loss is not finite at step {step}: {values}. Lower --lr')
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        if report is not None and (step % 50 == 0 or step == steps - 1):
            report(step + 1, steps, {name: float(value.detach()) for name, value in losses.items()})


def _again(batches: Iterable[Any]) -> Any:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError('the training data are empty')


def frozen_teacher(arguments: Dict[str, Any], scope: Optional[str], device: Any = 'cpu',
                   folder: Optional[str] = None) -> Teacher:
    """The teacher of a hook's arguments, fed by its own preprocessor; ``folder`` is that of the config."""
    teacher = Teacher.build(arguments['teacher'], nn.Identity(), weights_file(arguments.get('teacher_ckpt'), folder),
                            arguments.get('teacher_strict', True), scope, arguments.get('seed', 0), folder)
    teacher.model.to(device)
    return teacher


def save(lesson: Lesson, steps: Optional[int], teacher: str) -> None:
    """Write what a lesson has learned to its file."""
    os.makedirs(os.path.dirname(os.path.abspath(lesson.target)), exist_ok=True)
    state = {key: value.detach().cpu() for key, value in lesson.learner.state_dict().items()}
    torch.save(dict(loss=type(lesson.term.loss).__name__, state_dict=state,
                    about=dict(teacher=teacher, at=list(lesson.paths), iters=steps)), lesson.target)

