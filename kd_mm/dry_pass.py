"""The dry pass: both models on random images before training, to find widths, sizes and what is not connected."""

import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from kd_mm.synthetic import synthetic_batch
from kd_mm.taps import Recorded, TokenSizeError, image_size, read_taps
from kd_mm.teacher import eval_mode, forward_tensor, preserved_random_state, task_of
from kd_mm.teacher_sources import SELF
from kd_mm.terms import Term
from kd_mm.types import Features, KDBatch

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
        return dict(inputs=torch.rand(2, 3, *shape, device=device), data_samples=())
    data = synthetic_batch(student, 2, shape, device=device)
    # training=False: batch augmentations draw random sizes and remember them.
    return student.data_preprocessor(data, False)


class DryPass:
    """One forward of each model in eval mode; it changes no random state, no statistics and no gradient.

    What it finds goes into the distiller's terms (adapters and generators get their widths) and problems.

    Args:
        distiller: the :class:`kd_mm.distiller.Distiller` that is being built; its terms, taps and teachers are there.
    """

    def __init__(self, distiller: Any):
        self.distiller = distiller
        #: student taps that no tensor forward reaches: label assignment and what belongs to it.
        self.loss_only: List[str] = []

    def run(self) -> None:
        """Run both models and prepare every term; add what is wrong to the distiller's problems."""
        distiller = self.distiller
        terms = [term for term in distiller.all_terms() if self._usable(term)]
        if not terms:
            return
        with preserved_random_state(distiller.seed), torch.enable_grad(), eval_mode(distiller.student):
            passed = self._forward()
            if passed is None:
                return
            student, teacher, batch = passed
            for term in terms:
                silent = self._silent(term, student, teacher)
                if silent:
                    distiller.problems.add(
                        f'{term.name}: the tap at {", ".join(silent)} never fires: the module is not used by the '
                        'forward pass, or returns no floating-point tensor. List all that do: '
                        'python tools/list_taps.py CONFIG')
                    continue
                try:
                    self._prepare(term, student, teacher, batch)
                except (KeyError, ValueError) as error:
                    text = str(error.args[0])
                    distiller.problems.add(text if text.startswith(term.name) else f'{term.name}: {text}')

    def _usable(self, term: Term) -> bool:
        """Whether nothing wrong with the term was found so far."""
        distiller = self.distiller
        return bool(term.student_paths and term.teacher_paths and term.sources
                    and all(path in distiller._student_taps for path in distiller._student_paths([term]))
                    and all(source == SELF or source in distiller.teachers for source in term.sources)
                    and all(key in distiller._teacher_taps for source in term.sources if source != SELF
                            for key in distiller._keys([term], source)))

    def _silent(self, term: Term, student: Dict[str, Recorded],
                teacher: Dict[Tuple[str, str], Recorded]) -> List[str]:
        """The taps of a term that recorded nothing, in words."""
        distiller = self.distiller
        silent = [f'student {path!r}' for path in distiller._student_paths([term]) if not student.get(path)]
        return silent + [f'{distiller._side(source)} {path!r}' for source in term.sources if source != SELF
                         for _, path in distiller._keys([term], source) if not teacher.get((source, path))]

    def _prepare(self, term: Term, student: Dict[str, Recorded], teacher: Dict[Tuple[str, str], Recorded],
                 batch: KDBatch) -> None:
        distiller = self.distiller
        features = distiller._features(term, student, teacher)
        distiller._check_classes(term, *features)
        term.loss.weight.check(1 if term.loss.joint else len(features[0]), distiller.max_steps)
        records = distiller._records(term, term.sources[0], student, teacher)
        first = distiller.teachers.get(term.sources[0])
        term.bind(distiller.student, distiller.student if first is None else first.model, student, records)
        term.prepare(*features)
        for peer in distiller.peers.values():
            if term.name in peer.terms:
                mirror: Any = peer.terms[term.name]
                mirror.prepare(features[1], features[0])
        self._check_reach(term, features[0], features[1], term.with_logits(batch, student, records))

    def _check_reach(self, term: Term, student: Features, teacher: Features, batch: KDBatch) -> None:
        """Whether the loss has a gradient on the student."""
        with eval_mode(term):
            total = sum(term.per_level(student, teacher, batch))
        parameters = [parameter for parameter in self.distiller.student.parameters() if parameter.requires_grad]
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
        raise ValueError(f'{term.name} reaches no trainable parameter of the student through {term.student_paths}: '
                         'the tapped module lies before or inside the frozen part (frozen_stages), returns a detached '
                         'tensor, or lies inside a re-entrant activation checkpoint. Tap a later module')

    def _forward(self) -> Optional[Tuple[Dict[str, Recorded], Dict[Tuple[str, str], Recorded], KDBatch]]:
        """Features of all taps on random images, at the smallest size that all models take."""
        distiller = self.distiller
        errors: Dict[str, str] = {}
        for shape in dry_shapes(distiller.student, *(teacher.model for teacher in distiller.teachers.values())):
            try:
                passed = self._pass(shape)
                self._judge_tokens(shape)
                return passed
            except TokenSizeError as error:  # it would be a guess at any other size, too
                distiller._clear()
                distiller.problems.add(error)
                return None
            except Exception as error:  # models raise anything at sizes they cannot take
                errors.setdefault(f'{type(error).__name__}: {error}', f'{shape[0]}x{shape[1]}')
                distiller._clear()
        tried = '; '.join(f'at {size}: {message}' for message, size in errors.items())
        distiller.problems.add(f'the forward pass of student or teacher on random images fails. {tried}')
        return None

    def _pass(self, shape: Tuple[int, int]) -> Tuple[Dict[str, Recorded], Dict[Tuple[str, str], Recorded], KDBatch]:
        """Features of all taps on random images of one size."""
        distiller = self.distiller
        data = random_data(distiller.student, shape)
        batch = distiller._batch(data['inputs'], data['data_samples'])
        student = self._student(data)
        found: Dict[Tuple[str, str], Recorded] = {}
        for source, teacher in distiller.teachers.items():
            taps = {key: tap for key, tap in distiller._teacher_taps.items() if key[0] == source}
            teacher.run(data['inputs'], data['data_samples'], list(taps.values()), batch, full=True)
            found.update({key: tap.read() for key, tap in taps.items() if tap.fired})
        return student, found, batch

    def _judge_tokens(self, shape: Tuple[int, int]) -> None:
        """One more pass on oblong images where tokens became maps by a guess: on square ones HxW and WxH are the same.

        Raises:
            TokenSizeError: the guess is not safe.
        """
        distiller = self.distiller
        taps = (*distiller._student_taps.values(), *distiller._teacher_taps.values())
        if shape[0] != shape[1] or not any(tap.token_size_note and tap.tokens is None for tap in taps):
            return
        try:
            self._pass((shape[0], 2 * shape[1]))
        except TokenSizeError:
            raise
        except Exception:  # a model for square images alone, which will see no others
            distiller._clear()

    def _student(self, data: Dict[str, Any]) -> Dict[str, Recorded]:
        distiller = self.distiller
        student, taps_of = distiller.student, distiller._student_taps
        size = image_size(data['inputs'])
        # Sampled proposals are those of the losses alone: what a head predicts for others does not belong to them.
        sampled = {path for term in distiller.all_terms() if term.shared for path in term.student_paths}
        taps = [tap for path, tap in taps_of.items() if path not in sampled]
        for tap in taps:
            tap.arm(size)
        try:
            if taps or not sampled:
                forward_tensor(student, data['inputs'], copy.deepcopy(data['data_samples']), list(taps_of))
        except Exception:
            # Some heads cannot predict for a batch (guided anchors take one image): what lies before them is known.
            if not taps or not all(tap.fired for tap in taps):
                raise
        silent = [tap for tap in taps_of.values() if not tap.fired]
        records = read_taps([tap for tap in taps if tap.fired])
        for tap in silent:
            tap.clear()
        if silent and task_of(student) is not None:
            records.update(self._student_losses(data, silent))
        return records

    def _student_losses(self, data: Dict[str, Any], silent: List[Any]) -> Dict[str, Recorded]:
        """What fires only when losses are computed: target assignment, denoising."""
        student = self.distiller.student
        for tap in silent:
            tap.arm(image_size(data['inputs']))
        # Some heads return in training only what their loss takes (VFNet); norms and dropouts are leaves, and stay in
        # eval. DDOD counts the positives it has seen in plain lists, which no mode stops.
        holders = [module for module in student.modules() if next(module.children(), None) is not None]
        for module in holders:
            module.training = True
        counts = [(value, list(value)) for module in student.modules() for value in vars(module).values()
                  if type(value) is list]
        try:
            student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        finally:
            for module in holders:
                module.training = False  # the dry pass is in eval mode
            for value, before in counts:
                value[:] = before
            late = read_taps([tap for tap in silent if tap.fired])
            self.loss_only = list(late)
            self.distiller._clear()
        return late
