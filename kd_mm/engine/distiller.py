"""One student pass and one teacher pass -> a dict of losses.

The :class:`Distiller` attaches to a model it does not own: two hooks on the student's forward, nothing else.  Before
the student computes its training losses the teacher runs on the same images; the distiller's taps collect the
student's features on the way; and the distillation terms are added to the returned loss dict, which the host sums as
usual.
"""

from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.agreement import Agreement
from kd_mm.engine.attach import attach
from kd_mm.engine.balance import Balance, tasks_of, total_value
from kd_mm.engine.branches import Branches
from kd_mm.engine.labelling import Labelling
from kd_mm.engine.likeness import Likeness
from kd_mm.engine.naming import Names
from kd_mm.engine.preflight import Preflight, taken
from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.shares import GradientShares
from kd_mm.engine.step import Evaluation, Step
from kd_mm.engine.term import STUDENT, Term, mirror_of
from kd_mm.engine.watch import Watch
from kd_mm.hosts.models import task_of
from kd_mm.hosts.own_loss import ALL, kept_from, left_out, skipped
from kd_mm.hosts.swap import Swap
from kd_mm.hosts.versions import require
from kd_mm.hosts.weights import inherit_weights, ways_to_inherit
from kd_mm.losses.base.loss import opponents_of
from kd_mm.losses.base.opponent import Opponent
from kd_mm.ops import distributed
from kd_mm.ops.problems import Problems
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.peer import PeerTeacher
from kd_mm.teachers.sources import SELF, build_teachers
from kd_mm.teachers.speed import AUTO


