"""The first pass: all models on random images before training, to find widths, sizes and what is not connected."""

import copy
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.step import Step
from kd_mm.engine.term import STUDENT, Term
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import task_of
from kd_mm.hosts.synthetic import input_channels, synthetic_batch
from kd_mm.hosts.taps import Tap, image_size
from kd_mm.hosts.tokens import TokenSizeError
from kd_mm.ops.live import LiveBytes
from kd_mm.ops.modes import eval_mode, preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.teachers.sources import SELF
from kd_mm.teachers.speed import AUTO
from kd_mm.types.batch import KDBatch
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


def random_data(student: Any, shape: Tuple[int, int]) -> Dict[str, Any]:
    """Two random images with targets, as the student's data preprocessor gives them: ``inputs``, ``data_samples``."""
    device = next(student.parameters()).device
    if task_of(student) is None:
        return dict(inputs=torch.rand(2, input_channels(student), *shape, device=device), data_samples=())
    data = synthetic_batch(student, 2, shape, device=device)
    # training=False: batch augmentations draw random sizes and remember them.
    return student.data_preprocessor(data, False)


class Preflight:
    """One forward of each model in eval mode; it changes no random state, no statistics and no gradient.

    What it finds goes into the terms of the step (adapters and generators get their widths) and into the problems.

    Args:
        step: knows the models, the terms of both directions, and their taps.
        problems: gets what is wrong.
        check: called with every comparison before its term is prepared; raises a ValueError for what the distiller
            knows better.
    """

    def __init__(self, step: Step, problems: Problems, check: Callable[[Comparison], None]):
        self.step, self.problems, self.check = step, problems, check
        #: student taps that no tensor forward reaches: label assignment and what belongs to it.
        self.loss_only: List[str] = []

    def run(self) -> None:
        """Run all models and prepare every term; what is wrong becomes a problem."""
        step = self.step
        terms = [term for term in step.terms if self._usable(term)]
        if not terms:
            return
        with preserved_random_state(step.seed), torch.enable_grad(), eval_mode(step.student):
            passed = self._forward()
            if passed is None:
                return
            records, batch = passed
            for term in terms:
                silent = [f'{step.word(name)} {path!r}' for name, path in step.keys([term])
                          if not records[name].get(path)]
                if silent:
                    self.problems.add(
                        f'{term.title}: the tap at {", ".join(silent)} never fires: the module is not used by the '
                        'forward pass, or returns no floating-point tensor. List all that do: '
                        'python tools/list_taps.py CONFIG')
                    continue
                try:
                    self._prepare(term, records, batch)
                except (KeyError, ValueError) as error:
                    text = str(error.args[0])
                    self.problems.add(text if text.startswith(term.title) else f'{term.title}: {text}')

    def _usable(self, term: Term) -> bool:
        """Whether nothing wrong with the term was found so far."""
        step = self.step
        known = {*step.teachers, STUDENT, SELF}
        return bool(term.student_paths and term.teacher_paths and term.sources
                    and all(source in known for source in term.sources)
                    and all(key in step.taps for key in step.keys([term])))

    def _prepare(self, term: Term, records: Dict[str, Dict[str, Recorded]], batch: KDBatch) -> None:
        step = self.step
        comparison, = step.read([term], records, batch)
        self.check(comparison)
        levels = comparison.student
        term.loss.weight.check(1 if term.loss.joint else len(levels), step.max_steps)
        source = step.source_of(term, term.sources[0])
        term.bind(term.reader.modules('student', step.model(term.learner), records[term.learner]),
                  term.reader.modules('teacher', step.model(source), records[source]))
        if source == term.learner and not term.of_heads and all(s is t for s, t in zip(levels, comparison.teacher)):
            raise ValueError(f'{term.title} compares the output of {term.student_paths} with itself, from which '
                             'nothing can be learned: give student_at and teacher_at two places (a later one teaches '
                             'an earlier one)')
        term.prepare(comparison)
        self._check_reach(comparison)

    def _check_reach(self, comparison: Comparison) -> None:
        """Whether the loss has a gradient on the model that learns."""
        step, term = self.step, comparison.term
        with eval_mode(term):
            total = sum(step.evaluate(comparison).levels)
        parameters = [parameter for parameter in step.model(term.learner).parameters() if parameter.requires_grad]
        touched = [*parameters, *term.parameters()]
        held = [parameter.grad for parameter in touched]
        try:
            for parameter in touched:
                parameter.grad = None
            if isinstance(total, Tensor) and total.requires_grad:
                # backward() and not autograd.grad(): re-entrant activation checkpoints know the former only.
                total.backward(retain_graph=True)
            if any(parameter.grad is not None for parameter in parameters):
                return
        finally:
            for parameter, gradient in zip(touched, held):
                parameter.grad = gradient
        raise ValueError(f'{term.title} reaches no trainable parameter of the student through {term.student_paths}: '
                         'the tapped module lies before or inside the frozen part (frozen_stages), returns a detached '
                         'tensor, or lies inside a re-entrant activation checkpoint. Tap a later module')

    # ------------------------------------------------------------------ the passes

    def _forward(self) -> Optional[Tuple[Dict[str, Dict[str, Recorded]], KDBatch]]:
        """What all taps record on random images, at the smallest size that all models take."""
        step = self.step
        errors: Dict[str, str] = {}
        for shape in dry_shapes(step.student, *(teacher.model for teacher in step.teachers.values())):
            try:
                passed = self._pass(shape)
                self._judge_tokens(shape)
                for name, teacher in step.teachers.items():
                    if teacher.fast.refusal and teacher.fast.asked.chunk not in (None, AUTO):
                        self.problems.add(f'{step.word(name)}: speed=dict(chunk={teacher.fast.asked.chunk}) is not '
                                          f'possible: {teacher.fast.refusal}. Leave it out')
                return passed
            except TokenSizeError as error:  # it would be a guess at any other size, too
                step.clear()
                self.problems.add(error)
                return None
            except Exception as error:  # models raise anything at sizes they cannot take
                errors.setdefault(f'{type(error).__name__}: {error}', f'{shape[0]}x{shape[1]}')
                step.clear()
        tried = '; '.join(f'at {size}: {message}' for message, size in errors.items())
        self.problems.add(f'the forward pass of student or teacher on random images fails. {tried}')
        return None

    def _pass(self, shape: Tuple[int, int]) -> Tuple[Dict[str, Dict[str, Recorded]], KDBatch]:
        """What all taps record on random images of one size."""
        step = self.step
        data = random_data(step.student, shape)
        inputs, samples = data['inputs'], data['data_samples']
        batch = step.batch_of(inputs, samples)
        with LiveBytes() as kept:
            records: Dict[str, Dict[str, Recorded]] = {STUDENT: self._learner(STUDENT, step.student, inputs, samples)}
        for teacher in step.teachers.values():
            teacher.fast.budget = kept.held / inputs.shape[0]
        for name, teacher in step.teachers.items():
            if name in step.peers:
                with eval_mode(teacher.model):
                    records[name] = self._learner(name, teacher.model, teacher.renormalise(inputs, batch), samples)
                continue
            taps = {path: tap for (owner, path), tap in step.taps.items() if owner == name}
            teacher.run(inputs, samples, list(taps.values()), batch, full=True)
            records[name] = {path: tap.read() for path, tap in taps.items() if tap.fired}
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
                forward_tensor(model, inputs, copy.deepcopy(samples), list(taps_of))
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

    def _losses(self, model: nn.Module, inputs: Tensor, samples: Any, silent: Sequence[Tap]) -> Dict[str, Recorded]:
        """What fires only when losses are computed: target assignment, denoising."""
        for tap in silent:
            tap.arm(image_size(inputs))
        # Some heads return in training only what their loss takes (VFNet); norms and dropouts are leaves, and stay in
        # eval. DDOD counts the positives it has seen in plain lists, which no mode stops.
        holders = [module for module in model.modules() if next(module.children(), None) is not None]
        for module in holders:
            module.training = True
        counts = [(value, list(value)) for module in model.modules() for value in vars(module).values()
                  if type(value) is list]
        try:
            model(inputs, copy.deepcopy(samples), mode='loss')
        finally:
            for module in holders:
                module.training = False  # the whole pass is in eval mode
            for value, before in counts:
                value[:] = before
            late = {tap.path: tap.read() for tap in silent if tap.fired}
            for tap in silent:
                tap.clear()
        return late
