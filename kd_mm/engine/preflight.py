"""The first pass: all models on random images before training, to find widths, sizes and what is not connected."""

import copy
import re
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.agreement import Agreement
from kd_mm.engine.outputs import Outputs
from kd_mm.engine.readers.base import Comparison, shapes_text
from kd_mm.engine.readers.maps import MapReader
from kd_mm.engine.step import Step
from kd_mm.engine.term import STUDENT, Term, need_masks
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.heads.find import of_queries
from kd_mm.hosts.models import start_counters, task_of
from kd_mm.hosts.packages import without_operation
from kd_mm.hosts.synthetic import input_channels, synthetic_batch
from kd_mm.hosts.table import host_of
from kd_mm.hosts.taps import Tap, image_size
from kd_mm.hosts.tokens import TokenSizeError
from kd_mm.losses.base.loss import total
from kd_mm.ops.live import LiveBytes, walk
from kd_mm.ops.modes import eval_mode, preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.teachers.sources import SELF
from kd_mm.teachers.speed import AUTO
from kd_mm.types.batch import KDBatch, Targets
from kd_mm.types.records import Recorded

#: Input sizes: small first, larger for models whose layers need it.
SHAPES = ((128, 128), (256, 256), (320, 320), (512, 512))


def dry_shapes(*models: nn.Module) -> List[Tuple[int, int]]:
    """:data:`SHAPES`, after the small ones that a model is built for (position embeddings of fixed length)."""
    own = []
    for model in models:
        for holder, name in ((getattr(model, 'backbone', None), 'img_size'),
                             (getattr(model, 'data_preprocessor', None), 'size')):
            size = getattr(holder, name, None)
            size = (size, size) if isinstance(size, int) else size
            if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(edge, int) for edge in size):
                own.append((size[0], size[1]))
    limit = SHAPES[-1][0] * SHAPES[-1][1]
    first = [shape for shape in own if shape[0] * shape[1] <= SHAPES[0][0] * SHAPES[0][1]]
    rest = [shape for shape in own if shape not in first and shape[0] * shape[1] <= limit]
    return list(dict.fromkeys([*first, SHAPES[0], *rest, *SHAPES[1:], *own]))


def random_data(student: Any, shape: Tuple[int, int], masks: bool = False) -> Dict[str, Any]:
    """Two random images with targets, as the student's data preprocessor gives them: ``inputs``, ``data_samples``."""
    device = next(student.parameters()).device
    if task_of(student) is None:
        return dict(inputs=torch.rand(2, input_channels(student), *shape, device=device), data_samples=())
    data = synthetic_batch(student, 2, shape, device=device, masks=masks)
    # training=False: batch augmentations draw random sizes and remember them.
    data = student.data_preprocessor(data, False)
    host = host_of(student)
    if host is not None and host.packed is not None:
        data['data_samples'] = host.packed(student, data['inputs'], data['data_samples'])
    return data


def taken(name: str) -> str:
    """The refusal of a term that is named like a loss of the student."""
    return f'the student already has a loss named {name!r}; rename the distillation loss'


def _training_but_for_leaves(model: nn.Module) -> List[nn.Module]:
    """Put all modules that hold others into training mode, which norms and dropouts do not; those that were."""
    holders = [module for module in model.modules() if next(module.children(), None) is not None]
    for module in holders:
        module.training = True
    return holders


