"""Images where the teacher is right and the student is wrong, side by side."""

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np

from kd_mm.engine.vis import in_rgb
from kd_mm.hosts.table import DETECTION
from kd_mm.lab.report import detections
from kd_mm.lab.report.gather import Found, label_maps
from kd_mm.lab.report.pictures import (
    Box,
    Panel,
    boxes_panel,
    data_url,
    map_panel,
    moved,
    scaled,
)
from kd_mm.lab.report.sources import ROLES
from kd_mm.ops.words import count

#: Colours of what a detection is: right, wrong (each type), and an object that was not found.
RIGHT, WRONG, MISSED, IGNORED = '#2fb36d', '#ff4d4d', '#ffb000', '#9aa0a6'
#: An object of the truth: no colour of a judgement, and none of a class, which may be the same as one of them.
TRUTH = '#4c8dff'
#: What the page says about the colours of boxes.
LEGEND = (('object of the truth', TRUTH), ('found, and right', RIGHT), ('wrong, and in what', WRONG),
          ('missed', MISSED), ('counts neither way', IGNORED))
#: What was lost, and what was won, in a map of pixels.
LOST, WON, REST = (232, 62, 62), (47, 179, 109), (70, 70, 70)
#: Short words for the types of errors.
SHORT = {'classification': 'class', 'localisation': 'place', 'both': 'class+place', 'duplicate': 'twice',
         'background': 'nothing'}


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        title: which image, and what the difference is.
        panels: the truth, and each model.
        index: in the data set.
    """

    title: str
    panels: Tuple[Panel, ...]
    index: int


def examples(found: Found, report: Dict[str, Any], most: int) -> List[Example]:
    """The images with the largest difference between teacher and student, the worst first.

    Without a teacher: those with most errors of the student.
    """
    return (_of_objects if found.task == DETECTION else _of_pixels)(found, report, most)


def worst(merit: Any, most: int) -> List[int]:
    """Positions of the largest numbers above 0, the largest first.

    Example:
        >>> worst([0, 5, -1, 7], 3)
        [3, 1]
    """
    return [int(at) for at in np.argsort(-np.asarray(merit, float), kind='stable')[:most] if merit[at] > 0]


def _name(sample: Any, index: int) -> str:
    path = sample['data_samples'].metainfo.get('img_path')
    return str(path).replace('\\', '/').rsplit('/', 1)[-1] if path else f'image {index}'


# ---------------------------------------------------------------------------------------------------------------------
# detection


def _of_objects(found: Found, report: Dict[str, Any], most: int) -> List[Example]:
    judged = {role: found.judged(role) for role in found.objects}
    score = {role: report['models'][role]['working']['score'] for role in judged}
    hits = {role: judged[role].hit(score[role]) for role in judged}
    owner, images = judged['student'].owner, len(found.indices)
    lost, won = ~hits['student'], np.zeros(len(owner), bool)
    if 'teacher' in hits:
        lost, won = hits['teacher'] & ~hits['student'], hits['student'] & ~hits['teacher']
    per_image = [np.bincount(owner[chosen], minlength=images) for chosen in (lost, won)]
    result = []
    for at in worst(per_image[0] - per_image[1], most):
        whose = 'the teacher finds and the student does not' if 'teacher' in hits else 'the student does not find'
        what = f'{count(int(per_image[0][at]), "object")} that {whose}'
        name, panels = object_panels(found, at, score)
        result.append(Example(f'{name}: {what}', panels, found.indices[at]))
    return result


def object_panels(found: Found, at: int, score: Mapping[str, float]) -> Tuple[str, Tuple[Panel, ...]]:
    """The name of an image, and its truth and what each model has detected in it.

    Args:
        found: of :func:`kd_mm.lab.report.gather.look`.
        at: position of the image in ``found.indices``.
        score: role -> the lowest score of a detection that is drawn.
    """
    sample = found.dataset[found.indices[at]]
    picture = scaled(in_rgb(sample['inputs']))
    size = picture.shape[1], picture.shape[0]
    height, width = sample['data_samples'].metainfo['ori_shape'][:2]
    factors = size[0] / width, size[1] / height
    image = data_url(picture)
    truth = found.objects['student'][at]
    order = np.argsort(-detections.areas(truth.truth), kind='stable')
    panels = [boxes_panel('truth', image, size, [Box(
        moved(truth.truth[row], factors), '' if truth.ignored[row] else found.classes[truth.labels[row]],
        IGNORED if truth.ignored[row] else TRUTH) for row in order])]
    panels += [_judged_panel(found, role, at, score[role], image, size, factors) for role in ROLES
               if role in found.objects]
    return _name(sample, found.indices[at]), tuple(panels)


def _judged_panel(found: Found, role: str, at: int, threshold: float, image: str, size: Tuple[int, int],
                  factors: Tuple[float, float]) -> Panel:
    """What a model has detected in one image, each box in the colour of what it is, and what it has not."""
    one = found.objects[role][at]
    judged = detections.judge([one])
    boxes = one.boxes[np.argsort(-one.scores, kind='stable')]
    wrong, right, missed = [], [], []
    for row in range(len(judged.kind)):
        if judged.score[row] < threshold or judged.kind[row] == detections.IGNORED:
            continue
        name, kind = found.classes[judged.label[row]], str(judged.kind[row])
        text = f'{name} {judged.score[row]:.2f}'
        if kind == detections.CORRECT:
            right.append(Box(moved(boxes[row], factors), text, RIGHT))
        else:
            wrong.append(Box(moved(boxes[row], factors), f'{text} {SHORT[kind]}', WRONG))
    truth = one.truth[~one.ignored]
    for row in np.flatnonzero(judged.missed(threshold)):
        missed.append(Box(moved(truth[row], factors), found.classes[judged.truth[row]], MISSED, True))
    note = f'{len(right)} right, {len(wrong)} wrong, {len(missed)} missed'
    return boxes_panel(ROLES[role], image, size, [*missed, *wrong, *right], note)


# ---------------------------------------------------------------------------------------------------------------------
# segmentation


def _of_pixels(found: Found, report: Dict[str, Any], most: int) -> List[Example]:
    positions = worst(found.merit, most) if found.merit else list(range(min(most, len(found.indices))))
    result = []
    for at in positions:
        name, panels = pixel_panels(found, at)
        result.append(Example(f'{name}: {panels[-1].note}' if found.merit else name, panels, found.indices[at]))
    return result


def pixel_panels(found: Found, at: int) -> Tuple[str, Tuple[Panel, ...]]:
    """The name of an image, and itself, its truth, each model's labels and where teacher and student differ.

    Args:
        found: of :func:`kd_mm.lab.report.gather.look`.
        at: position of the image in ``found.indices``.
    """
    classes = len(found.classes)
    sample, truth, maps = label_maps(found, found.indices[at])
    picture = in_rgb(sample['inputs'])
    known = truth < classes
    small = scaled(picture)
    panels = [Panel('image', data_url(small), (small.shape[1], small.shape[0])),
              map_panel('truth', truth, found.palette, picture)]
    right = {role: (labels == truth) & known for role, (labels, _) in maps.items()}
    for role in ROLES:
        if role in maps:
            share = right[role].sum() / max(known.sum(), 1)
            panels.append(map_panel(ROLES[role], np.where(known, maps[role][0], classes), found.palette, picture,
                                    f'{100 * share:.1f} % right'))
    if 'teacher' in right:
        lost, won = right['teacher'] & ~right['student'], right['student'] & ~right['teacher']
        share = 100 * lost.sum() / max(known.sum(), 1)
        panels.append(map_panel('difference', np.select([lost, won], [0, 1], 2), [LOST, WON, REST], picture,
                                f'only the teacher is right in {share:.1f} % of the pixels'))
    return _name(sample, found.indices[at]), tuple(panels)
