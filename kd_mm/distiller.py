"""One student pass and one teacher pass -> a dict of losses.

The :class:`Distiller` attaches to a model it does not own: two hooks on the student's forward, nothing else.  When the
student computes its training losses, the distiller's taps collect its features on the way, the teacher runs on the
same images, and the distillation terms are added to the returned loss dict, which the host sums as it sums its own.
"""

import functools
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm import distributed
from kd_mm.dry_pass import DryPass
from kd_mm.losses.opponent import Opponent
from kd_mm.peer import PeerTeacher
from kd_mm.taps import Recorded, Tap, TokenSize, image_size
from kd_mm.teacher import Teacher, forward_tensor, inherit_weights, task_of
from kd_mm.teacher_sources import SELF, build_teachers
from kd_mm.terms import Problems, Term
from kd_mm.types import Features, KDBatch


class Distiller(nn.Module):
    """Distils a teacher into a student that it does not own.

    ``parameters()`` are the trainable extras (adapters, generators): neither the student nor the teacher is a
    sub-module.  Building checks everything that can be checked before the first step, by one forward of each model
    on random images in eval mode that changes no random state and no statistics, and reports all problems at once.

    Args:
        student: the model in training.
        teacher: config path, installed config name (``mmdet::...``), config dict, ``nn.Module``, or one of the other
            sources of :mod:`kd_mm.teacher_sources`.
        losses: name -> config, see :class:`Term`. Names start with ``loss_``.
        teacher_ckpt: path or URL of the teacher's weights; None for the published weights of an installed config;
            ``'random'`` for none (tests).
        teacher_strict: whether the weights must fit exactly. Default True.
        teachers: several of them instead: name -> ``dict(teacher=..., teacher_ckpt=..., teacher_strict=...)``. Losses
            say which one they mean with ``teacher='name'`` (or several names, whose outputs are averaged).
        inherit: module paths whose weights :meth:`inherit_weights` copies from the teacher. Default none.
        task_loss_weight: factor on the student's own losses, from 0 (teacher alone). Default 1.
        seed: of the initial adapters and of random masks. Default 0.
        classes: the student's class names, if known.
        scope: registry scope of the student (``'mmdet'``, ``'mmseg'``).
        max_steps: iterations of the whole training, 0 if unknown; schedules that count from the end need it.

    Raises:
        ValueError: the configuration is wrong; all problems in one message.
    """

    student: Any  # a host model: mypy knows nothing of its attributes

    def __init__(self, student: nn.Module, teacher: Any, losses: Any, *, teacher_ckpt: Optional[str] = None,
                 teacher_strict: bool = True, teachers: Any = None, inherit: Sequence[str] = (),
                 task_loss_weight: float = 1.0, seed: int = 0, classes: Optional[Sequence[str]] = None,
                 scope: Optional[str] = None, max_steps: int = 0):
        super().__init__()
        self.__dict__['student'] = student  # past nn.Module, which would make it a sub-module
        self.task_loss_weight = task_loss_weight
        self.inherit = (inherit, ) if isinstance(inherit, str) else tuple(inherit)
        self.seed, self.step, self.max_steps = seed, 0, max_steps
        self.classes = list(classes) if classes else None
        self._wrapper: List[nn.Module] = []  # in a list, or it would become a sub-module
        self._handles: List[Any] = []
        self._active: List[Term] = []
        self._inputs: Any = None
        self._pending_checks: List[Tuple[Tensor, List[str], int]] = []
        self.terms = nn.ModuleDict()
        self.problems = Problems()
        self.teachers: Dict[str, Teacher] = {}
        self._skipping = False

        if not hasattr(losses, 'items') or not losses:
            self.problems.add(f'losses={losses!r}: give a dict of losses, losses=dict(loss_x=dict(type=..., at=...))')
            losses = {}
        if isinstance(task_loss_weight, bool) or not isinstance(task_loss_weight, (int, float)) \
                or not 0 <= task_loss_weight < float('inf'):
            self.problems.add(f'task_loss_weight={task_loss_weight!r} must be a number from 0')
        for name, cfg in losses.items():
            try:
                self.terms[name] = Term(name, cfg)
            except (KeyError, ValueError) as error:
                self.problems.add(error)
        self.teachers = build_teachers(
            student, teacher, teacher_ckpt, teacher_strict, teachers, self.problems, scope=scope, seed=seed,
            classes=self.classes)
        self._alone = isinstance(teacher, str) and teacher == SELF and teachers is None
        for term in self.all_terms():
            self._choose_sources(term)
            self._mirror(term, losses.get(term.name))
        self._student_taps: Dict[str, Tap] = {}
        self._teacher_taps: Dict[Tuple[str, str], Tap] = {}
        for term in self.all_terms():
            self._make_taps(term)
        self._check_data()
        if self.teacher is not None:
            for problem in inherit_weights(student, self.teacher.model, self.inherit, apply=False):
                self.problems.add(problem)
        dry_pass = DryPass(self)
        if self.teachers or any(SELF in term.sources for term in self.all_terms()):
            dry_pass.run()
        self._loss_only = dry_pass.loss_only
        self.problems.raise_any()

    # ------------------------------------------------------------------ building

    @property
    def teacher(self) -> Optional[Teacher]:
        """The first (usually the only) teacher; None in self-distillation."""
        return next(iter(self.teachers.values()), None)

    def _choose_sources(self, term: Term) -> None:
        """Which teachers a term learns from."""
        known = [*self.teachers, SELF]
        wrong = [name for name in term.sources if name not in known]
        if wrong and (self.teachers or self._alone):  # without any, there is another problem already
            self.problems.add(f'{term.name}: teacher={wrong[0]!r} is not among {", ".join(map(repr, known))}')
        elif not term.sources and len(self.teachers) > 1:
            self.problems.add(f'{term.name}: there are several teachers; say which one with teacher=NAME (or a list of '
                              f'names, whose outputs are averaged): {", ".join(map(repr, self.teachers))}')
        elif not term.sources:
            term.sources = (SELF, ) if self._alone else tuple(self.teachers)

    def _mirror(self, term: Term, cfg: Any) -> None:
        """A term with a peer has its mirror: what the peer learns from the student."""
        peers = [source for source in term.sources if isinstance(self.teachers.get(source), PeerTeacher)]
        if peers and len(term.sources) > 1:
            self.problems.add(f'{term.name}: a peer cannot be averaged with other teachers; give each its own loss')
        if peers and term.shared:
            self.problems.add(f'{term.name}: at={term.shared!r} is not possible with a peer, whose head would have to '
                              'learn from proposals that it was not trained on in this step. Tap features or dense '
                              'logits')
            return
        if peers and term.loss.adversarial:
            self.problems.add(f'{term.name}: {type(term.loss).__name__} trains a network against the student, which is '
                              'not supported between peers')
            return
        for source in peers:
            self.teachers[source].add(term.name, cfg)  # type: ignore[attr-defined]

    @property
    def peers(self) -> Dict[str, PeerTeacher]:
        """The teachers that are students themselves."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, PeerTeacher)}

    def _make_taps(self, term: Term) -> None:
        def add(taps: Dict[Any, Tap], key: Any, model: nn.Module, path: str, side: str,
                tokens: Optional[TokenSize]) -> None:
            if key not in taps:
                taps[key] = Tap(model, path, side)
            tap = taps[key]
            tap.structured |= term.structured(path)
            if tokens is not None and tap.tokens not in (None, tokens):
                raise ValueError(f'tokens={tokens} at the tap {path!r} of the {side}, where another loss says '
                                 f'tokens={tap.tokens}')
            tap.tokens = tap.tokens if tokens is None else tokens

        try:
            for path in term.locate('student', self.student):
                add(self._student_taps, path, self.student, path, 'student', term.tokens['student'])
        except (KeyError, ValueError) as error:
            self.problems.add(f'{term.name}: {error.args[0]}')
        for source in term.sources:
            try:
                if source == SELF:
                    for path in term.locate('teacher', self.student):
                        add(self._student_taps, path, self.student, path, 'student', term.tokens['teacher'])
                elif source in self.teachers:
                    model = self.teachers[source].model
                    for path in term.locate('teacher', model):
                        add(self._teacher_taps, (source, path), model, path, self._side(source), term.tokens['teacher'])
                term.pair_stages(self.student, self._model_of(source))
                if term.shared and source in self.teachers and self.teachers[source].size is not None:
                    raise ValueError(f'at={term.shared!r} needs both models to see the same pixels, and the teacher '
                                     'resizes them (preprocess size)')
            except (KeyError, ValueError) as error:
                self.problems.add(f'{term.name}: {error.args[0]}')

    def _model_of(self, source: str) -> Any:
        """The model behind a name of a teacher; the student for itself, and where there is no such teacher."""
        return self.teachers[source].model if source in self.teachers else self.student

    def _side(self, source: str) -> str:
        """Word for messages."""
        return 'teacher' if len(self.teachers) == 1 else f'teacher {source!r}'

    def _student_paths(self, terms: Sequence[Term]) -> List[str]:
        """Every path of the student that these terms read, once."""
        paths = [path for term in terms for path in term.student_paths]
        paths += [path for term in terms if SELF in term.sources for path in term.teacher_paths]
        return list(dict.fromkeys(paths))

    def _keys(self, terms: Sequence[Term], source: str) -> List[Tuple[str, str]]:
        """Keys of the taps that these terms read in one teacher."""
        return list(dict.fromkeys((source, path) for term in terms if source in term.sources
                                  for path in term.teacher_paths))

    def opponents(self) -> List[Opponent]:
        """What adversarial losses train against the student, with optimizers of their own."""
        return [opponent for term in self.all_terms() for opponent in term.loss.opponents()]

    def all_terms(self) -> Iterable[Term]:
        return self.terms.values()  # type: ignore[return-value]

    def _check_data(self) -> None:
        """Problems of terms with the kind of data and with the classes of both models."""
        task = task_of(self.student)
        for term in self.all_terms():
            if term.needs_boxes and task == 'segmentation':
                self.problems.add(f'{term.name}: {type(term.region or term.loss).__name__} needs ground-truth boxes, '
                                  'which segmentation data do not have. Use a loss or region without boxes '
                                  '(SegClassRegion makes regions from the labels)')
            for source in term.sources:
                theirs = self.teachers[source].classes if source in self.teachers else None
                if term.classes is not None and self.classes and theirs:
                    try:
                        term.map_classes(self.classes, theirs)
                    except ValueError as error:
                        self.problems.add(error)
                elif term.classes is not None and source != SELF:
                    self.problems.add(f'{term.name}: classes={term.classes!r} needs the class names of both models; '
                                      f'student: {_names(self.classes)}, teacher: {_names(theirs)}')
                elif term.of_classes and self.classes and theirs and list(self.classes) != list(theirs):
                    self.problems.add(f'{term.name}: a logit loss needs the same classes in the same order. '
                                      f'Student ({len(self.classes)}): {_names(self.classes)}. '
                                      f'Teacher ({len(theirs)}): {_names(theirs)}. Give classes=\'common\' (or the '
                                      'names to compare), use a feature loss, or a teacher trained on these classes')

    @staticmethod
    def _records(term: Term, source: str, student: Dict[str, Recorded],
                 teacher: Dict[Tuple[str, str], Recorded]) -> Dict[str, Recorded]:
        """What the taps of one of a term's teachers recorded, by path."""
        return student if source == SELF else {path: teacher[source, path] for path in term.teacher_paths}

    def _features(self, term: Term, student: Dict[str, Recorded],
                  teacher: Dict[Tuple[str, str], Recorded]) -> Tuple[Features, Features]:
        """What a term compares: its levels of both sides, averaged over its teachers."""
        own: Optional[Features] = None
        theirs: List[Features] = []
        for source in term.sources:
            own, found = term.collect(student, self._records(term, source, student, teacher))
            theirs.append(found)
        assert own is not None
        try:
            return own, average(theirs)
        except ValueError as error:
            raise ValueError(f'{term.name}: {error}') from error

    def _check_classes(self, term: Term, student: Features, teacher: Features) -> None:
        if not term.loss.logits or term.of_heads:  # a head loss compares them itself
            return
        for level, (s, t) in enumerate(zip(student, teacher)):
            if s.shape[1] != t.shape[1]:
                theirs = self.teachers[term.sources[0]].classes if term.sources[0] in self.teachers else None
                raise ValueError(
                    f'{term.name}, level {level}: a logit loss needs the same classes, but the student has '
                    f'{s.shape[1]} logits ({_names(self.classes)}) and the teacher {t.shape[1]} ({_names(theirs)}). '
                    'Use a feature loss, or a teacher trained on these classes')

    # ------------------------------------------------------------------ life

    def trainable_modules(self) -> nn.ModuleDict:
        """The extras, whose state dict a checkpoint keeps under its side key."""
        return self.terms

    def follow(self, wrapper: nn.Module) -> None:
        """Average the gradients of the extras whenever this DDP wrapper of the student averages the student's."""
        self._wrapper = [wrapper]
        distributed.broadcast(self)

    def inherit_weights(self) -> None:
        """Copy the inherited modules from the teacher into the student."""
        assert self.teacher is not None
        problems = Problems()
        for problem in inherit_weights(self.student, self.teacher.model, self.inherit):
            problems.add(problem)
        problems.raise_any()

    def attach(self) -> None:
        """Put the two hooks on the student.

        Raises:
            RuntimeError: a distiller is attached already.
        """
        if self._handles or any(getattr(hook, '_kd_mm', False) for hook in self.student._forward_hooks.values()):
            raise RuntimeError('a distiller is already attached to this student')
        before = functools.partial(_before_forward, self)
        after = functools.partial(_after_forward, self)
        before._kd_mm = after._kd_mm = True  # type: ignore[attr-defined]
        self._handles = [self.student.register_forward_pre_hook(before, with_kwargs=True),
                         self.student.register_forward_hook(after, with_kwargs=True, always_call=True)]

    def detach(self) -> None:
        """Take the hooks off and free what was captured; doing it twice is harmless."""
        self._clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for opponent in self.opponents():
            opponent.forget()

    def _clear(self) -> None:
        for tap in (*self._student_taps.values(), *self._teacher_taps.values()):
            tap.clear()
        self._restore_task_loss()
        self._inputs, self._active = None, []

    # ------------------------------------------------------------------ a step

    def active_terms(self) -> List[Term]:
        """Terms whose weight is not 0 at the current step."""
        return [term for term in self.all_terms() if not term.loss.weight.is_zero(self.step, self.max_steps)]

    def _batch(self, inputs: Tensor, data_samples: Any) -> KDBatch:
        return KDBatch(input_shape=image_size(inputs), data_samples=data_samples or (), step=self.step,
                       max_steps=self.max_steps, seed=self.seed, images=inputs)

    def begin(self, inputs: Any, data_samples: Any) -> None:
        """Start collecting: called before the student's training forward."""
        self._clear()
        self.raise_if_not_finite()
        self._active = self.active_terms()
        if not self._active and not self.peers:
            return
        if not isinstance(inputs, Tensor):
            raise ValueError(f'the student is given {type(inputs).__name__} inputs, not one batch of images; '
                             'multi-branch (semi-supervised) data are not supported')
        self._inputs = (inputs, data_samples)
        paths = self._student_paths(self._active)
        for path in paths:
            self._student_taps[path].arm(image_size(inputs))
        if self.task_loss_weight == 0 and self._active and not set(paths) & set(self._loss_only):
            self._skip_task_loss(paths)

    def _skip_task_loss(self, paths: List[str]) -> None:
        """Only the forward pass instead of the student's own loss, which counts nothing and may lack its labels."""
        student = self.student

        def loss(inputs: Tensor, data_samples: Any, *args: Any, **kwargs: Any) -> Dict[str, Tensor]:
            forward_tensor(student, inputs, data_samples, paths)
            return {}

        object.__setattr__(student, 'loss', loss)
        self._skipping = True

    def _restore_task_loss(self) -> None:
        if self._skipping:
            object.__delattr__(self.student, 'loss')
            self._skipping = False

    def end(self, losses: Dict[str, Any]) -> Dict[str, Any]:
        """The student's loss dict with the distillation terms; called after its training forward."""
        for tap in self._student_taps.values():
            tap.disarm()
        self._restore_task_loss()
        task = {name: value for name, value in losses.items() if 'loss' in name}
        result = dict(losses)
        if self.task_loss_weight != 1.0:
            for name, value in task.items():
                result[name] = ([item * self.task_loss_weight for item in value] if isinstance(value, (list, tuple))
                                else value * self.task_loss_weight)
        if self._active or self.peers:
            inputs, data_samples = self._inputs
            for name, value in self.compute(self._batch(inputs, data_samples), inputs, data_samples).items():
                if name in result:
                    raise ValueError(f'the student already has a loss named {name!r}; rename the distillation loss')
                result[name] = value
            if not task and self._wrapper:
                # DDP waits for a gradient of every parameter, also of those that no term reaches.
                first = self._active[0].name
                result[first] = result[first] + 0 * sum(
                    p.flatten()[0] for p in self.student.parameters() if p.requires_grad)
            with torch.no_grad():
                kd = sum(result[term.name].detach() for term in self._active)
                own = sum(_total(result[name]) for name in task)
                if isinstance(own, Tensor) and isinstance(kd, Tensor):
                    result['kd_task_ratio'] = kd / own.abs().clamp(min=1e-12)
        self._clear()
        return result

    def compute(self, batch: KDBatch, inputs: Tensor, data_samples: Any) -> Dict[str, Tensor]:
        """Distillation terms of the active losses, and their weights for the log."""
        terms = self._active
        student = {path: self._student_taps[path].read() for path in self._student_paths(terms)}
        teacher: Dict[Tuple[str, str], Recorded] = {}
        for source, model in self.teachers.items():
            taps = {key: self._teacher_taps[key] for key in self._keys(terms, source)}
            if taps or source in self.peers:
                model.run(inputs, data_samples, list(taps.values()), batch)
                teacher.update({key: tap.read() for key, tap in taps.items()})
        result: Dict[str, Tensor] = {}
        flags: List[Tensor] = []
        where: List[str] = []
        compared: Dict[str, Tuple[Features, Features]] = {}
        for term in terms:
            compared[term.name] = self._features(term, student, teacher)
            records = self._records(term, term.sources[0], student, teacher)
            levels = term.per_level(*compared[term.name], term.with_logits(batch, student, records))
            weights = term.loss.weight.at(self.step, self.max_steps, len(levels))
            total = sum(level * weight for level, weight in zip(levels, weights))
            assert isinstance(total, Tensor)
            result[term.name] = total
            result[f'kd_weight_{term.label}'] = total.new_tensor(sum(weights) / len(weights))
            flags.extend(torch.isfinite(level.detach()) for level in levels)
            where.extend(f'{term.name}, level {index}' for index in range(len(levels)))
        for peer in self.peers.values():
            result.update(peer.learn({name: (theirs, own) for name, (own, theirs) in compared.items()
                                      if name in peer.terms}, batch))
        if not flags:
            return result
        self._check_later(flags, where)
        distributed.average_after_backward(next(iter(result.values())), [
            parameter for term in terms for parameter in term.parameters()], next(iter(self._wrapper), None))
        return result

    def after_step(self, rate: float = 1.0) -> Dict[str, Tensor]:
        """Let the opponents of adversarial losses make their own step: called after the student's.

        The hook does it after every iteration; a training loop without a Runner has to.

        Args:
            rate: learning rate of the student as a fraction of its first one; the opponents follow it.

        Returns:
            What they minimise, for the log: ``kd_opponent_<name>``, summed over the levels of a term.
        """
        result: Dict[str, Tensor] = {}
        for term in self.all_terms():
            found = [opponent.learn(rate) for opponent in term.loss.opponents()]
            values = [value for value in found if value is not None]
            if values:
                result[f'kd_opponent_{term.label}'] = torch.stack(values).sum()
        if result:
            self._check_later([torch.isfinite(value) for value in result.values()], list(result))
        return result

    def _check_later(self, flags: List[Tensor], where: List[str]) -> None:
        self._pending_checks.append((torch.stack(flags), where, self.step))
        if flags[0].device.type == 'cpu':
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """Stop if a term of the last step was not finite.

        On an accelerator the look waits until the next step (or the next save), where it costs no synchronisation of
        its own.

        Raises:
            FloatingPointError: naming term, level and step.
        """
        checks, self._pending_checks = self._pending_checks, []
        for flags, where, step in checks:
            if not bool(flags.all()):
                names = [name for flag, name in zip(flags.tolist(), where) if not flag]
                raise FloatingPointError(
                    f'distillation loss is not finite at step {step}: {"; ".join(names)}. Lower loss_weight or the '
                    'learning rate, clip gradients (optim_wrapper.clip_grad), or look for non-finite student features')


