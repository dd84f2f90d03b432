"""What a segmenter gets right and wrong, from label maps: arrays in, dicts out.

:func:`of_image` counts, what it gives is added up over images, and :func:`summary` makes the numbers of the sums.
"""

from typing import Any, Dict, List, Optional, Sequence

import cv2
import numpy as np

from kd_mm.lab.report.calibration import PIXEL_BINS, counts, reliability

#: The label of pixels that count neither way.
IGNORE = 255
#: Pixels from the nearest edge between two classes of the truth: up to (and not with) each.
DISTANCES = (2, 4, 8, 16)
#: Width of the boundary of boundary IoU, of the image's diagonal.
BOUNDARY = 0.02
#: Areas of segments (connected pixels of one class) in pixels, from and up to; those of COCO.
SIZES = {'small': (0, 32**2), 'medium': (32**2, 96**2), 'large': (96**2, float('inf'))}

Counts = Dict[str, np.ndarray]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(K, K + 1) pixels of each class of the truth (rows) that were given each class (columns).

    The last column counts what a model gave a class that the data have not.

    Args:
        truth: (H, W) labels; those from ``classes`` on are ignored.
        predicted: (H, W) labels; ``classes`` for one that the data have not.
        classes: K.

    Example:
        >>> confusion(np.array([[0, 0, 1, 255]]), np.array([[0, 1, 2, 1]]), 2).tolist()
        [[1, 1, 0], [0, 0, 1]]
    """
    known, width = truth < classes, classes + 1
    place = truth[known].astype(np.int64) * width + predicted[known]
    return np.bincount(place, minlength=classes * width).reshape(classes, width)


def edge_distance(truth: np.ndarray) -> np.ndarray:
    """(H, W) distance in pixels from the nearest pixel beside another class; ignored pixels make no edge.

    Example:
        >>> edge_distance(np.array([[0, 0, 0, 1, 1]])).round().tolist()
        [[2.0, 1.0, 0.0, 0.0, 1.0]]
    """
    edge = np.zeros(truth.shape, np.uint8)
    known = truth != IGNORE
    for one, two in (((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
                     ((slice(None), slice(1, None)), (slice(None), slice(None, -1)))):
        differs = (truth[one] != truth[two]) & known[one] & known[two]
        edge[one] |= differs
        edge[two] |= differs
    if not edge.any():
        return np.full(truth.shape, np.inf)
    return cv2.distanceTransform(1 - edge, cv2.DIST_L2, cv2.DIST_MASK_PRECISE).astype(np.float64)


def boundary_of(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask (H, W) that are at most ``width`` pixels (in rows and in columns) from its outside.

    What lies beyond the image is outside.

    Example:
        >>> boundary_of(np.ones((5, 5), bool), 1)[2].tolist()
        [True, False, False, False, True]
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    inside = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
    return mask & (inside <= width)


def of_image(truth: np.ndarray, predicted: np.ndarray, scores: Optional[np.ndarray], classes: int) -> Counts:
    """What is counted in one image.

    Args:
        truth: (H, W) labels, 255 is ignored.
        predicted: (H, W) labels; ``classes`` for one that the data have not.
        scores: (H, W) of the predicted class, from 0 to 1; None where there is none.
        classes: K.

    Returns:
        ``confusion`` (K, K + 1); ``distance`` (2, D + 1): wrong pixels and all of them by :data:`DISTANCES`;
        ``boundary`` (2, K): intersection and union of the boundaries of each class; ``sizes`` (2, K, 3): right pixels
        and all of them by class and by the size of their segment; ``scores``, of
        :func:`kd_mm.lab.report.calibration.counts`.
    """
    known = truth < classes
    right = (truth == predicted) & known
    bins = np.digitize(edge_distance(np.where(known, truth, IGNORE)), DISTANCES)
    distance = np.stack([np.bincount(bins[chosen], minlength=len(DISTANCES) + 1) for chosen in (known & ~right, known)])
    width = max(round(BOUNDARY * float(np.hypot(*truth.shape))), 1)
    boundary, sizes = np.zeros((2, classes), np.int64), np.zeros((2, classes, len(SIZES)), np.int64)
    for index in np.setdiff1d(np.union1d(truth[known], predicted[known]), [classes]):
        one, two = (boundary_of((labels == index) & known, width) for labels in (truth, predicted))
        boundary[:, index] = (one & two).sum(), (one | two).sum()
    for index in np.unique(truth[known]):
        count, segments, stats, _ = cv2.connectedComponentsWithStats((truth == index).astype(np.uint8), connectivity=8)
        size = np.searchsorted([low for low, _ in SIZES.values()][1:], stats[:, cv2.CC_STAT_AREA], side='right')
        where = segments > 0
        for row, chosen in enumerate((where & right, where)):
            sizes[row, index] = np.bincount(size[segments[chosen]], minlength=len(SIZES))
    found = dict(confusion=confusion(truth, predicted, classes), distance=distance, boundary=boundary, sizes=sizes)
    if scores is not None:
        found['scores'] = counts(scores[known].clip(0, 1), right[known], PIXEL_BINS)
    return found


def add(total: Counts, more: Counts) -> Counts:
    """The sum of two counts, either of which may be empty."""
    return {key: np.asarray(total.get(key, 0) + more.get(key, 0)) for key in {**total, **more}}


def _share(part: Any, whole: Any) -> List[Optional[float]]:
    return [float(one / all_) if all_ else None for one, all_ in zip(np.ravel(part), np.ravel(whole))]


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summary(total: Counts, names: Sequence[str], most: int = 10) -> Dict[str, Any]:
    """The numbers of summed counts, as shares of 1.

    Boundary IoU (Cheng et al., CVPR 2021) is the IoU of the pixels that are near the edge of the class in either map,
    within 2 % of the image's diagonal, summed over images as the IoU is.  ``distance`` is the share of wrong pixels by
    their distance from an edge of the truth.

    Args:
        total: of :func:`add`.
        names: of the classes.
        most: mix-ups that are listed, those of most pixels.

    Returns:
        ``miou``, ``accuracy``, ``mean_accuracy``, ``boundary_iou``; ``classes``: dicts of ``name``, ``pixels``,
        ``iou``, ``accuracy``, ``boundary_iou`` and ``sizes``; ``sizes``: accuracy of the pixels in segments of each
        size; ``distance``: dicts of ``low``, ``high``, ``error``, ``pixels``; ``confusion`` (shares of each row);
        ``mixed``: dicts of ``truth``, ``predicted``, ``pixels``, ``share``; ``calibration``.
    """
    rows, table = total['confusion'].sum(axis=1), total['confusion'][:, :-1]
    columns, hits = table.sum(axis=0), np.diag(table)
    iou, accuracy = _share(hits, rows + columns - hits), _share(hits, rows)
    boundary = _share(*total['boundary'])
    by_size = [_share(*total['sizes'][:, index]) for index in range(len(names))]
    classes = [dict(name=name, pixels=int(rows[index]), iou=iou[index], accuracy=accuracy[index],
                    boundary_iou=boundary[index], sizes=dict(zip(SIZES, by_size[index])))
               for index, name in enumerate(names)]
    edges = [0, *DISTANCES, None]
    distance = [dict(low=low, high=high, error=error, pixels=int(pixels)) for low, high, error, pixels in zip(
        edges, edges[1:], _share(*total['distance']), total['distance'][1])]
    wrong = table - np.diag(hits)
    mixed = [dict(truth=names[row], predicted=names[column], pixels=int(wrong[row, column]),
                  share=float(wrong[row, column] / rows[row]))
             for row, column in zip(*np.unravel_index(np.argsort(-wrong, axis=None)[:most], wrong.shape))
             if wrong[row, column]]
    return dict(
        miou=_mean(iou), accuracy=_share(hits.sum(), rows.sum())[0], mean_accuracy=_mean(accuracy),
        boundary_iou=_mean(boundary), classes=classes,
        sizes=dict(zip(SIZES, _share(*total['sizes'].sum(axis=1)))), distance=distance,
        confusion=[[round(share or 0.0, 4) for share in _share(row, np.full(len(row), whole))]
                   for row, whole in zip(table, rows)],
        mixed=mixed, calibration=reliability(total['scores']) if 'scores' in total else None)


def side_by_side(truth: np.ndarray, student: np.ndarray, teacher: np.ndarray, classes: int) -> np.ndarray:
    """(K, 4) pixels of each class that both have right, the teacher alone, the student alone, neither.

    Example:
        >>> side_by_side(np.array([[0, 0, 0, 1]]), np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, 0]]), 2).tolist()
        [[1, 1, 0, 1], [0, 0, 1, 0]]
    """
    known = truth < classes
    one, two, labels = (student == truth)[known], (teacher == truth)[known], truth[known].astype(np.int64)
    case = np.where(one, np.where(two, 0, 2), np.where(two, 1, 3))
    return np.bincount(labels * 4 + case, minlength=classes * 4).reshape(classes, 4)