class Distiller(nn.Module):
    """Distils a teacher into a student that it does not own.

    ``parameters()`` are the trainable extras (adapters, generators): neither the student nor the teacher is a
    sub-module.  Building checks everything that can be checked before the first step, by one forward of each model
    on random images in eval mode that changes no random state and no statistics, and reports all problems at once.

    Args:
        student: the model in training.
        teacher: config path, installed config name (``mmdet::...``), config dict, ``nn.Module``, or one of the other
            sources of :mod:`kd_mm.teachers.sources`.
        losses: name -> config, see :class:`Term`. Names start with ``loss_``.
        teacher_ckpt: path or URL of the teacher's weights; None for the published weights of an installed config;
            ``'random'`` for none (tests).
        teacher_strict: whether the weights must fit exactly. Default True.
        teachers: several of them instead: name -> ``dict(teacher=..., teacher_ckpt=..., teacher_strict=...,
            speed=..., view=..., input_key=..., classes=...)``. Losses say which one they mean with
            ``teacher='name'`` (or several names, whose outputs are averaged).
        inherit: what :meth:`inherit_weights` gives the student of the teacher's weights: module paths, or path -> how
            (``'copy'``; ``'grow'`` and ``'grow_from_background'``, see :mod:`kd_mm.hosts.growing`). Default none.
        task_loss_weight: factor on the student's own losses, from 0 (teacher alone). Default 1.
        task_classes: ``'new'``: its own classification loss teaches the classes alone that the teacher does not know,
            see :mod:`kd_mm.hosts.own_loss`. Default ``'all'``.
        seed: of the initial adapters and of random masks. Default 0.
        speed: in which form teachers run, see :mod:`kd_mm.teachers.speed`: ``'auto'`` (default), ``'exact'``,
            ``'tune'`` or a dict.
        classes: the student's class names, if known.
        scope: registry scope of the student (``'mmdet'``, ``'mmseg'``, another host's).
        max_steps: iterations of the whole training, 0 if unknown; schedules that count from the end need it.
        folder: that of the student's config: relative paths of teachers are looked for there after the current folder.
        agreement: every so many iterations it is measured how alike student and teacher are, see
            :class:`kd_mm.engine.likeness.Likeness`; :meth:`after_step` gives it. Default 0: never.
        view: at which size the teacher sees the batch, see :class:`kd_mm.teachers.view.View`. Default: the student's.
        input_key: name of a field of the samples that the teacher is shown instead of the student's pictures, see
            :mod:`kd_mm.teachers.beside`. Default none.
        class_map: which classes of the teacher are which of the student's, see
            :func:`kd_mm.ops.classes.map_classes`: for logits and labels that do not say it. Default none.
        labels: what is added to the labels in each step, see :class:`kd_mm.teachers.labels.base.Labeller`: one config,
            or several by name. Default none. With labels there may be no losses.

    Raises:
        ValueError: the configuration is wrong; all problems in one message.
    """

    student: Any  # a host model: mypy knows nothing of its attributes

    def __init__(self, student: nn.Module, teacher: Any, losses: Any, *, teacher_ckpt: Optional[str] = None,
                 teacher_strict: bool = True, teachers: Any = None, inherit: Any = (),
                 task_loss_weight: float = 1.0, task_classes: str = ALL, seed: int = 0, speed: Any = AUTO,
                 classes: Optional[Sequence[str]] = None, scope: Optional[str] = None, max_steps: int = 0,
                 folder: Optional[str] = None, agreement: int = 0, view: Any = None, input_key: Optional[str] = None,
                 class_map: Any = None, labels: Any = None):
        require()
        super().__init__()
        self.__dict__['student'] = student  # past nn.Module, which would make it a sub-module
        self.task_loss_weight = task_loss_weight
        self.inherit, self.grown = ways_to_inherit(inherit), list[str]()  # the latter: what grew, in words
        self.classes = list(classes) if classes else None
        self._wrapper: List[nn.Module] = []  # in a list, or it would become a sub-module
        self._handles: List[Any] = []
        self.watch = Watch()
        self.balance = Balance()
        self.likeness = Likeness(agreement, task_of(student) == 'segmentation')
        self._log: Dict[str, Tensor] = {}
        self.terms = nn.ModuleDict()
        self.problems = Problems()
        self._swaps: List[Swap] = []  # of the student's own loss
        self._opened = False
        #: whether the student's own losses may be left out where they count nothing
        self.may_skip = True
        #: whether the student was run in training so far, with or without ``mode='loss'``
        self.asked = False
        #: of a semi-supervised detector in which the student is; None for a student that is trained as a whole
        self.branches: Optional[Branches] = None

        losses = {} if labels is not None and losses is None else losses
        if not hasattr(losses, 'items') or not (losses or labels is not None):
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
        self.teachers: Dict[str, Teacher] = build_teachers(
            student, teacher, teacher_ckpt, teacher_strict, teachers, self.problems, scope=scope, seed=seed,
            classes=self.classes, speed=speed, folder=folder, view=view, input_key=input_key, class_map=class_map)
        self.names = Names(student, self.classes, self.teachers)
        self._alone = isinstance(teacher, str) and teacher == SELF and teachers is None
        #: the step in progress, see :class:`kd_mm.engine.step.Step`.
        self.current = Step(student, self.teachers, list(self.all_terms()), seed, max_steps)
        #: weights that follow the student's gradients.
        self.shares = GradientShares(student, self.current)
        for term in self.all_terms():
            self._choose_sources(term)
            self._mirror(term, losses.get(term.name))
        for term in self.current.terms:
            self._make_taps(term)
            if term.loss.weight.auto is not None and task_loss_weight == 0 and term.learner == STUDENT:
                self.problems.add(f"{term.title}: loss_weight='auto' holds the term at a share of the student's own "
                                  'losses, and task_loss_weight=0 leaves none. Give a number')
        self.labelling = Labelling(student, self.teachers, labels, self.names, self.problems)
        self.current.use_labels(self.labelling)
        self.agreement = Agreement(self.problems, self.names)
        self.balance.start(self.current.terms)
        for fault in self.shares.faults():
            self.problems.add(fault)
        self._check_data()
        self.inherit_weights(problems=self.problems)
        #: classes that the student's own loss does not teach
        self.leaves_out: List[int] = []
        try:
            self.leaves_out = left_out(
                student, task_classes, (self.classes, self.teacher.classes if self.teacher else None))
        except ValueError as error:
            self.problems.add(error)
        # With the weight 0 the student's own losses are not computed, or taken as none.
        preflight = Preflight(self.current, self.problems, self.agreement, with_losses=task_loss_weight != 0)
        if self.teachers or any(SELF in term.sources for term in self.all_terms()):
            preflight.run()
        self._loss_only = preflight.loss_only
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
        if not peers:
            return
        try:
            mirror = mirror_of(term, cfg, peers[0])
        except (KeyError, ValueError) as error:
            self.problems.add(error)
            return
        self.teachers[peers[0]].add(term.name, mirror)  # type: ignore[attr-defined]
        self.current.terms.append(mirror)

    @property
    def peers(self) -> Dict[str, PeerTeacher]:
        """The teachers that are students themselves."""
        return self.current.peers

    @property
    def step(self) -> int:
        """Number of the iteration, from 0; whoever trains sets it."""
        return self.current.number

    @step.setter
    def step(self, number: int) -> None:
        self.current.number = number

    @property
    def max_steps(self) -> int:
        """Iterations of the whole training, 0 if unknown."""
        return self.current.max_steps

    @property
    def seed(self) -> int:
        """Seed of the initial adapters and of random masks."""
        return self.current.seed

    def _make_taps(self, term: Term) -> None:
        step = self.current

        def locate(side: str, name: str) -> None:
            for path in term.reader.locate(side, step.model(name)):
                step.add_tap(name, path, term.reader.keeps_calls(path), term.tokens[side],
                             side == 'student' and path in term.reader.optional)

        def attempt(call: Any, *args: Any) -> None:
            try:
                call(*args)
            except (KeyError, ValueError) as error:
                self.problems.add(term.placed(str(error.args[0])))

        attempt(locate, 'student', term.learner)
        for source in term.sources:
            name = step.source_of(term, source)
            if name == STUDENT or name in self.teachers:
                attempt(locate, 'teacher', name)
                attempt(term.reader.settle, step.model(term.learner), step.model(name))
                teachers = [self.teachers[model] for model in (name, term.learner) if model in self.teachers]
                attempt(term.check_pixels, any(teacher.size is not None for teacher in teachers),
                        any(teacher.view is not None for teacher in teachers))

    def opponents(self) -> List[Opponent]:
        """What adversarial losses train against the student, with optimizers of their own."""
        return [opponent for term in self.all_terms() for opponent in opponents_of(term.loss)]

    def all_terms(self) -> Iterable[Term]:
        return self.terms.values()  # type: ignore[return-value]

    def classes_of(self, name: str) -> Optional[List[str]]:
        """Class names of a model, if known."""
        return self.names.classes_of(name)

    def _check_data(self) -> None:
        """Problems of terms with the kind of data and with the classes of both models."""
        task = task_of(self.student)
        for term in self.current.terms:
            if term.needs_boxes and task == 'segmentation':
                self.problems.add(f'{term.title}: {type(term.region or term.loss).__name__} needs ground-truth boxes, '
                                  'which segmentation data do not have. Use a loss or region without boxes '
                                  '(SegClassRegion makes regions from the labels)')
            for source in term.sources:
                self.agreement.names(term, source, self.current.source_of(term, source))
            self.agreement.unite(term)

    # ------------------------------------------------------------------ life

    def trainable_modules(self) -> nn.ModuleDict:
        """The extras, whose state dict a checkpoint keeps under its side key."""
        return self.terms

    def follow(self, wrapper: nn.Module) -> None:
        """Average the gradients of the extras whenever this DDP wrapper of the student averages the student's."""
        self._wrapper = [wrapper]
        distributed.broadcast(self)

    def move(self, student: nn.Module) -> None:
        """Go over to another instance of the same student, whose parts may be wrapped: before it is attached."""
        self.__dict__['student'] = student
        self.current.move(student)
        self.labelling.move(student)
        for teacher in self.teachers.values():
            if isinstance(teacher, EMATeacher):
                teacher.move(student)
        self.shares = GradientShares(student, self.current)

    def inherit_weights(self, student: Optional[nn.Module] = None, problems: Optional[Problems] = None) -> None:
        """Give a student (its own) what it inherits of the teacher; only look if ``problems`` are to be collected."""
        if self.teacher is not None:
            found, self.grown = problems or Problems(), []
            for problem in inherit_weights(student or self.student, self.teacher.model, self.inherit, problems is None,
                                           (self.classes, self.teacher.classes), self.grown):
                found.add(problem)
            if problems is None:
                found.raise_any()

    def start_peers(self, optim_wrapper: Any, scale: float = 1.0) -> None:
        """Make the optimizers of the peers: before the first step, when the weights are there.

        Args:
            optim_wrapper: the config of the student's, for peers that have none of their own.
            scale: of the learning rates (``auto_scale_lr``).

        Raises:
            ValueError: there is none, it cannot be built, or it scales losses.
        """
        for peer in self.peers.values():
            peer.start_optimizer(optim_wrapper, self.max_steps, scale)

    def attach(self) -> None:
        """Put the two hooks on the student.

        Raises:
            RuntimeError: a distiller is attached already.
        """
        self._handles = attach(self) if self.branches is None else self.branches.attach(self)

    def detach(self) -> None:
        """Take the hooks off and free what was captured; doing it twice is harmless."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.shares.stop()
        for opponent in self.opponents():
            opponent.forget()

    def clear(self) -> None:
        """Restore the models and free what a step recorded; doing it twice is harmless."""
        self.current.clear()
        self._restore_task_loss()
        self._opened = False

    # ------------------------------------------------------------------ a step

    def active_terms(self) -> List[Term]:
        """Terms of the student whose weight is not 0 at the current step."""
        return [term for term in self.current.weighted_terms() if term.learner == STUDENT]

    def begin(self, inputs: Any, data_samples: Any, label: bool = True) -> Any:
        """Teach and start collecting: called before the student's training forward.

        Args:
            label: whether teachers may add labels.

        Returns:
            The data samples for it: those that were given, or new ones with more labels.
        """
        self.clear()
        self.raise_if_not_finite()
        if self.leaves_out:
            self._swaps.append(kept_from(self.student, self.leaves_out).on())
        label = label and bool(self.labelling)
        if not self.active_terms() and not self.peers and not label:
            return data_samples
        if not isinstance(inputs, Tensor):
            raise ValueError(f'the student is given {type(inputs).__name__} inputs, not one batch of images')
        self.current.begin(inputs, data_samples)
        self.current.teach(inputs, data_samples)
        if label:
            data_samples = self.current.label(inputs, data_samples)
            self._log.update(self.labelling.log)
        self.current.pair(inputs, data_samples)
        paths = self.current.listen()
        self._opened = True
        if (self.task_loss_weight == 0 and self.may_skip and self.current.active
                and not set(paths) & set(self._loss_only)):
            self._swaps.append(skipped(self.student, paths).on())
        return data_samples

    def _restore_task_loss(self) -> None:
        while self._swaps:
            self._swaps.pop().off()

    def evaluate(self) -> List[Tuple[Comparison, Evaluation]]:
        """What the terms of both directions compare and what they make of it; called after :meth:`begin` and the
        student's training forward."""
        self._restore_task_loss()
        if not self._opened:
            return []
        self.current.hear()
        return [(comparison, self.current.evaluate(comparison)) for comparison in self.current.read()]

    def end(self, losses: Dict[str, Any]) -> Dict[str, Any]:
        """The student's loss dict with the distillation terms; called after its training forward."""
        pairs = self.evaluate()
        found = [evaluation for _, evaluation in pairs]
        if self.likeness.due(self.step, self.max_steps):
            self._log.update(self.likeness.measure([comparison for comparison, _ in pairs]))
        self.watch.gradients(self.current, found)
        found = self.weigh(losses, found)
        result = self.add(losses, found)
        self.clear()
        return result

    @contextmanager
    def logged(self, prefix: str) -> Iterator[None]:
        """What is noted for the log inside gets names with a prefix."""
        before, self._log = self._log, {}
        try:
            yield
        finally:
            self._log = {**before, **{f'{prefix}{name}': value for name, value in self._log.items()}}

    def weigh(self, losses: Dict[str, Any], found: Sequence[Evaluation]) -> List[Evaluation]:
        """The evaluations of a step with the weights that are measured, see :mod:`kd_mm.engine.balance`."""
        return self.balance.apply(self.current, found, tasks_of(self.current, losses, self.task_loss_weight))

    def add(self, losses: Dict[str, Any], found: Sequence[Evaluation]) -> Dict[str, Any]:
        """The student's loss dict with what the terms of a step gave; peers make their own update.

        Args:
            losses: of the host.
            found: of both directions.

        Raises:
            ValueError: the student already has a loss of that name.
        """
        task = {name: value for name, value in losses.items() if 'loss' in name}
        result = dict(losses)
        if self.task_loss_weight != 1.0:
            for name, value in task.items():
                result[name] = ([item * self.task_loss_weight for item in value] if isinstance(value, (list, tuple))
                                else value * self.task_loss_weight)
        own = [evaluation for evaluation in found if evaluation.term.learner == STUDENT]
        for evaluation in own:
            term = evaluation.term
            if term.name in result:
                raise ValueError(taken(term.name))
            result[term.name] = evaluation.total
            weights = evaluation.weights
            result[f'kd_weight_{term.label}'] = evaluation.total.new_tensor(sum(weights) / len(weights))
            self._log.update({f'{term.name}/{part}': value for part, value in evaluation.parts.items()})
        if self._opened:
            for name, peer in self.peers.items():
                result.update(peer.learn([evaluation.total for evaluation in found if evaluation.term.learner == name],
                                         self.step))
        if not own:
            return result
        for label, share in self.balance.shares([evaluation.term for evaluation in own]).items():
            self._log[f'kd_share_{label}'] = own[0].total.new_tensor(share)
        self.watch.values([level for evaluation in own for level in evaluation.levels],
                          [f'{evaluation.term.name}, level {index}' for evaluation in own
                           for index in range(len(evaluation.levels))], self.step)
        distributed.average_after_backward(own[0].total, [
            parameter for evaluation in own for parameter in evaluation.term.parameters()],
            next(iter(self._wrapper), None))
        if not task and self._wrapper:
            # DDP waits for a gradient of every parameter, also of those that no term reaches.
            first = own[0].term.name
            result[first] = result[first] + 0 * sum(
                p.flatten()[0] for p in self.student.parameters() if p.requires_grad)
        with torch.no_grad():
            kd = sum(evaluation.total.detach() for evaluation in own)
            tasks = sum(total_value(result[name]) for name in task)
            if isinstance(tasks, Tensor) and isinstance(kd, Tensor):
                result['kd_task_ratio'] = kd / tasks.abs().clamp(min=1e-12)
        return result

    def after_step(self, rate: float = 1.0, update: bool = True) -> Dict[str, Tensor]:
        """Let the opponents of adversarial losses make their own step: called after the student's.

        The hook does it after every iteration; a training loop without a Runner has to.

        Args:
            rate: learning rate of the student as a fraction of its first one; the opponents follow it.
            update: whether the student's optimizer has stepped; if not, it accumulates, and so do the opponents.

        Returns:
            Numbers for the log that are no losses of the step: what they minimise (``kd_opponent_<name>``, summed over
            the levels of a term), the parts of each term (``loss_fgd/fg``), the share of the task's pull that was
            measured last for a weight of ``'auto'`` (``kd_share_<name>``), and in some iterations how alike the two
            models are (``kd_agree_<name>``).
        """
        result: Dict[str, Tensor] = {}
        for term in self.all_terms():
            found = [opponent.learn(rate, update) for opponent in opponents_of(term.loss)]
            values = [value for value in found if value is not None]
            if values:
                result[f'kd_opponent_{term.label}'] = torch.stack(values).sum()
        self.watch.values(list(result.values()), list(result), self.step)
        result.update(self._log)
        self._log = {}
        return result

    def raise_if_not_finite(self) -> None:
        """Stop if a term of the last step was not finite.

        Raises:
            FloatingPointError: naming term, level and step.
        """
        self.watch.raise_if_not_finite()
