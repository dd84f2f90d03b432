"""What every labeller has: which teachers it asks, in which classes, and what it adds."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from kd_mm.ops.checks import texts
from kd_mm.ops.classes import check_classes
from kd_mm.types.batch import KDBatch
from kd_mm.types.labels import Detections, Pixels, Predictions

#: What a labeller adds: to each image some objects, or other maps; None for nothing at all.
Additions = Any


class Labeller:
    """Says what is added to the labels of a batch before the student sees them.

    Derive from it, register the class by ``@MODELS.register_module()`` of :mod:`kd_mm.registry`, and implement
    :meth:`objects` (detectors), :meth:`pixels` (segmentors) or both.  Neither knows a host: what teachers predict is
    there in the student's classes and in pixels of its batch, ground truth is read by :mod:`kd_mm.types.targets`.
    Tensors that are given must not be changed.

    Args:
        teacher: name of one teacher, or of several; no peer. Default: the only one that is none.
        classes: which classes of the teachers are which of the student's, see
            :func:`kd_mm.ops.classes.map_classes`. Default that of each teacher, else ``'common'``.
        prompts: of open-vocabulary detectors, what they are asked for: names, which are then the teachers' classes.
            Default none: samples have the text that the pipeline gave them.

    Attributes:
        name: of its class, for messages.
        counts: name -> number of what it did in the last step, for the log; :meth:`count` writes there.

    Raises:
        ValueError: a bad value.
    """

    def __init__(self, teacher: Any = None, classes: Any = None, prompts: Any = None):
        self.name = type(self).__name__
        if teacher is not None:
            texts(self.name, 'teacher', teacher, 'the name of a teacher')
        self.teachers: Tuple[str, ...] = (teacher, ) if isinstance(teacher, str) else tuple(teacher or ())
        self.classes = None if classes is None else check_classes(self.name, classes)
        if prompts is not None:
            texts(self.name, 'prompts', prompts, 'the name of a class')
        self.prompts: Tuple[str, ...] = (prompts, ) if isinstance(prompts, str) else tuple(prompts or ())
        self.counts: Dict[str, Tensor] = {}

    def fits(self, predictions: Mapping[str, Predictions]) -> Optional[str]:
        """Why it labels nothing of what its teachers predict; None where it does."""
        maps = any(isinstance(found, Pixels) for found in predictions.values())
        wanted, what = ('pixels', 'segmentors') if maps else ('objects', 'detectors')
        if getattr(type(self), wanted) is not getattr(Labeller, wanted):
            return None
        return (f'{self.name} has no method {wanted}(), so it labels nothing of {what}. Write it, or take another '
                "labeller, such as dict(type='PseudoLabels')")

    def check(self, masks: bool, predictions: Mapping[str, Predictions]) -> Optional[str]:
        """What is wrong with what the teachers predict on random images, before the first step; None for nothing.

        Args:
            masks: whether the objects of the training data have masks.
            predictions: of each teacher, by name.
        """
        for name, found in predictions.items():
            if masks and isinstance(found, list) and any(part.masks is None for part in found):
                return (f'{self.name}: objects of the training data have masks, and the teacher {name!r} predicts '
                        'boxes alone. Take a teacher with masks, or a student without')
        return None

    def label(self, batch: KDBatch, predictions: Mapping[str, Predictions]) -> Additions:
        """What is added to a batch: one :class:`~kd_mm.types.labels.Detections` (or None) an image, or the new maps.

        Args:
            batch: with the labels so far; samples without any have empty ones.
            predictions: of each of its teachers, by name.
        """
        self.counts = {}
        found = list(predictions.values())
        if isinstance(found[0], Pixels):
            return self.pixels(batch, {name: part for name, part in predictions.items() if isinstance(part, Pixels)})
        return self.objects(batch, {name: part for name, part in predictions.items() if isinstance(part, list)})

    def objects(self, batch: KDBatch, predictions: Mapping[str, List[Detections]]) -> List[Optional[Detections]]:
        """The objects that are added to each image of a detector's batch.  Default: none; :meth:`fits` refuses that."""
        return [None for _ in next(iter(predictions.values()))]

    def pixels(self, batch: KDBatch, predictions: Mapping[str, Pixels]) -> Optional[Tensor]:
        """The whole new maps (N, Hin, Win) of a segmentor's batch; None, the default, if nothing changes."""
        return None

    def count(self, name: str, value: Tensor) -> None:
        """Note a number for the log (``kd_labels_NAME``)."""
        self.counts[name] = value.detach().float()