class Preflight:
    """One forward of each model in eval mode; it changes no random state, no statistics and no gradient.

    What it finds goes into the terms of the step (adapters and generators get their widths) and into the problems.

    Args:
        step: knows the models, the terms of both directions, and their taps.
        problems: gets what is wrong.
        agreement: says whether both sides of a logit loss mean the same.
        with_losses: whether the student's own losses take part in the training.
    """

    def __init__(self, step: Step, problems: Problems, agreement: Agreement, with_losses: bool = True):
        self.step, self.problems, self.agreement, self.with_losses = step, problems, agreement, with_losses
        #: student taps that no tensor forward reaches: label assignment and what belongs to it.
        self.loss_only: List[str] = []
        #: images, data samples and batch of the last pass.
        self.given: Tuple[Tensor, Any, KDBatch]
        self._running = ''  # whose pass it is, for messages
        self._maps: List[Tensor] = []  # what the heads gave

    def run(self) -> None:
        """Run all models and prepare every term; what is wrong becomes a problem."""
        step = self.step
        terms = [term for term in step.terms if self._usable(term)]
        labelling = step.labelling
        if not terms and labelling is None:
            return
        start_counters()
        with preserved_random_state(step.seed), torch.enable_grad(), eval_mode(step.student):
            passed = self._forward()
            if passed is None:
                return
            records, batch = passed
            if labelling is not None:
                if not self.with_losses and not any(term.needs_boxes or term.needs_seg_map for term in step.terms):
                    self.problems.add('labels: with task_loss_weight=0 nothing looks at labels. Leave one of them out')
                for fault in labelling.dry(*self.given[:2], records, batch):
                    self.problems.add(fault)
            if not terms:
                return
            outputs = Outputs(step, len(self.given[0]), records, self._again)
            late = self._in_training(outputs, terms)
            for term in terms:
                try:
                    for look in (outputs.own_rows, outputs.silent):
                        problem = look(term)
                        if problem is not None:
                            raise ValueError(problem)
                    self._prepare(term, records, batch, outputs, late)
                except (KeyError, ValueError) as error:
                    text = str(error.args[0]) if error.args else repr(error)
                    self.problems.add(term.placed(text))
                except Exception as error:  # a loss that meets what its author did not think of
                    self.problems.add(term.placed(
                        f'{type(term.loss).__name__} cannot take what its taps give: '
                        f'{_given(term, records[term.learner], term.student_paths, "student")}, '
                        f'{_given(term, records[step.source_of(term, term.sources[0])], term.teacher_paths, "teacher")}'
                        f'. Tap maps (N, C, H, W), such as \'@neck\' ({type(error).__name__}: {error})'))
            shape = batch.targets.input_shape
            own = self._own_losses(shape) if self.with_losses and shape is not None else []
            for term in terms:
                if term.learner == STUDENT and term.name in own:
                    self.problems.add(taken(term.name))

    def _own_losses(self, shape: Tuple[int, int]) -> List[str]:
        """Names of the losses that the student gives by itself; none where random targets do not do for them.

        Those of a segmentor have the names of its heads in front, which no term can have.
        """
        if task_of(self.step.student) != 'detection':
            return []
        student = self.step.student
        for size in dict.fromkeys(((64, 64), shape)):
            try:
                # Losses count, average and remember in buffers and lists: those of a copy, which shares the parameters.
                copied = copy.deepcopy(student, {id(parameter): parameter for parameter in student.parameters()})
                data = random_data(copied, size, need_masks(self.step.terms))
                _training_but_for_leaves(copied)
                with torch.no_grad():
                    return list(copied(data['inputs'], data['data_samples'], mode='loss'))
            except Exception:  # models raise anything; the first step looks again
                continue
        return []

    def _usable(self, term: Term) -> bool:
        """Whether nothing wrong with the term was found so far."""
        step = self.step
        known = {*step.teachers, STUDENT, SELF}
        return bool(term.student_paths and term.teacher_paths and term.sources
                    and all(source in known for source in term.sources)
                    and all(key in step.taps for key in step.keys([term])))

    def _prepare(self, term: Term, records: Dict[str, Dict[str, Recorded]], batch: KDBatch, outputs: Outputs,
                 late: Dict[str, Recorded]) -> None:
        step = self.step
        comparison, = step.read([term], records, batch)
        for problem in (outputs.leading(term), outputs.training(term, late) if term.learner == STUDENT else None):
            if problem is not None:
                raise ValueError(problem)
        source = step.source_of(term, term.sources[0])
        if not self.agreement.levels(comparison, term.reader.meanings_of('student', records[term.learner]),
                                     term.reader.meanings_of('teacher', records[source]), source):
            return
        self._note_queries(term)
        levels = comparison.student
        term.loss.weight.check(1 if term.loss.joint else len(levels), step.max_steps)
        term.bind(term.reader.modules('student', step.model(term.learner), records[term.learner]),
                  term.reader.modules('teacher', step.model(source), records[source]))
        if source == term.learner and not term.of_heads and all(s is t for s, t in zip(levels, comparison.teacher)):
            raise ValueError(f'{term.title} compares the output of {term.student_paths} with itself, from which '
                             'nothing can be learned: give student_at and teacher_at two places (a later one teaches '
                             'an earlier one)')
        term.prepare(comparison)
        if not self._check_reach(comparison):
            self._check_cells(comparison)

    def _note_queries(self, term: Term) -> None:
        """Say where query i of one model is compared with query i of another."""
        found = [path for path in term.student_paths if not term.of_heads and not term.shared
                 and term.reader.meanings['student'].get(path) is None
                 and of_queries(self.step.model(term.learner), path)]
        if found:
            self.agreement.notes.append(
                f'{term.title}: {type(term.loss).__name__} at {found[0]!r} compares query i of the student with query '
                'i of the teacher; they are the same only in models that started from the same queries. MaskQueryLoss '
                'and DETRDistillLogitsLoss, whose `at` is the head, match them')

    def _check_reach(self, comparison: Comparison) -> bool:
        """Whether the loss has a gradient on the model that learns: False if it is exactly 0 everywhere.

        Raises:
            ValueError: it is not connected at all.
        """
        step, term = self.step, comparison.term
        with eval_mode(term):
            value = sum(step.evaluate(comparison).levels)
        parameters = [parameter for parameter in step.model(term.learner).parameters() if parameter.requires_grad]
        touched = [*parameters, *term.parameters()]
        held = [parameter.grad for parameter in touched]
        try:
            for parameter in touched:
                parameter.grad = None
            if isinstance(value, Tensor) and value.requires_grad:
                # backward() and not autograd.grad(): re-entrant activation checkpoints know the former only.
                value.backward(retain_graph=True)
            found = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if found:
                return any(bool(gradient.any()) for gradient in found)
        finally:
            for parameter, gradient in zip(touched, held):
                parameter.grad = gradient
        raise ValueError(f'{term.title} reaches no trainable parameter of the student through {term.student_paths}: '
                         'the tapped module lies before or inside the frozen part (frozen_stages), returns a detached '
                         'tensor, or lies inside a re-entrant activation checkpoint. Tap a later module')

    def _check_cells(self, comparison: Comparison) -> None:
        """Refuse maps of one cell, whatever the size of the image, for a loss that compares cells.

        Called where a first gradient is 0.  A copy of the teacher has none either, random masks may hide all once, and
        the last level of a pyramid has one cell only while the image is small.
        """
        term, before = comparison.term, self.given
        size = before[2].targets.input_shape
        if size is None or not isinstance(term.reader, MapReader) or not all(
                one_cell(s) and not (s.shape == t.shape and torch.equal(s, t))
                for s, t in zip(comparison.student, comparison.teacher)) or self._learns_from_more(comparison):
            return
        try:
            larger, _ = self._pass((2 * size[0], 2 * size[1]))
            levels = [tensor for _, tensor in term.reader.levels_of('student', larger[term.learner])]
        except Exception:  # a model for images of one size
            return
        finally:
            self.given = before
        if all(one_cell(level) for level in levels):
            raise ValueError(
                f'{term.title}: student {term.reader.where("student")} gives {shapes_text(levels)}, one cell whatever '
                f'the size of the image, and {type(term.loss).__name__} compares cells: it has nothing to learn there. '
                "Tap maps, such as '@neck', or use a loss on channels such as FitNetLoss")

    @staticmethod
    def _learns_from_more(comparison: Comparison) -> bool:
        """Whether there is a gradient with more images (relations between them) at another step (random masks)."""
        own, theirs = ([torch.cat([level.detach(), torch.randn_like(level), torch.randn_like(level)])
                        for level in levels] for levels in (comparison.student, comparison.teacher))
        for level in own:
            level.requires_grad_()
        try:
            with eval_mode(comparison.term):
                for number in range(4):
                    batch = KDBatch(Targets(input_shape=comparison.batch.targets.input_shape),
                                    replace(comparison.batch.info, step=number))
                    parts = comparison.term.evaluate(Comparison(tuple(own), tuple(theirs), batch, comparison.term))
                    value = sum(total(part) for part in parts)
                    found = torch.autograd.grad(value, own, allow_unused=True)  # type: ignore[arg-type]
                    if any(gradient is not None and bool(gradient.any()) for gradient in found):
                        return True
        except Exception:  # a loss that needs the targets of its images
            return True
        return False

    # ------------------------------------------------------------------ the passes

    def _forward(self) -> Optional[Tuple[Dict[str, Dict[str, Recorded]], KDBatch]]:
        """What all taps record on random images, at the smallest size that all models take."""
        step = self.step
        errors: Dict[str, str] = {}
        # What is seen smaller must still have maps of several cells.
        factor = max([1.0, *(1 / teacher.view.scale for teacher in step.teachers.values() if teacher.view is not None)])
        for small in dry_shapes(step.student, *(teacher.model for teacher in step.teachers.values())):
            shape = round(small[0] * factor), round(small[1] * factor)
            try:
                passed = self._pass(shape)
                self._judge_tokens(shape)
                for name, teacher in step.teachers.items():
                    if teacher.fast.refusal and teacher.fast.asked.chunk not in (None, AUTO):
                        self.problems.add(f'{step.word(name)}: speed=dict(chunk={teacher.fast.asked.chunk}) is not '
                                          f'possible: {teacher.fast.refusal}. Leave it out')
                    if teacher.fast.fault:
                        self.problems.add(f'{step.word(name)}: speed=dict(precision={teacher.fast.asked.precision!r}) '
                                          f'is not possible here: {teacher.fast.fault}. Leave it out')
                return passed
            except TokenSizeError as error:  # it would be a guess at any other size, too
                step.clear()
                self.problems.add(error)
                return None
            except Exception as error:  # models raise anything at sizes they cannot take
                text = f'{type(error).__name__}: {error}{without_operation(str(error))}'
                # The same fault at another size has other numbers in its message.
                errors.setdefault(self._running + re.sub(r'\d+', '', text),
                                  f'at {shape[0]}x{shape[1]}: {text} (the {self._running})')
                step.clear()
        foreign = '' if task_of(step.student) is not None else (
            '. The student is of no host that is known, so it was given pictures without data samples. If it needs '
            'them, describe its package: docs/hosts.md, "An entry of your own"')
        self.problems.add('the forward pass of student or teacher on random images fails. '
                          f'{"; ".join(errors.values())}{foreign}')
        return None

    def _pass(self, shape: Tuple[int, int]) -> Tuple[Dict[str, Dict[str, Recorded]], KDBatch]:
        """What all taps record on random images of one size."""
        step = self.step
        self._running = 'student'
        data = random_data(step.student, shape, need_masks(step.terms))
        inputs, samples = data['inputs'], data['data_samples']
        batch = step.batch_of(inputs, samples)
        self.given = inputs, samples, batch
        with LiveBytes() as kept:
            records: Dict[str, Dict[str, Recorded]] = {STUDENT: self._learner(STUDENT, step.student, inputs, samples)}
        gradients = sum(parameter.nbytes for parameter in step.student.parameters() if parameter.requires_grad)
        for teacher in step.teachers.values():
            teacher.fast.budget, teacher.fast.gradients = kept.held / inputs.shape[0], gradients
        self._maps = []
        for name, teacher in step.teachers.items():
            self._running = step.word(name)
            if name in step.peers:
                with eval_mode(teacher.model):
                    records[name] = self._learner(name, teacher.model, teacher.renormalise(inputs, batch), samples)
                continue
            taps = {path: tap for (owner, path), tap in step.taps.items() if owner == name}
            teacher.run(inputs, samples, list(taps.values()), batch, full=True)
            records[name] = teacher.records([tap for tap in taps.values() if tap.fired], inputs)
        return records, batch

    def _judge_tokens(self, shape: Tuple[int, int]) -> None:
        """One more pass on oblong images where tokens became maps by a guess: on square ones HxW and WxH are the same.

        Raises:
            TokenSizeError: the guess is not safe.
        """
        if shape[0] != shape[1] or not any(tap.token_size_note and tap.tokens is None
                                           for tap in self.step.taps.values()):
            return
        try:
            self._pass((shape[0], 2 * shape[1]))
        except TokenSizeError:
            raise
        except Exception:  # a model for square images alone, which will see no others
            self.step.clear()

    def _learner(self, name: str, model: nn.Module, inputs: Tensor, samples: Any) -> Dict[str, Recorded]:
        """What the taps of a model that trains record: in a forward pass, and where that is not enough in one with
        losses."""
        taps_of = {path: tap for (owner, path), tap in self.step.taps.items() if owner == name}
        size = image_size(inputs)
        # Sampled proposals are those of the losses alone: what a head predicts for others does not belong to them.
        sampled: Set[str] = {path for term in self.step.terms if term.shared and term.learner == name
                             for path in term.student_paths}
        taps = [tap for path, tap in taps_of.items() if path not in sampled]
        for tap in taps:
            tap.arm(size)
        try:
            if taps or not sampled:
                output = forward_tensor(model, inputs, copy.deepcopy(samples), [tap.path for tap in taps])
                # A head keeps what its backward pass needs as long as its maps are there. Queries and proposals are as
                # many in large images as in these small ones, so that theirs would be scaled to far too much.
                self._maps = [leaf for leaf in walk(output) if leaf.dim() == 4 and leaf.shape[0] == inputs.shape[0]]
                del output
        except Exception:
            # Some heads cannot predict for a batch (guided anchors take one image): what lies before them is known.
            if not taps or not all(tap.fired for tap in taps):
                raise
        silent = [tap for tap in taps_of.values() if not tap.fired]
        records = {tap.path: tap.read() for tap in taps if tap.fired}
        for tap in silent:
            tap.clear()
        if silent and task_of(model) is not None:
            late = self._losses(model, inputs, samples, silent)
            if name == STUDENT:
                self.loss_only = list(late)
            records.update(late)
        return records

    def _in_training(self, outputs: Outputs, terms: Sequence[Term]) -> Dict[str, Recorded]:
        """What taps of the student give in a pass with losses, those that may give something else there."""
        paths = outputs.unsettled(terms, STUDENT)
        if not paths or task_of(self.step.student) is None:
            return {}
        taps = [self.step.taps[STUDENT, path] for path in paths]
        complete = True
        try:
            self._losses(self.step.student, *self.given[:2], taps, keep=True)
        except Exception:  # losses on random pictures may fail where those on real ones do not, after the heads
            complete = False
        late = {}
        for tap in taps:
            if tap.fired and (complete or len(tap.peek()) >= len(outputs.records[STUDENT][tap.path])):
                late[tap.path] = tap.read()
            tap.clear()
        return late

    def _again(self, name: str, taps: Sequence[Tap], losses: bool) -> None:
        """Run one model once more on the images of the last pass, with taps that are not those of the step."""
        inputs, samples, batch = self.given
        model = self.step.model(name)
        if name in self.step.teachers:
            inputs, samples = self.step.teachers[name].prepare(inputs, samples, batch)
        with eval_mode(model):
            if losses:
                self._losses(model, inputs, samples, taps, keep=True)
                return
            for tap in taps:
                tap.arm(image_size(inputs))
            try:
                forward_tensor(model, inputs, copy.deepcopy(samples), [tap.path for tap in taps])
            finally:
                for tap in taps:
                    tap.disarm()

    def _losses(self, model: nn.Module, inputs: Tensor, samples: Any, silent: Sequence[Tap],
                keep: bool = False) -> Dict[str, Recorded]:
        """What fires only when losses are computed: target assignment, denoising.  With ``keep`` the taps keep it."""
        for tap in silent:
            tap.arm(image_size(inputs))
        # Some heads return in training only what their loss takes (VFNet); norms and dropouts are leaves, and stay in
        # eval. DDOD counts the positives it has seen in plain lists, which no mode stops.
        holders = _training_but_for_leaves(model)
        counts = [(value, list(value)) for module in model.modules() for value in vars(module).values()
                  if type(value) is list]
        try:
            model(inputs, copy.deepcopy(samples), mode='loss')
        finally:
            for module in holders:
                module.training = False  # the whole pass is in eval mode
            for value, before in counts:
                value[:] = before
            for tap in silent:
                tap.disarm()
        if keep:
            return {}
        late = {tap.path: tap.read() for tap in silent if tap.fired}
        for tap in silent:
            tap.clear()
        return late


def one_cell(tensor: Tensor) -> bool:
    """Whether a map has no other cell to compare with."""
    return tensor.dim() == 4 and tensor.shape[2] * tensor.shape[3] == 1


def _given(term: Term, records: Dict[str, Recorded], paths: Sequence[str], side: str) -> str:
    return f'{side} ' + ', '.join(f'{path!r} {shapes_text(records[path])}' for path in paths if records.get(path))
