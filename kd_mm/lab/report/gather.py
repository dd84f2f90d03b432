"""Run the models of a report over its data: predictions and features of each image, once."""

import copy
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts import predictions
from kd_mm.hosts.models import as_names, build_model, class_names, classes_of, scope_of_config, task_of
from kd_mm.hosts.table import DETECTION
from kd_mm.hosts.weights import load_weights
from kd_mm.lab.data import EmptyData, nothing_in, open_set
from kd_mm.lab.models import scope_of
from kd_mm.lab.report import detections, segmentation
from kd_mm.lab.report.agreement import Alike, features, prepared
from kd_mm.lab.report.sources import ROLES, Side, Source
from kd_mm.ops.drawing import hues
from kd_mm.ops.modes import eval_mode, preserved_random_state

#: Images whose features are compared.
FEATURE_IMAGES = 16
#: Shows the progress of a loop: (what to go through, what it is) -> the same things.
Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass
class Opened:
    """A model that is ready to predict.

    Attributes:
        model: in eval mode.
        order: (K,) label of the model -> label of the data, -1 for none; None where they are the same.
    """

    model: nn.Module
    order: Optional[np.ndarray] = None

    @torch.no_grad()
    def predict(self, sample: Any) -> Any:
        """The host's prediction for one sample of the data set."""
        with eval_mode(self.model):
            return self.model.test_step(pseudo_collate([copy.copy(sample)]))[0]  # type: ignore[operator]


@dataclass
class Found:
    """What the models of a report have predicted.

    Attributes:
        task: ``'detection'`` or ``'segmentation'``.
        classes, palette: of the data; colours are (r, g, b).
        dataset: of the validation.
        indices: of the images that were looked at.
        models: role -> model.
        objects: role -> the images with its detections (detection).
        counts: role -> summed counts (segmentation).
        beside: role -> (K, 4) pixels of student and that model (segmentation).
        same: role -> [common, all]: what both say alike: detections of that model, pixels.
        merit: of each image, how much more the teacher has right than the student, in pixels (segmentation).
        alike: features, if there is a teacher.
        seen: roles in ``alike`` besides, with the checkpoints of the student as ``'step N'``.
        notes: sentences.
    """

    task: str
    classes: List[str]
    palette: List[Tuple[int, int, int]]
    dataset: Any
    indices: List[int]
    models: Dict[str, Opened]
    objects: Dict[str, List[detections.Image]] = field(default_factory=dict)
    counts: Dict[str, segmentation.Counts] = field(default_factory=dict)
    beside: Dict[str, np.ndarray] = field(default_factory=dict)
    same: Dict[str, np.ndarray] = field(default_factory=dict)
    merit: List[int] = field(default_factory=list)
    alike: Alike = field(default_factory=Alike)
    seen: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    _judged: Dict[str, detections.Judged] = field(default_factory=dict)

    def judged(self, role: str) -> detections.Judged:
        """What each detection of a model is; worked out once, half a minute for the validation images of COCO."""
        if role not in self._judged:
            self._judged[role] = detections.judge(self.objects[role])
        return self._judged[role]


def open_data(cfg: Config, split: str) -> Any:
    """The data set of a split.

    Raises:
        ValueError: the config has none, or it is empty.
    """
    section = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
    if not section:
        raise ValueError(f'the config has no {split}_dataloader with a dataset, and a report needs labelled images. '
                         'Inherit from a whole config of the host, or choose another --split')
    try:
        dataset = open_set(cfg, section)
        if not len(dataset):
            raise EmptyData(nothing_in(cfg, section))
    except EmptyData as error:
        raise ValueError(f'{split}_dataloader.dataset: {error}') from error
    return dataset


def open_model(side: Side, role: str, scope: Optional[str], classes: Sequence[str], device: Any,
               notes: List[str]) -> Optional[Opened]:
    """Build a model and load its weights; None, with a note, where its predictions cannot be compared.

    Raises:
        ValueError: it cannot be built, or no weights fit.
    """
    content = ckpt.load(side.weights)
    try:
        model = build_model(side.cfg, scope)
    except Exception as error:  # the registry and the models raise anything
        raise ValueError(f'the model of the {ROLES[role]} ({side.config}) cannot be built: {type(error).__name__}: '
                         f'{error}') from error
    try:
        said = load_weights(model, content, side.weights, strict=False)
    except ValueError as error:  # it speaks of a teacher's file
        raise ValueError(str(error).replace('teacher checkpoint', f'checkpoint of the {ROLES[role]}', 1)) from error
    notes += [f'Weights of the {ROLES[role]} ({side.weights}): {text}.' for text in said]
    own, order = class_names(side.cfg, content), None
    if own and list(own) != list(classes):
        order = np.array([list(classes).index(name) if name in classes else -1 for name in own])
        if not (order >= 0).any():
            notes.append(f'The {ROLES[role]} is left out: none of its classes ({", ".join(map(str, own[:5]))}, ...) is '
                         'one of the data.')
            return None
        notes.append(f'The classes of the {ROLES[role]} are not those of the data, and were matched by name.')
    return Opened(model.to(device).eval(), order)


