"""What a detector gets right and wrong, from its boxes and those of the truth: arrays in, dicts out.

Average precision is that of COCO, by pycocotools, which the host uses too.  The types of errors are those of TIDE
(Bolya et al., ECCV 2020), written here: its package (tidecv 1.0.1, of 2020) brings an opencv that needs a display,
seaborn and pandas.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch

from kd_mm.lab.report.calibration import BOX_BINS, LOWEST, counts, reliability
from kd_mm.ops.boxes import intersection

#: Overlap from which a box is right, and below which it is on the background (TIDE's t_f and t_b).
RIGHT, BACKGROUND = 0.5, 0.1
#: COCO's sizes: area of a box in pixels, from and up to.
SIZES = {'small': (0.0, 32.0**2), 'medium': (32.0**2, 96.0**2), 'large': (96.0**2, float('inf'))}
#: What may be wrong with a detection, and the missed objects.
KINDS = ('classification', 'localisation', 'both', 'duplicate', 'background')
MISSED = 'missed'
#: What a detection is besides: right, or on a region that counts neither way.
CORRECT, IGNORED = 'right', 'ignored'


@dataclass(frozen=True)
class Image:
    """Objects and detections of one image; boxes are (x1, y1, x2, y2) in pixels of the image.

    Attributes:
        truth: (G, 4).
        labels: (G,), index of the class.
        ignored: (G,), whether the object counts neither way (a crowd, a difficult one).
        boxes: (D, 4) detected.
        scores: (D,).
        found: (D,), index of the class.
    """

    truth: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    found: np.ndarray


def areas(boxes: np.ndarray) -> np.ndarray:
    """(M,) areas of boxes (M, 4)."""
    return np.prod((boxes[:, 2:] - boxes[:, :2]).clip(min=0), axis=1)


def size_of(boxes: np.ndarray) -> np.ndarray:
    """(M,) index into :data:`SIZES`.

    Example:
        >>> size_of(np.array([[0, 0, 8, 8], [0, 0, 32, 32], [0, 0, 100, 100.]])).tolist()
        [0, 1, 2]
    """
    return np.searchsorted([low for low, _ in SIZES.values()][1:], areas(boxes), side='right')


def overlaps(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, G) intersection over union; over the area of the detection alone where an object is ignored."""
    common, union = (part.numpy() for part in intersection(
        torch.from_numpy(np.ascontiguousarray(boxes, np.float64))[:, None],
        torch.from_numpy(np.ascontiguousarray(truth, np.float64))[None]))
    return common / np.maximum(np.where(crowd[None], areas(boxes)[:, None], union), 1e-12)


