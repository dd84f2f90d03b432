"""One training step in named phases.

::

    before the student's forward
      begin      the facts of the batch, the terms that have a weight at this step
      teach      every teacher runs, keeps what its taps recorded, and frees the rest
      label      what teachers predict is added to the labels that the student will see
      pair       every peer makes its training forward, with the same labels
      listen     the student's taps are armed
    the host's own forward with its losses
    after it
      hear       the student's taps are read
      read       a comparison for each term: what needs both sides is asked of the teacher's head, on kept features
      evaluate   adapter, region, loss and weights of one comparison
      clear      everything that was recorded is freed, also after an exception

A teacher runs while nothing of the student's graph exists yet, so that the two never add up: a step needs the memory
of the plain step, or of the teacher's own forward where that is more, and what the taps keep.

A :class:`~kd_mm.engine.term.Term` says which model learns and which ones it learns from.  With a peer (mutual learning)
there are terms in both directions, and all of this is the same for them.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.labelling import Labelling
from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.term import STUDENT, Term
from kd_mm.hosts.models import ignored_label
from kd_mm.hosts.samples import samples_of
from kd_mm.hosts.taps import Tap, image_size
from kd_mm.hosts.tokens import TokenSize
from kd_mm.losses.base.loss import total
from kd_mm.ops import distributed
from kd_mm.ops.live import storage_key
from kd_mm.ops.modes import preserved_random_state
from kd_mm.teachers import chunk
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.peer import PeerTeacher
from kd_mm.teachers.sources import SELF
from kd_mm.types.batch import Features, KDBatch, StepInfo, Targets
from kd_mm.types.records import Recorded

#: Name of a model and path in it.
Key = Tuple[str, str]
#: What was recorded in a step: name of a model -> path -> record.
Recordings = Mapping[str, Mapping[str, Recorded]]


@dataclass
class Evaluation:
    """What one term makes of its comparison.

    Attributes:
        term: whose it is.
        levels: the loss of each level, without weights.
        weights: of the levels, at this step.
        total: what is added to the losses of the side that learns.
        parts: name -> value of each named part of the loss, weighted, detached; for the log.
    """

    term: Term
    levels: List[Tensor]
    weights: List[float]
    total: Tensor
    parts: Dict[str, Tensor]


class Step:
    """The phases of a step, for one student and its teachers.

    Args:
        student: the model in training.
        teachers: by name.
        terms: of both directions; a list that may still grow while the distiller is built.
        seed: of what is drawn.
        max_steps: iterations of the whole training, 0 if unknown.

    Attributes:
        number: which iteration it is, from 0; set by whoever trains.
        active: the terms of this step, all that have a weight other than 0.
        batch: images and targets of this step.
        records: what the taps recorded in this step.
    """

    def __init__(self, student: nn.Module, teachers: Dict[str, Teacher], terms: List[Term], seed: int = 0,
                 max_steps: int = 0):
        self.student, self.teachers, self.terms = student, teachers, terms
        self.seed, self.max_steps, self.number = seed, max_steps, 0
        self.taps: Dict[Key, Tap] = {}
        self._label_taps: List[Key] = []
        #: what the student is to be given in this step: the data samples, with the labels of teachers.
        self.samples: Any = None
        self.active: List[Term] = []
        self.batch: Optional[KDBatch] = None
        self.records: Dict[str, Dict[str, Recorded]] = {}
        #: what adds to the labels; None for nothing.
        self.labelling: Optional[Labelling] = None
        self._lending = ExitStack()  # what the student's modules get from teachers in its forward
        for teacher in teachers.values():
            teacher.share_start(student)

    # ------------------------------------------------------------------ who and where

    @property
    def peers(self) -> Dict[str, PeerTeacher]:
        """The teachers that are students themselves."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, PeerTeacher)}

    def model(self, name: str) -> nn.Module:
        """The model behind a name; the student for names that no teacher has."""
        return self.teachers[name].model if name in self.teachers else self.student

    def move(self, student: nn.Module) -> None:
        """Go over to another instance of the same student."""
        self.student = student
        for (name, _), tap in self.taps.items():
            if name == STUDENT:
                tap.move(student)
        for teacher in self.teachers.values():
            teacher.fast.shared = None  # it compares the modules of the instance before, and would keep them
        if self.labelling is not None:
            self.labelling.move(student)

    @staticmethod
    def source_of(term: Term, source: str) -> str:
        """Name of the model behind one of a term's sources."""
        return term.learner if source == SELF else source

    def keys(self, terms: Sequence[Term]) -> List[Key]:
        """Every tap that these terms read, once."""
        found = [(term.learner, path) for term in terms for path in term.student_paths]
        found += [(self.source_of(term, source), path) for term in terms for source in term.sources
                  for path in term.teacher_paths]
        return list(dict.fromkeys(found))

    def add_tap(self, name: str, path: str, calls: bool, tokens: Optional[TokenSize] = None,
                optional: bool = False) -> None:
        """Make the tap of a path, or let the one that is there do what another term wants besides.

        Args:
            name: of the model.
            path: in it.
            calls: whether whole calls are kept.
            tokens: what map tokens make, see :class:`kd_mm.hosts.taps.Tap`.
            optional: whether it may stay silent in a step.

        Raises:
            KeyError: the model has no such module.
            ValueError: two terms say different ``tokens``.
        """
        if (name, path) not in self.taps:
            self.taps[name, path] = Tap(self.model(name), path, self.word(name))
        tap = self.taps[name, path]
        tap.structured |= calls
        tap.optional |= optional
        if tokens is not None and tap.tokens not in (None, tokens):
            raise ValueError(f'tokens={tokens} at the tap {path!r} of the {self.word(name)}, where another loss says '
                             f'tokens={tap.tokens}')
        tap.tokens = tap.tokens if tokens is None else tokens

    def word(self, name: str) -> str:
        """Name of a model for messages."""
        if name == STUDENT:
            return 'student'
        return 'teacher' if len(self.teachers) == 1 else f'teacher {name!r}'

    def weighted_terms(self) -> List[Term]:
        """Terms whose weight is not 0 at the current iteration."""
        return [term for term in self.terms if not term.loss.weight.is_zero(self.number, self.max_steps)]

    def batch_of(self, inputs: Tensor, data_samples: Any) -> KDBatch:
        """The facts of a batch, as losses and regions see them."""
        # A model of nobody's may take its labels as one tensor: then there are no samples to ask.
        samples = () if data_samples is None or isinstance(data_samples, Tensor) else data_samples
        return KDBatch(Targets(input_shape=image_size(inputs), images=inputs, source=samples_of(samples),
                               ignore_index=ignored_label(self.student)),
                       StepInfo(self.number, self.max_steps, self.seed))

    # ------------------------------------------------------------------ before the student's forward

    def begin(self, inputs: Tensor, data_samples: Any) -> None:
        """Forget the last step and look at the batch."""
        self.clear()
        self.active = self.weighted_terms()
        self.batch = self.batch_of(inputs, data_samples)

    def teach(self, inputs: Tensor, data_samples: Any) -> None:
        """Run every teacher that does not train and that an active term or a labeller reads, as far as its last tap.

        Whatever a teacher draws, the student draws what it would have drawn without it.
        """
        for name in self.teachers:
            if name not in self.peers:
                self._run(name, inputs, data_samples)

    def _run(self, name: str, inputs: Tensor, data_samples: Any) -> None:
        """The pass of one teacher, if anything wants it."""
        assert self.batch is not None
        wanted = [*self.keys(self.active), *self._label_taps]
        taps = [self.taps[owner, path] for owner, path in dict.fromkeys(wanted) if owner == name]
        if not taps and name not in self.peers:
            return
        with preserved_random_state(self._peer_seed(name), inputs.device):
            self.teachers[name].run(inputs, data_samples, taps, self.batch)
        self.records[name] = self.teachers[name].records(taps, inputs)

    def use_labels(self, labelling: Labelling) -> None:
        """Let labels be made in every step: once, when all terms have their taps."""
        if not labelling:
            return
        self.labelling = labelling
        wanted = {name: [path for owner, path in self.taps if owner == name] for name in self.teachers}
        self._label_taps = labelling.taps(wanted)
        for name, path in self._label_taps:
            self.add_tap(name, path, calls=True)

    def label(self, inputs: Tensor, data_samples: Any) -> Any:
        """The data samples for the student: those that were given, or new ones with more labels."""
        if self.labelling is None:
            return data_samples
        assert self.batch is not None
        for name in dict.fromkeys(name for name, _ in self._label_taps):
            self.teachers[name].fast.join(self.records.get(name, {}).values())  # it may run beside
        samples = self.labelling.label(inputs, data_samples, self.records, self.batch)
        kept = set(self.keys(self.active))
        for name, path in self._label_taps:
            if (name, path) not in kept:
                self.records.get(name, {}).pop(path, None)
        if samples is not data_samples:
            self.batch = self.batch_of(inputs, samples)
        return samples

    def pair(self, inputs: Tensor, data_samples: Any) -> None:
        """Let every peer make its training forward, whose losses it keeps.

        Args:
            inputs: the student's batch.
            data_samples: what the student is to be given, :meth:`label` included: both learn the same labels.
        """
        for name in self.peers:
            self._run(name, inputs, data_samples)

    def _peer_seed(self, name: str) -> Optional[int]:
        """A peer drops other units than the student: it has a stream of its own, the same in a resumed run."""
        if name not in self.peers:
            return None
        words = (self.seed, distributed.rank(), self.number, list(self.teachers).index(name))
        mixed = 0
        for word in words:
            mixed = (mixed * 1_000_003 + word + 12_345) % (2**63 - 25)
        return mixed

    def listen(self) -> List[str]:
        """Arm the student's taps of the active terms; their paths."""
        assert self.batch is not None
        paths = [path for name, path in self.keys(self.active) if name == STUDENT]
        owners = [self.taps[STUDENT, path].owner for path in paths]
        for name, teacher in self.teachers.items():
            if teacher.fast.shared is not None:
                recorded = {storage_key(tensor) for record in self.records.get(name, {}).values()
                            for tensor in chunk.tensors_of(record)}
                self._lending.enter_context(teacher.fast.shared.lent(owners, recorded))
        for path in paths:
            self.taps[STUDENT, path].arm(self.batch.targets.input_shape)
        return paths

    @contextmanager
    def open(self, inputs: Tensor, data_samples: Any) -> Iterator['Step']:
        """All that comes before the student's forward; :meth:`clear` at the end.

        For whoever wants to look into a step: run the student's training forward inside, then :meth:`hear`,
        :meth:`read` and :meth:`evaluate`.
        """
        try:
            self.begin(inputs, data_samples)
            self.teach(inputs, data_samples)
            self.samples = self.label(inputs, data_samples)
            self.pair(inputs, self.samples)
            self.listen()
            yield self
        finally:
            self.clear()

    # ------------------------------------------------------------------ after it

    def hear(self) -> None:
        """Take what the student's taps recorded."""
        paths = [path for name, path in self.keys(self.active) if name == STUDENT]
        for path in paths:
            self.taps[STUDENT, path].disarm()
        self._lending.close()
        self.records[STUDENT] = {path: self.taps[STUDENT, path].read() for path in paths}
        for name, teacher in self.teachers.items():
            teacher.fast.join(self.records.get(name, {}).values())

    def read(self, terms: Optional[Sequence[Term]] = None, records: Optional[Recordings] = None,
             batch: Optional[KDBatch] = None) -> List[Comparison]:
        """What each term compares.

        Args:
            terms: default the active ones.
            records: default what this step has recorded.
            batch: default that of this step.

        Raises:
            ValueError: the sides of a term do not fit.
        """
        records, batch = self.records if records is None else records, self.batch if batch is None else batch
        assert batch is not None
        return [self._read(term, records, batch) for term in (self.active if terms is None else terms)]

    def _read(self, term: Term, records: Recordings, batch: KDBatch) -> Comparison:
        found: List[Comparison] = []
        for source in term.sources:
            theirs = records.get(self.source_of(term, source), {})
            found.append(term.reader.read(records[term.learner], theirs, batch, term.chosen.get(source)))
        teacher = found[0].teacher
        if len(found) > 1:
            try:
                teacher = average([comparison.teacher for comparison in found], term.united)
            except ValueError as error:
                raise ValueError(f'{term.title}: {error}') from error
        return replace(found[0], teacher=teacher, term=term)

    def evaluate(self, comparison: Comparison) -> Evaluation:
        """The loss of one term, with its weights at this iteration."""
        term: Term = comparison.term
        parts = term.evaluate(comparison)
        levels = [total(level) for level in parts]
        weights = term.loss.weight.at(self.number, self.max_steps, len(levels))
        result = sum(level * weight for level, weight in zip(levels, weights))
        assert isinstance(result, Tensor)
        named: Dict[str, Tensor] = {}
        for level, weight in zip(parts, weights):
            for name, value in level.items():
                if name:
                    named[name] = named.get(name, 0) + value.detach() * weight
        return Evaluation(term, levels, weights, result, named)

    def has_gradient(self, evaluation: Evaluation) -> bool:
        """Whether a term has a gradient other than 0 on what the taps of its learner recorded, on any rank.

        It goes back as far as the taps only; the graph stays.
        """
        term = evaluation.term
        records = [self.records[term.learner][path] for path in term.student_paths]
        edges = [edge for record in records for edge in term.reader.edges(record)]
        found = False
        if edges and evaluation.total.requires_grad:
            # Half precision would round small gradients away; an overflow is a gradient too.
            half = any(tensor.dtype in (torch.float16, torch.bfloat16) for record in records for tensor in record)
            try:
                gradients = torch.autograd.grad(evaluation.total * (2.0**16 if half else 1.0), edges,
                                                retain_graph=True, allow_unused=True)
            except RuntimeError:  # a re-entrant checkpoint in between knows backward() only: benefit of the doubt
                return True
            found = any(bool((gradient != 0).any()) for gradient in gradients if gradient is not None)
        if distributed.world_size() > 1:
            return bool(distributed.mean(evaluation.total.new_tensor(float(found))) > 0)
        return found

    def clear(self) -> None:
        """Restore the models and free what was recorded; doing it twice is harmless."""
        for tap in self.taps.values():
            tap.clear()
        self._lending.close()
        for peer in self.peers.values():
            peer.forget()
        self.records, self.active, self.batch, self.samples = {}, [], None, None


def average(sides: Sequence[Features], united: bool = False) -> Features:
    """Mean of what several teachers give, level by level.

    Args:
        sides: of each teacher.
        united: NaN is what one of them does not know, and does not count.

    Raises:
        ValueError: they differ in the number of levels or in shape.

    Example:
        >>> average([(torch.zeros(2), ), (torch.ones(2), )])
        (tensor([0.5000, 0.5000]),)
    """
    if len(sides) == 1:
        return sides[0]
    shapes = [[tuple(tensor.shape) for tensor in side] for side in sides]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError(f'the outputs of several teachers are averaged, but they differ in shape: {shapes}. Give '
                         'each teacher a loss of its own')
    return tuple(torch.stack(level).nanmean(dim=0) if united else torch.stack(level).mean(dim=0)
                 for level in zip(*sides))