def _names(classes: Optional[Sequence[str]]) -> str:
    if not classes:
        return 'classes unknown'
    return ', '.join(map(str, classes[:20])) + (', ...' if len(classes) > 20 else '')


def average(sides: Sequence[Features]) -> Features:
    """Mean of what several teachers give, level by level.

    Raises:
        ValueError: they differ in the number of levels or in shape.
    """
    if len(sides) == 1:
        return sides[0]
    shapes = [[tuple(tensor.shape) for tensor in side] for side in sides]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError(f'the outputs of several teachers are averaged, but they differ in shape: {shapes}. Give '
                         'each teacher a loss of its own')
    return tuple(torch.stack(level).mean(dim=0) for level in zip(*sides))


def _total(value: Any) -> Tensor:
    """Detached value of a host loss: a tensor or a list of tensors, each averaged, as the host sums them."""
    if isinstance(value, Tensor):
        return value.detach().mean()
    return torch.stack([item.detach().mean() for item in value]).sum()


def _arguments(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Any, Any, str]:
    """inputs, data_samples and mode of a host model's forward."""
    names = ('inputs', 'data_samples', 'mode')
    given = dict(zip(names, args))
    given.update({name: kwargs[name] for name in names if name in kwargs})
    return given.get('inputs'), given.get('data_samples'), given.get('mode', 'tensor')


# A compiled train_step (compile=True) breaks here and goes on: which taps are armed changes from step to step.
@torch.compiler.disable
def _before_forward(distiller: Distiller, module: nn.Module, args: Any, kwargs: Any) -> None:
    inputs, data_samples, mode = _arguments(args, kwargs)
    # A copy of the student (an EMA model made while attached) carries the hooks too, and is none of our business.
    if module is distiller.student and module.training and mode == 'loss':
        distiller.begin(inputs, data_samples)


@torch.compiler.disable
def _after_forward(distiller: Distiller, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if module is not distiller.student or not module.training or _arguments(args, kwargs)[2] != 'loss':
        return None
    if not isinstance(output, dict):  # the forward raised
        distiller._clear()
        return None
    try:
        return distiller.end(output)
    except BaseException:
        distiller._clear()
        raise


