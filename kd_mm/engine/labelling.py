"""The ``label`` phase of a step: what teachers predict becomes labels before the student sees them."""

from dataclasses import replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.naming import Names, names_text
from kd_mm.engine.term import STUDENT
from kd_mm.hosts import labelled
from kd_mm.hosts.models import task_of
from kd_mm.hosts.predict import TRUNK, predict, prediction_taps, reads_text, why_not
from kd_mm.hosts.samples import is_table, samples_of
from kd_mm.hosts.semi import labelled_sample
from kd_mm.ops.classes import COMMON, ClassPair, map_classes
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.ops.words import count
from kd_mm.registry import build
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.labels.base import Additions, Labeller
from kd_mm.teachers.peer import PeerTeacher
from kd_mm.types.batch import KDBatch
from kd_mm.types.labels import Pixels, Predictions
from kd_mm.types.records import Recorded
from kd_mm.types.targets import img_shapes, input_shape

#: What ``labels=`` may be.
FORMS = "labels=dict(type='PseudoLabels', ...), or several by name: labels=dict(NAME=dict(type=...), ...)"


class Labelling:
    """All labellers of a training.

    Args:
        student: the model in training.
        teachers: by name.
        labels: the config: None, one labeller, or name -> labeller.
        names: the classes of the models.
        problems: gets what is wrong.

    Attributes:
        labellers: by name; the only one has the name ``''``.
        notes: what was found out, as sentences.
        log: numbers of the last step for the log.
    """

    def __init__(self, student: nn.Module, teachers: Dict[str, Teacher], labels: Any, names: Names,
                 problems: Problems):
        self.student, self.teachers, self.names = student, teachers, names
        self.labellers: Dict[str, Labeller] = {}
        self.notes: List[str] = []
        self.log: Dict[str, Tensor] = {}
        self._pairs: Dict[Tuple[str, str], ClassPair] = {}
        self._dry: Dict[str, Dict[str, Predictions]] = {}  # of the first pass, by labeller
        for name, cfg in self._entries(labels, problems).items():
            where = f'labels[{name!r}]: ' if name else 'labels: '
            try:
                labeller = build(cfg, Labeller, 'labeller')
                self._settle(name, labeller)
                self.labellers[name] = labeller
            except (KeyError, ValueError) as error:
                text = str(error.args[0]) if error.args else repr(error)
                problems.add(f'{where}{text}')

    def __bool__(self) -> bool:
        return bool(self.labellers)

    @property
    def detector(self) -> bool:
        """Whether the student is a detector."""
        return task_of(self.student) == 'detection'

    # ------------------------------------------------------------------ building

    @staticmethod
    def _entries(labels: Any, problems: Problems) -> Dict[str, Any]:
        if labels is None:
            return {}
        if isinstance(labels, Labeller) or (hasattr(labels, 'get') and 'type' in labels):
            return {'': labels}
        if not hasattr(labels, 'items') or not labels or any(
                not (isinstance(entry, Labeller) or hasattr(entry, 'get')) for entry in labels.values()):
            problems.add(f'labels={labels!r}: write {FORMS}')
            return {}
        wrong = [name for name in labels if not str(name).isidentifier() or 'loss' in str(name)]
        if wrong:
            problems.add(f'labels[{wrong[0]!r}]: a name must be an identifier without `loss` in it: it is part of '
                         'names in the log, and what is called a loss is back-propagated')
            return {}
        return dict(labels)

    def _settle(self, name: str, labeller: Labeller) -> None:
        """Find its teachers and its classes.

        Raises:
            ValueError: there is something wrong with them.
        """
        task = task_of(self.student)
        if task is None:
            raise ValueError(f'the student {type(self.student).__name__} is of no host that is known, whose labels '
                             'could be read')
        peers = [teacher for teacher, model in self.teachers.items() if isinstance(model, PeerTeacher)]
        able = [teacher for teacher in self.teachers if teacher not in peers]
        wrong = [teacher for teacher in labeller.teachers if teacher not in able]
        known = ', '.join(map(repr, able)) or 'none'
        if peers and (set(wrong) & set(peers) or not able):
            raise ValueError(f'the peer {(wrong or peers)[0]!r} is in training like the student, and learns from these '
                             'labels itself. Let a fixed teacher or an EMATeacher label: '
                             f"teachers=dict(NAME=..., ...) and labels=dict(..., teacher=NAME), one of: {known}")
        if wrong:
            raise ValueError(f'teacher={wrong[0]!r} is not among the teachers that are models of their own: {known}')
        if not labeller.teachers:
            if len(able) != 1:
                raise ValueError(f'which teacher? Give teacher=NAME (or a list of names): {known}')
            labeller.teachers = tuple(able)
        for teacher in labeller.teachers:
            model = self.teachers[teacher].model
            reason = why_not(model)
            if reason is not None:
                raise ValueError(f'teacher {teacher!r}: {reason}')
            if self.teachers[teacher].size is not None:
                raise ValueError(f'teacher {teacher!r}: preprocess size resizes its pictures; use view=dict(size=...), '
                                 'which brings boxes and maps back')
            names, count = self.names.classes_of(teacher), self.names.heads_of(teacher)
            if labeller.prompts and task != 'detection':
                raise ValueError('prompts are for open-vocabulary detectors')
            if names and not labeller.prompts and count is not None and count > len(names):
                raise ValueError(f'teacher {teacher!r}: its head has {count} classes, and {len(names)} names are '
                                 f'known: {names_text(names)}. Give it those of its data '
                                 '(train_dataloader.dataset.metainfo)')
            self._pairs[name, teacher] = self._pair(labeller, teacher)

    def _pair(self, labeller: Labeller, teacher: str) -> ClassPair:
        names = self.names
        wanted = labeller.classes if labeller.classes is not None else names.map_of(teacher)
        ours, theirs = names.classes_of(STUDENT), labeller.prompts or names.classes_of(teacher)
        try:
            return map_classes(COMMON if wanted is None else wanted, ours, theirs, (
                names.count_of(STUDENT), names.count_of(teacher)))
        except ValueError as error:
            raise ValueError(f'teacher {teacher!r}: {error}') from error

    def move(self, student: nn.Module) -> None:
        """Go over to another instance of the same student."""
        self.student = self.names.student = student

    def taps(self, wanted: Mapping[str, Sequence[str]]) -> List[Tuple[str, str]]:
        """(Name of a teacher, path) of what must be kept of its pass.

        Args:
            wanted: what else is tapped in each.
        """
        asked = dict.fromkeys(teacher for labeller in self.labellers.values() for teacher in labeller.teachers)
        return [(name, path) for name in asked
                for path in prediction_taps(self.teachers[name].model, wanted.get(name, ()))]

    # ------------------------------------------------------------------ before the first step

    def dry(self, inputs: Tensor, samples: Any, records: Mapping[str, Mapping[str, Recorded]], batch: KDBatch) -> List[
            str]:
        """Ask every teacher once, on random images; what is wrong, as sentences."""
        if is_table(samples):
            return ['labels: the labels of a batch are one tensor here (MMYOLO), to which nothing can be added. Leave '
                    'labels out']
        problems: List[str] = []
        for name, labeller in self.labellers.items():
            where = f'labels[{name!r}]: ' if name else 'labels: '
            try:
                found = self._predictions(name, labeller, inputs, samples, records, batch, {}, self._stand_in)
                unfit = labeller.fits(found)
                if unfit is not None:
                    problems.append(f'{where}{unfit}')
                    continue
                self._dry[name] = found  # the random samples do not tell whether the data have masks
                again = [teacher for teacher in labeller.teachers if TRUNK not in records.get(teacher, {})]
                self.notes += [f'{where}what the teacher {teacher!r} computes cannot be kept for its predictions: '
                               'for the labels it runs by itself' for teacher in again]
                for teacher in labeller.teachers:
                    (_, own), (total, theirs) = self._pairs[name, teacher]
                    ours, others = self.names.classes_of(STUDENT), labeller.prompts or self.names.classes_of(teacher)
                    named = [(_named(others, index), _named(ours, target)) for target, index in zip(own, theirs)]
                    # Of classes that are called the same a number says enough.
                    pairs = [f'{name} as {other}' for name, other in named if name != other]
                    same = len(named) - len(pairs)
                    pairs = pairs[:20] + (['...'] if len(pairs) > 20 else [])
                    pairs += [f'{count(same, "class", "classes")} by the same name'] if same else []
                    self.notes.append(f'{where}teacher {teacher!r} labels {", ".join(pairs)} '
                                      f'({count(len(own), "class", "classes")} of its {total})')
            except Exception as error:  # models raise anything
                text = str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
                problems.append(f'{where}the teacher cannot be asked for labels: {text}')
        return problems

    def check_data(self, dataset: Any) -> None:
        """Refuse data whose labels cannot be added to, by their first sample.

        Raises:
            ValueError: saying why.
        """
        if not self.labellers or not hasattr(dataset, '__getitem__'):
            return
        with preserved_random_state():
            sample = labelled_sample(dataset[0]['data_samples'])
        fault = labelled.fault_of(sample, self.detector) or self._without_text(sample)
        for name, found in self._dry.items():
            fault = fault or self.labellers[name].check(labelled.has_masks([sample]), found)
        self._dry = {}
        if fault is not None:
            raise ValueError(f'labels: {fault}')

    def _stand_in(self, teacher: str) -> Sequence[str]:
        """What a teacher that reads texts is asked for on random images, whose samples have none."""
        if not reads_text(self.teachers[teacher].model):
            return ()
        return tuple(self.names.classes_of(teacher) or ('object', ))[:20]

    def _without_text(self, sample: Any) -> Optional[str]:
        """Why a sample does not say what a teacher is asked for; None if it does, or none is asked so."""
        if 'text' in sample:
            return None
        for labeller in self.labellers.values():
            for teacher in labeller.teachers:
                model = self.teachers[teacher].model
                if reads_text(model) and not labeller.prompts:
                    return (f'the teacher {teacher!r} ({type(model).__name__}) finds what it is asked for, and the '
                            "samples have no `text`. Give labels=dict(..., prompts=('a name', 'another')); or let the "
                            "data give their own classes: return_classes=True of the data set, 'text' and "
                            "'custom_entities' among the meta_keys of PackDetInputs, and classes='positional'")
        return None

    # ------------------------------------------------------------------ a step

    def label(self, inputs: Tensor, data_samples: Any, records: Mapping[str, Mapping[str, Recorded]],
              batch: KDBatch) -> Any:
        """The samples that the student gets; those that were given where nothing is added."""
        self.log = {}
        samples = labelled.with_room(data_samples, self.detector, input_shape(batch), self.ignore_index, inputs.device)
        asked: Dict[Tuple[str, Any], Predictions] = {}
        for name, labeller in self.labellers.items():
            found = self._predictions(name, labeller, inputs, data_samples, records, batch, asked)
            targets = replace(batch.targets, source=samples_of(samples), ignore_index=self.ignore_index)
            seen = KDBatch(targets, batch.info)
            with torch.no_grad():
                additions = labeller.label(seen, found)
            samples = self._write(labeller, samples, additions)
            word = f'kd_labels_{name}_' if name else 'kd_labels_'
            self.log.update({word + key: value for key, value in labeller.counts.items()})
        return samples

    @property
    def ignore_index(self) -> int:
        """Label of a pixel that says nothing, of a segmentor's head."""
        head: Any = getattr(self.student, 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        return int(getattr(head, 'ignore_index', 255))

    def _write(self, labeller: Labeller, samples: Any, additions: Additions) -> Any:
        if self.detector:
            if len(additions) != len(samples):
                raise ValueError(f'{labeller.name}: labels of {len(additions)} images for {len(samples)}')
            return labelled.with_objects(samples, additions)
        return labelled.with_map(samples, additions)

    def _predictions(self, name: str, labeller: Labeller, inputs: Tensor, samples: Any,
                     records: Mapping[str, Mapping[str, Recorded]], batch: KDBatch,
                     asked: Dict[Tuple[str, Any], Predictions],
                     text: Callable[[str], Sequence[str]] = lambda teacher: ()) -> Dict[str, Predictions]:
        """What each teacher of a labeller says; ``text`` of a teacher is what it is asked for without ``prompts``."""
        found: Dict[str, Predictions] = {}
        for teacher in labeller.teachers:
            pair = self._pairs[name, teacher]
            key = teacher, repr((pair, labeller.prompts))
            if key not in asked:
                asked[key] = self._ask(self.teachers[teacher], inputs, samples, records.get(teacher, {}), pair, batch,
                                       labeller.prompts or text(teacher))
            found[teacher] = asked[key]
        kinds = {isinstance(part, Pixels) for part in found.values()}
        if kinds != {not self.detector}:
            raise ValueError(f'{labeller.name}: the student is a {task_of(self.student)} model, and a teacher predicts '
                             f'{"objects" if self.detector is False else "pixels"}')
        return found

    def _ask(self, teacher: Teacher, inputs: Tensor, samples: Any, kept: Mapping[str, Recorded], pair: ClassPair,
             batch: KDBatch, prompts: Sequence[str]) -> Predictions:
        teacher.check_eval()
        images, prepared = teacher.prepare(inputs, samples, batch)
        shape = input_shape(batch)
        seen = None if teacher.view is None else teacher.view.of(shape)
        with preserved_random_state(device=inputs.device):
            return predict(teacher.model, images, prepared, kept, pair, shape, img_shapes(batch), seen, prompts,
                           self.detector)


def _named(names: Optional[Sequence[str]], index: Any) -> str:
    """One or several classes in words.

    Example:
        >>> _named(['car', 'bus'], (0, 1)), _named(None, 3)
        ('car or bus', 'class 3')
    """
    group = index if isinstance(index, tuple) else (index, )
    return ' or '.join(names[part] if names else f'class {part}' for part in group)
