"""What the teachers of a training score on its validation data, once, beside what the student will."""

import re
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.logging import print_log

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.trial import Trial, Wish
from kd_mm.hosts.models import task_of
from kd_mm.ops.modes import eval_mode, preserved_random_state

#: Names of metrics, without what stands before them, that say it in one number; the first that is there.
PRIMARY = ('bbox_mAP', 'mIoU', 'mAP', 'bbox_AP', 'AP50', 'mDice', 'mFscore', 'PQ')
#: Of these a lower one is better.
LOWER = ('mMR', 'abs_rel', 'sq_rel', 'rmse', 'rmse_log', 'log10', 'silog')
#: Average precisions, which the hosts give from 0 to 1, and what they give in per cent.
FRACTIONS = ('mAP', 'AP')
PERCENT = ('aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall', 'PQ', 'SQ', 'RQ')
#: Before the names of what others than the validated student score.
OTHERS = ('teacher_', 'student_')


def primary(metrics: Mapping[str, float]) -> Tuple[str, float]:
    """The metric that says it in one number, and its value.

    Raises:
        ValueError: there is none.

    Example:
        >>> primary({'aAcc': 91.0, 'mIoU': 71.5}), primary({'pascal_voc/AP75': 0.1, 'pascal_voc/mAP': 0.3})
        (('mIoU', 71.5), ('pascal_voc/mAP', 0.3))
    """
    if not metrics:
        raise ValueError('the evaluation gave no number')
    found = next((key for name in PRIMARY for key in metrics if key.split('/')[-1] == name), next(iter(metrics)))
    return found, metrics[found]


def nothing_to_find(metrics: Mapping[str, float]) -> bool:
    """Whether the data have no object: pycocotools then gives -1 as average precision.

    Example:
        >>> nothing_to_find({'coco/bbox_mAP': -1.0}), nothing_to_find({'coco/bbox_mAP': 0.0, 'coco/bbox_mAP_s': -1.0})
        (True, False)
    """
    return bool(metrics) and primary(metrics)[1] == -1


def sign(key: str) -> int:
    """1 where a higher value of a metric is better, else -1.

    Example:
        >>> sign('coco/bbox_mAP'), sign('crowd_human/mMR')
        (1, -1)
    """
    return -1 if key.split('/')[-1] in LOWER else 1


def span(key: str) -> Optional[int]:
    """The highest value that a metric can have: 1, 100 where the host gives per cent, None where that is not known.

    Example:
        >>> span('coco/bbox_mAP_50'), span('mIoU'), span('rmse')
        (1, 100, None)
    """
    name = key.split('/')[-1].removeprefix('teacher_').removeprefix('student_')
    if any(part in FRACTIONS for part in re.split(r'_|(?=\d)', name)):
        return 1
    return 100 if name in PERCENT else None


def with_span(key: str) -> str:
    """A metric with what its values can be.

    Example:
        >>> with_span('coco/bbox_mAP'), with_span('mIoU'), with_span('rmse')
        ('coco/bbox_mAP (0 to 1)', 'mIoU (0 to 100)', 'rmse')
    """
    return key if span(key) is None else f'{key} (0 to {span(key)})'


def numbers(metrics: Mapping[str, Any]) -> Dict[str, float]:
    """What of an evaluation's result is a number."""
    return {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float)) or (
        hasattr(value, 'item') and getattr(value, 'size', 1) == 1)}


class Scores:
    """The scores of the teachers that stay as they are.

    Args:
        asked: on which images. Default: all.
        weights: where those of the teachers come from, as a text; a score belongs to them.

    Attributes:
        found: name of a teacher -> its metrics; empty where nothing was detected.
    """

    def __init__(self, asked: Wish = Wish(), weights: str = '') -> None:  # noqa: B008 (it never changes)
        self.asked, self.weights = asked, weights
        self.found: Dict[str, Dict[str, float]] = {}
        self._told: List[str] = []
        self._trial: Optional[Trial] = None

    def state(self) -> Dict[str, Any]:
        """What :meth:`load` needs; empty where no teacher was scored."""
        return dict(asked=tuple(self.asked), weights=self.weights, found=self.found) if self.found else {}

    def load(self, state: Optional[Mapping[str, Any]]) -> None:
        """Take over what an earlier part of the same training has found, if it was of the same models and images."""
        if state and (tuple(state['asked']), state['weights']) == (tuple(self.asked), self.weights):
            self.found = {name: dict(metrics) for name, metrics in state['found'].items()}

    @torch.no_grad()
    def measure(self, distiller: Distiller, runner: Any) -> Dict[str, float]:
        """Evaluate each teacher in the Runner's validation, and say what came out.

        Weights, random numbers and the order of the training data stay as they are. A teacher whose score came with the
        checkpoint is not evaluated again.

        Args:
            distiller: knows the teachers.
            runner: has the validation.

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
            known = name in self.found
            with preserved_random_state(), eval_mode(teacher.model):
                trial = self.trial(runner)
                if not known:
                    self.found[name] = numbers(trial.run(teacher.model))
            if self.found[name]:
                print_log(f'kd_mm: teacher {name!r} scores ' + ', '.join(
                    f'{key} {value:.4g}' for key, value in self.found[name].items()) + f' on {trial.words}'
                    + (', as the checkpoint says' if known else ''), 'current')
            if nothing_to_find(self.found[name]):
                print_log(f'kd_mm: there is NOTHING to find in {trial.words}: the validation data have no object of '
                          'these classes, so no score says anything', 'current', level=30)
            elif not self.found[name] or primary(self.found[name])[1] <= 0:
                print_log(f'kd_mm: teacher {name!r} finds NOTHING in {trial.words}: nothing can be learned from '
                          'it. Look at its weights, its preprocessing and its classes', 'current', level=30)
        first = next(iter(self.found), None)
        return {f'teacher_{key}' if name == first else f'teacher_{name}_{key}': value
                for name, metrics in self.found.items() for key, value in metrics.items()}

    def trial(self, runner: Any) -> Trial:
        """The validation, made when it is first needed."""
        if self._trial is None:
            self._trial = Trial(runner, self.asked)
        return self._trial

    def after_validation(self, runner: Any, metrics: Optional[Mapping[str, float]]) -> Dict[str, float]:
        """Compare the student, which has just been validated, with its teachers.

        Where these saw a part of the images, the student, as it was validated, is evaluated on the same part.

        Args:
            runner: of the training.
            metrics: what its validation gave.

        Returns:
            What the student scores on that part, by names for the log; nothing where it was all.
        """
        if not self.found:
            return {}
        if self.trial(runner).partial:
            with preserved_random_state():
                metrics = self.trial(runner).run(runner.model)
        own = numbers(metrics or {})
        self.compare(own)
        return {f'student_{key}': value for key, value in own.items()} if self.trial(runner).partial else {}

    def compare(self, metrics: Optional[Mapping[str, float]]) -> None:
        """Say it once, loudly, when the student is as good as a teacher."""
        own = numbers(metrics or {})
        for name, theirs in self.found.items():
            key = primary(theirs)[0] if theirs else None
            if (key is None or key not in own or name in self._told or nothing_to_find(theirs)
                    or sign(key) * (own[key] - theirs[key]) < 0):
                continue
            self._told.append(name)
            print_log(f'kd_mm: the student ({key} {own[key]:.4g}) is AS GOOD AS its teacher {name!r} '
                      f'({theirs[key]:.4g}) on the validation data: there is little left to learn from it. Look at its '
                      'weights, its preprocessing and its classes, take a better one, or let distillation end '
                      "(loss_weight=dict(type='WindowSchedule', ...))", 'current', level=30)