@dataclass(frozen=True)
class Judged:
    """The detections of all images, in the order of the images, each with what it is.

    Attributes:
        image, label, score: (M,) of each detection; ``label`` is that of the detection.
        kind: (M,) one of :data:`KINDS`, ``'right'`` or ``'ignored'``.
        about: (M,) the object that a detection is about (right, classification, localisation, duplicate), as index into
            those below; -1 for none.
        owner, truth, size: (T,) image, class and index into :data:`SIZES` of each object that counts.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    about: np.ndarray
    owner: np.ndarray
    truth: np.ndarray
    size: np.ndarray

    def hit(self, threshold: float = 0.0) -> np.ndarray:
        """(T,) whether an object is found by a detection of at least this score."""
        return self._touched((CORRECT, ), threshold)

    def missed(self, threshold: float = 0.0) -> np.ndarray:
        """(T,) whether an object is neither found nor the subject of an error of class or place."""
        return ~self._touched((CORRECT, 'classification', 'localisation'), threshold)

    def _touched(self, kinds: Sequence[str], threshold: float) -> np.ndarray:
        mask = np.zeros(len(self.truth), bool)
        mask[self.about[np.isin(self.kind, kinds) & (self.score >= threshold)]] = True
        return mask


def judge(images: Sequence[Image], most: int = 100) -> Judged:
    """Match detections and objects, and say of each detection what it is.

    A detection, the best score first, takes the object of its class with the largest overlap that is left, from an
    overlap of :data:`RIGHT` on.  What is wrong with the others is asked in this order:

    - ``localisation``: the largest overlap with an object of its class lies from 0.1 to 0.5;
    - ``classification``: it has an overlap of 0.5 or more with an object of another class;
    - ``duplicate``: 0.5 or more with an object of its class that a better detection has taken;
    - ``background``: less than 0.1 with every object;
    - ``both``: from 0.1 to 0.5 with an object of another class alone.

    Args:
        images: objects and detections.
        most: detections of an image that count, those of the best scores. Default 100, as COCO has it.
    """
    rows: List[Tuple[np.ndarray, ...]] = []
    objects: List[Tuple[np.ndarray, ...]] = []
    before = 0
    for index, image in enumerate(images):
        order = np.argsort(-image.scores, kind='stable')[:most]
        boxes, labels = image.boxes[order].reshape(-1, 4), image.found[order]
        kinds, about = _of_image(boxes, labels, image)
        count = int((~image.ignored).sum())
        rows.append((np.full(len(order), index), labels, image.scores[order], kinds,
                     np.where(about >= 0, about + before, -1)))
        kept = image.truth[~image.ignored].reshape(-1, 4)
        objects.append((np.full(count, index), image.labels[~image.ignored], size_of(kept)))
        before += count
    empty = (np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0, 'U14'), np.zeros(0, int))
    parts = [np.concatenate(column) for column in zip(empty, *rows)]
    parts += [np.concatenate(column) for column in zip((np.zeros(0, int), ) * 3, *objects)]
    return Judged(*parts)


def _of_image(boxes: np.ndarray, labels: np.ndarray, image: Image) -> Tuple[np.ndarray, np.ndarray]:
    """Kind of each detection (the best score first), and the object it is about, counted among those that count."""
    kinds, about = np.full(len(boxes), 'background', dtype='U14'), np.full(len(boxes), -1)
    if not len(image.truth) or not len(boxes):
        return kinds, about
    overlap = overlaps(boxes, image.truth, image.ignored)
    # The index of an object among those that count.
    number = np.cumsum(~image.ignored) - 1
    taken = np.zeros(len(image.truth), bool)
    right = np.full(len(boxes), -1)
    for row in range(len(boxes)):
        fits = (image.labels == labels[row]) & (overlap[row] >= RIGHT)
        free = fits & ~image.ignored & ~taken
        if free.any():
            right[row] = int(np.where(free, overlap[row], -1).argmax())
            taken[right[row]] = True
        elif (fits & image.ignored).any():
            kinds[row] = IGNORED
    for row in range(len(boxes)):
        if right[row] >= 0:
            kinds[row], about[row] = CORRECT, number[right[row]]
        if right[row] >= 0 or kinds[row] == IGNORED:
            continue
        own, other = (np.where(~image.ignored & same, overlap[row], -1.0)
                      for same in (image.labels == labels[row], image.labels != labels[row]))
        best, wrong = int(own.argmax()), int(other.argmax())
        if BACKGROUND <= own[best] < RIGHT:
            kinds[row], about[row] = 'localisation', number[best]
        elif other[wrong] >= RIGHT:
            kinds[row], about[row] = 'classification', number[wrong]
        elif own[best] >= RIGHT:
            kinds[row], about[row] = 'duplicate', number[best]
        elif other[wrong] >= BACKGROUND:
            kinds[row] = 'both'
    return kinds, about


def average_precision(scores: np.ndarray, right: np.ndarray, positives: int) -> float:
    """Area below the curve of precision over recall, at 101 points, as COCO has it.

    Example:
        >>> round(average_precision(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1]), 2), 3)
        0.835
    """
    if not positives or not len(scores):
        return 0.0
    order = np.argsort(-scores, kind='mergesort')
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / positives, np.linspace(0, 1, 101), side='left')
    return float(np.where(places < len(precision), precision[places.clip(max=len(precision) - 1)], 0.0).mean())


def _mean_precision(label: np.ndarray, score: np.ndarray, right: np.ndarray, positives: np.ndarray,
                    classes: np.ndarray) -> float:
    found = [average_precision(score[label == index], right[label == index], int(positives[index]))
             for index in classes]
    return float(np.mean(found)) if found else 0.0


def error_types(judged: Judged, classes: int, threshold: float = 0.0) -> Dict[str, Any]:
    """How many errors of each type there are, and what AP at 0.5 each type costs.

    The cost of a type is the AP that is gained when an oracle mends it and nothing else (dAP of TIDE): a detection of
    the wrong class or place becomes right where its object has no right one, the best score first, and is removed
    otherwise; one of the other types is removed; missed objects are not counted.

    Args:
        judged: of :func:`judge`.
        classes: their number.
        threshold: lowest score of a detection that counts in ``counts``; the costs are those of all detections.

    Returns:
        ``counts`` and ``cost`` by type (with ``missed``), ``ap50``, ``right`` and ``threshold``.
    """
    positives = np.bincount(judged.truth, minlength=classes)
    present = np.flatnonzero(positives)
    shown = judged.kind != IGNORED
    hits = judged.kind == CORRECT
    base = _mean_precision(judged.label[shown], judged.score[shown], hits[shown], positives, present)
    found = judged.hit()
    cost: Dict[str, float] = {}
    for kind in KINDS:
        wrong = judged.kind == kind
        label, right, keep = judged.label.copy(), hits.copy(), shown & ~wrong
        if kind in ('classification', 'localisation'):
            rows = np.flatnonzero(wrong & ~found[judged.about])
            rows = rows[np.argsort(-judged.score[rows], kind='stable')]
            mended = rows[np.unique(judged.about[rows], return_index=True)[1]]
            label[mended], right[mended], keep[mended] = judged.truth[judged.about[mended]], True, True
        cost[kind] = _mean_precision(label[keep], judged.score[keep], right[keep], positives, present) - base
    fewer = positives - np.bincount(judged.truth[judged.missed()], minlength=classes)
    cost[MISSED] = _mean_precision(judged.label[shown], judged.score[shown], hits[shown], fewer, present) - base
    counted = judged.score >= threshold
    number = {kind: int((counted & (judged.kind == kind)).sum()) for kind in KINDS}
    number[MISSED] = int(judged.missed(threshold).sum())
    return dict(counts=number, cost=cost, ap50=base, right=int((counted & hits).sum()), threshold=float(threshold))


def best_threshold(judged: Judged) -> Dict[str, float]:
    """The score at which F1 is best, with precision and recall there; all classes together, at an overlap of 0.5."""
    shown = judged.kind != IGNORED
    score, right = judged.score[shown], (judged.kind == CORRECT)[shown]
    order = np.argsort(-score, kind='stable')
    hits = np.cumsum(right[order])
    total = len(judged.truth)
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + max(total, 1))
    if not len(f1) or not f1.max():
        return dict(score=0.5, f1=0.0, precision=0.0, recall=0.0)
    # A threshold takes all detections of the same score, so that only the last of them counts.
    last = np.append(score[order][1:] != score[order][:-1], True)
    at = int(np.where(last, f1, -1).argmax())
    return dict(score=float(score[order[at]]), f1=float(f1[at]), precision=float(hits[at] / (at + 1)),
                recall=float(hits[at] / total))


def confidence(judged: Judged) -> Dict[str, Any]:
    """Detection ECE and reliability curve (:mod:`kd_mm.lab.report.calibration`); right is a true positive at 0.5."""
    counted = (judged.kind != IGNORED) & (judged.score >= LOWEST)
    return reliability(counts(judged.score[counted], judged.kind[counted] == CORRECT, BOX_BINS))


def side_by_side(student: np.ndarray, teacher: np.ndarray, judged: Judged, classes: int) -> Dict[str, Any]:
    """Of the objects of each class and size: how many both have found, one of them alone, neither.

    Args:
        student, teacher: (T,) whether each has found an object.
        judged: of either one, for classes and sizes.
        classes: their number.

    Returns:
        ``classes``, a list, and ``sizes``, by name, of dicts with ``both``, ``teacher``, ``student``, ``neither``.
    """
    def table(chosen: np.ndarray) -> Dict[str, int]:
        return dict(both=int((student & teacher & chosen).sum()), teacher=int((teacher & ~student & chosen).sum()),
                    student=int((student & ~teacher & chosen).sum()), neither=int((~student & ~teacher & chosen).sum()))

    return dict(classes=[table(judged.truth == index) for index in range(classes)],
                sizes={name: table(judged.size == index) for index, name in enumerate(SIZES)})


def same_detections(student: Image, teacher: Image, thresholds: Tuple[float, float]) -> Tuple[int, int]:
    """(common, all): detections of the teacher that the student shares, with the same class and an overlap of 0.5.

    Args:
        student, teacher: of one image.
        thresholds: lowest score that counts, of each.
    """
    kept = [image.scores >= threshold for image, threshold in zip((student, teacher), thresholds)]
    none = np.zeros(int(kept[1].sum()), bool)
    seen = Image(teacher.boxes[kept[1]], teacher.found[kept[1]], none, student.boxes[kept[0]], student.scores[kept[0]],
                 student.found[kept[0]])
    judged = judge([seen], most=len(seen.boxes))
    return int(judged.hit().sum()), len(none)


def precision_recall(images: Sequence[Image], classes: Sequence[str]) -> Dict[str, Any]:
    """COCO's numbers: AP over overlaps of 0.5 to 0.95, by class, by size, and the curves at 0.5.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``recall`` (of 100 detections), ``sizes`` by name, ``classes``: a list of
        dicts with ``name``, ``objects``, ``ap``, ``ap50``, ``sizes``, ``curve`` (precision at recalls of 0 to 1 in
        steps of 0.05); and ``curve`` of the mean over classes.  None where there is no object.

    Raises:
        ValueError: pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError(f'average precision is measured by pycocotools, which cannot be imported ({error}). Install '
                         'it: pip install pycocotools') from error
    notes: List[Dict[str, Any]] = []
    results: List[Dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        for box, label, ignored in zip(image.truth, image.labels, image.ignored):
            wide, high = box[2:] - box[:2]
            notes.append(dict(id=len(notes) + 1, image_id=number, category_id=int(label) + 1, iscrowd=int(ignored),
                              bbox=[*map(float, box[:2]), float(wide), float(high)], area=float(wide * high)))
        for box, label, score in zip(image.boxes, image.found, image.scores):
            wide, high = box[2:] - box[:2]
            results.append(dict(image_id=number, category_id=int(label) + 1, score=float(score),
                                bbox=[*map(float, box[:2]), float(wide), float(high)]))
    truth = COCO()
    truth.dataset = dict(info={}, images=[dict(id=number) for number in range(1, len(images) + 1)], annotations=notes,
                         categories=[dict(id=index, name=name) for index, name in enumerate(classes, 1)])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), 'bbox')
        if not results:
            evaluation.cocoDt.dataset = dict(truth.dataset, annotations=[])
            evaluation.cocoDt.createIndex()
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval['precision'], evaluation.eval['recall']  # (T, R, K, A, M), (T, K, A, M)

    def mean(values: np.ndarray) -> Any:
        known = values[values > -1]
        return float(known.mean()) if known.size else None

    def curve(values: np.ndarray) -> Any:
        known = values[:, (values > -1).all(axis=0)]
        return [round(float(value), 4) for value in known.mean(axis=1)[::5]] if known.size else None

    sizes = {name: index for index, name in enumerate(SIZES, 1)}
    objects = np.bincount(np.concatenate([np.zeros(0, int), *(image.labels[~image.ignored] for image in images)]),
                          minlength=len(classes))
    rows = [dict(name=name, objects=int(objects[index]), ap=mean(precision[:, :, index, 0, -1]),
                 ap50=mean(precision[0, :, index, 0, -1]),
                 sizes={size: mean(precision[:, :, index, at, -1]) for size, at in sizes.items()},
                 curve=curve(precision[0, :, index:index + 1, 0, -1])) for index, name in enumerate(classes)]
    return dict(ap=mean(precision[:, :, :, 0, -1]), ap50=mean(precision[0, :, :, 0, -1]),
                ap75=mean(precision[5, :, :, 0, -1]), recall=mean(recall[:, :, 0, -1]),
                sizes={size: mean(precision[:, :, :, at, -1]) for size, at in sizes.items()}, classes=rows,
                curve=curve(precision[0, :, :, 0, -1]))