def look(source: Source, most: Optional[int], split: str, device: Any, history: Sequence[Tuple[int, str]],
         track: Track) -> Found:
    """Run all models over the images.

    Args:
        source: models and data.
        most: images, spread over the data; None for all.
        split: ``'val'`` or ``'test'``.
        device: of the models.
        history: (step, path) of the student's earlier checkpoints, whose features are compared too.
        track: shows the progress.

    Raises:
        ValueError: something is missing; what and the mend.
    """
    scope = scope_of_config(source.cfg)
    notes = list(source.notes)
    with scope_of(source.cfg), preserved_random_state(0):
        dataset = open_data(source.cfg, split)
        meta = getattr(dataset, 'metainfo', None) or {}
        classes = as_names(classes_of(meta) or ())
        if not classes:
            raise ValueError(f'{split}_dataloader.dataset knows no names of classes: give metainfo=dict(classes=...)')
        models = {role: opened for role, side in source.sides.items() if (
            opened := open_model(side, role, scope, classes, device, notes)) is not None}
        task = task_of(models['student'].model)
        if task is None:
            raise ValueError('the student is a model of no host, so nothing is known of its predictions')
        chosen = range(len(dataset)) if most is None else sorted({
            index * len(dataset) // min(most, len(dataset)) for index in range(min(most, len(dataset)))})
        colours = [tuple(map(int, colour)) for colour in meta.get('palette') or ()]
        found = Found(task, classes, colours if len(colours) >= len(classes) else hues(len(classes)),  # type: ignore
                      dataset, list(chosen), models, notes=notes)
        work = _objects if task == DETECTION else _pixels
        for index in track(found.indices, 'predicting'):
            work(found, index)
        if 'teacher' in models:
            _features(found, source, history, track)
    return found


def _objects(found: Found, index: int) -> None:
    sample = found.dataset[index]
    truth = predictions.true_objects(found.dataset, index)
    for role, opened in found.models.items():
        boxes, scores, labels = predictions.detected(opened.predict(sample))
        if opened.order is not None:
            labels = opened.order[labels]
            boxes, scores, labels = boxes[labels >= 0], scores[labels >= 0], labels[labels >= 0]
        found.objects.setdefault(role, []).append(detections.Image(*truth, boxes, scores, labels))


def label_maps(found: Found, index: int) -> Tuple[Any, np.ndarray, Dict[str, Tuple[np.ndarray, Optional[np.ndarray]]]]:
    """Sample, truth, and label map with scores of each model, of one image (segmentation).

    Raises:
        ValueError: a label map has not the size of the truth.
    """
    sample = found.dataset[index]
    maps: Dict[str, Tuple[np.ndarray, Optional[np.ndarray]]] = {}
    truth: Optional[np.ndarray] = None
    for role, opened in found.models.items():
        predicted = opened.predict(sample)
        truth = predictions.true_labels(predicted)
        labels, scores = predictions.predicted_labels(predicted, opened.model)
        if labels.shape != truth.shape:
            raise ValueError(f'image {index}: the label map of the {ROLES[role]} is {labels.shape} and that of the '
                             f'truth {truth.shape}. In a validation pipeline LoadAnnotations stands after Resize')
        if opened.order is not None:  # a class that the data have not is wrong everywhere
            labels = np.where(opened.order < 0, len(found.classes), opened.order)[labels]
        maps[role] = labels, scores
    assert truth is not None
    return sample, truth, maps


def _pixels(found: Found, index: int) -> None:
    count = len(found.classes)
    _, truth, maps = label_maps(found, index)
    truth = truth.astype(np.int64)
    for role, (labels, scores) in maps.items():
        found.counts[role] = segmentation.add(found.counts.get(role, {}), segmentation.of_image(
            truth, labels, scores, count))
        if role != 'student':
            student = maps['student'][0]
            table = segmentation.side_by_side(truth, student, labels, count)
            found.beside[role] = found.beside.get(role, 0) + table
            known = truth < count
            found.same[role] = found.same.get(role, np.zeros(2, np.int64)) + np.array(
                [(known & (student == labels)).sum(), known.sum()])
            if role == 'teacher':
                found.merit.append(int(table[:, 1].sum() - table[:, 2].sum()))


def _features(found: Found, source: Source, history: Sequence[Tuple[int, str]], track: Track) -> None:
    """Features of every model, and of earlier checkpoints of the student, against the teacher's."""
    student = found.models['student'].model
    final = copy.deepcopy(student.state_dict())
    states: Dict[str, Any] = {}
    for step, path in history:
        load_weights(student, ckpt.load(path), path, strict=False)
        states[f'step {step}'] = copy.deepcopy(student.state_dict())
    student.load_state_dict(final)
    number = min(FEATURE_IMAGES, len(found.indices))
    few = [found.indices[index * len(found.indices) // number] for index in range(number)]
    for index in track(few, 'comparing features'):
        sample = found.dataset[index]
        batches = {role: prepared(opened.model, sample, pseudo_collate) for role, opened in found.models.items()}
        try:
            theirs = features(found.models['teacher'].model, batches['teacher'])
            for role in found.models:
                if role != 'teacher':
                    found.alike.see(role, features(found.models[role].model, batches[role]), theirs)
            for name, state in states.items():
                student.load_state_dict(state)
                found.alike.see(name, features(student, batches['student']), theirs)
        except Exception as error:  # hosts raise anything; the rest of the report does not need it
            found.notes.append(f'Features are not compared: {type(error).__name__}: {error}')
            found.alike = Alike()
            return
        finally:
            student.load_state_dict(final)
    found.seen = list(states)
