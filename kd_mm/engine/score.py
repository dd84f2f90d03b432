"""What the teachers of a training score on its validation data, once, beside what the student will."""

from typing import Any, Dict, List, Optional, Tuple

import torch
from mmengine.logging import print_log

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import task_of
from kd_mm.ops.modes import eval_mode, preserved_random_state

#: Keys that say it in one number, the first that is there.
PRIMARY = ('coco/bbox_mAP', 'mIoU')


def primary(metrics: Dict[str, float]) -> Tuple[str, float]:
    """The metric that says it in one number, and its value.

    Raises:
        ValueError: there is none.

    Example:
        >>> primary({'aAcc': 91.0, 'mIoU': 71.5})
        ('mIoU', 71.5)
    """
    if not metrics:
        raise ValueError('the evaluation gave no number')
    key = next((name for name in PRIMARY if name in metrics), next(iter(metrics)))
    return key, metrics[key]


def numbers(metrics: Dict[str, Any]) -> Dict[str, float]:
    """What of an evaluation's result is a number."""
    return {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float)) or (
        hasattr(value, 'item') and getattr(value, 'size', 1) == 1)}


class Scores:
    """The scores of the teachers that stay as they are.

    Attributes:
        found: name of a teacher -> its metrics; empty where nothing was detected.
    """

    def __init__(self) -> None:
        self.found: Dict[str, Dict[str, float]] = {}
        self._told: List[str] = []

    @torch.no_grad()
    def measure(self, distiller: Distiller, loop: Any) -> Dict[str, float]:
        """Evaluate each teacher in a validation loop, and say what came out.

        Weights, random numbers and the order of the training data stay as they are.

        Args:
            distiller: knows the teachers.
            loop: the Runner's, with ``dataloader`` and ``evaluator``.

        Returns:
            Numbers for the log, by name.
        """
        for name, teacher in distiller.teachers.items():
            if not teacher.fixed or name in distiller.peers or task_of(teacher.model) is None:
                print_log(f'kd_mm: teacher {name!r} is not scored: it changes while the student trains, or predicts '
                          'nothing', 'current')
                continue
            if distiller.classes and teacher.classes and list(distiller.classes) != list(teacher.classes):
                print_log(f'kd_mm: teacher {name!r} is not scored: its classes are not those of the data', 'current')
                continue
            with preserved_random_state(), eval_mode(teacher.model):
                for batch in loop.dataloader:
                    loop.evaluator.process(data_samples=teacher.model.val_step(batch), data_batch=batch)
                self.found[name] = numbers(loop.evaluator.evaluate(len(loop.dataloader.dataset)))
            if self.found[name]:
                print_log(f'kd_mm: teacher {name!r} scores ' + ', '.join(
                    f'{key} {value:.4g}' for key, value in self.found[name].items()) + ' on the validation data',
                          'current')
            if not self.found[name] or primary(self.found[name])[1] <= 0:
                print_log(f'kd_mm: teacher {name!r} finds NOTHING in the validation data: nothing can be learned from '
                          'it. Look at its weights, its preprocessing and its classes', 'current', level=30)
        first = next(iter(self.found), None)
        return {f'teacher_{key}' if name == first else f'teacher_{name}_{key}': value
                for name, metrics in self.found.items() for key, value in metrics.items()}

    def compare(self, metrics: Optional[Dict[str, float]]) -> None:
        """Say it once, loudly, when the student is as good as a teacher."""
        own = numbers(metrics or {})
        for name, theirs in self.found.items():
            key = next((key for key in (*PRIMARY, *theirs) if key in theirs), None)
            if key is None or key not in own or own[key] < theirs[key] or name in self._told:
                continue
            self._told.append(name)
            print_log(f'kd_mm: the student ({key} {own[key]:.4g}) is AS GOOD AS its teacher {name!r} '
                      f'({theirs[key]:.4g}) on the validation data: there is little left to learn from it. Look at its '
                      'weights, its preprocessing and its classes, take a better one, or let distillation end '
                      "(loss_weight=dict(type='WindowSchedule', ...))", 'current', level=30)
