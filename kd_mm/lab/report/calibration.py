"""Does a score of 0.8 mean that 80 of 100 are right?  For the pixels of a segmenter and the boxes of a detector."""

from typing import Any, Dict, Optional

import numpy as np

#: Bins of the score, of equal width. 15 for pixels (Guo et al., ICML 2017), 10 for the few boxes of a detector.
PIXEL_BINS, BOX_BINS = 15, 10
#: Boxes with a lower score are not counted: the hosts keep none below it by default, and there are thousands.
LOWEST = 0.05


def counts(scores: np.ndarray, right: np.ndarray, bins: int) -> np.ndarray:
    """(3, bins): how many scores are in each bin, their sum, and how many of them were right.

    What several images give adds up.

    Args:
        scores: (M,), from 0 to 1.
        right: (M,), true or false.
        bins: of equal width; the upper edge of a bin belongs to the next one, but 1 to the last.
    """
    place = np.minimum((np.asarray(scores, np.float64) * bins).astype(np.int64), bins - 1)
    return np.stack([np.bincount(place, minlength=bins).astype(np.float64),
                     np.bincount(place, weights=scores, minlength=bins),
                     np.bincount(place, weights=np.asarray(right, np.float64), minlength=bins)])


def reliability(found: np.ndarray) -> Dict[str, Any]:
    """Expected calibration error and reliability curve of :func:`counts`.

    ``ECE = sum_b n_b / n |right_b - score_b|`` (Naeini et al., AAAI 2015), with the share that was right and the mean
    score of each bin.  Of boxes, where right means a true positive, it is the detection ECE of the score alone (Küppers
    et al., CVPR workshops 2020).  ``gap`` is the same without the absolute value: above 0 the scores are too high.

    Returns:
        ``ece`` and ``gap`` (None without a score), and the lists ``score``, ``right`` (None in an empty bin) and
        ``count`` by bin.

    Example:
        >>> found = counts(np.array([0.9, 0.9, 0.9, 0.9, 0.1]), np.array([1, 1, 0, 0, 0]), bins=10)
        >>> round(reliability(found)['ece'], 2), round(reliability(found)['gap'], 2)
        (0.34, 0.34)
    """
    number, total, right = found
    whole = number.sum()
    share = np.divide(right, number, out=np.zeros_like(right), where=number > 0)
    score = np.divide(total, number, out=np.zeros_like(total), where=number > 0)

    def listed(values: np.ndarray) -> list:
        return [round(float(value), 4) if many else None for value, many in zip(values, number)]

    ece: Optional[float] = float((number * np.abs(share - score)).sum() / whole) if whole else None
    gap: Optional[float] = float((total - right).sum() / whole) if whole else None
    return dict(ece=ece, gap=gap, score=listed(score), right=listed(share), count=number.astype(int).tolist())
