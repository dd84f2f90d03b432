"""Pictures of numbers: maps in colours, tiles with captions, and rows of them.  Arrays are uint8, (h, w, 3), RGB."""

from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np

#: Pixels of a line of text, and of the space around everything.
LINE, GAP = 18, 6
BACKGROUND, INK = (250, 250, 250), (30, 30, 30)
_FONT, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42


def in_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map (h, w) from dark (``low`` and below) to bright (``high`` and above); grey where it is not finite.

    Example:
        >>> picture = in_colours(np.array([[0.0, 1.0, np.nan]]), 0, 1)
        >>> [int(pixel.mean()) for pixel in picture[0]]
        [51, 173, 128]
    """
    known = np.isfinite(values)
    scaled = (np.where(known, values, low) - low) / max(high - low, 1e-12)
    levels = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    picture = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()
    picture[~known] = 128
    return picture


def hues(count: int) -> List[Tuple[int, int, int]]:
    """So many colours (r, g, b) around the circle of hues.

    Example:
        >>> hues(3)
        [(230, 50, 50), (50, 230, 50), (50, 50, 230)]
    """
    circle = np.array([[[180 * index // count, 200, 230]] for index in range(count)], np.uint8).reshape(-1, 1, 3)
    return [(int(red), int(green), int(blue)) for red, green, blue in cv2.cvtColor(circle, cv2.COLOR_HSV2RGB)[:, 0]]


def limits(maps: Sequence[np.ndarray]) -> Tuple[float, float]:
    """The range that several maps share: all but the hundredth part at either end.

    Example:
        >>> limits([np.zeros((2, 2)), np.ones((2, 2))])
        (0.0, 1.0)
    """
    values = np.concatenate([part[np.isfinite(part)].ravel() for part in maps])
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (1, 99))
    return float(low), float(high)


def fitted(picture: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """A picture at another size (h, w): cells stay cells where it grows."""
    grows = size[0] >= picture.shape[0]
    return cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_NEAREST if grows else cv2.INTER_AREA)


def text_line(text: str, width: int, bold: bool = False) -> np.ndarray:
    """A line of text, cut where it is too long."""
    def length(words: str) -> int:
        return int(cv2.getTextSize(words, _FONT, _SCALE, 1)[0][0])

    if length(text) > width - 4:
        while text and length(f'{text}...') > width - 4:
            text = text[:-1]
        text = f'{text}...'
    line = np.full((LINE, width, 3), BACKGROUND, np.uint8)
    for shift in (0, 1) if bold else (0, ):
        cv2.putText(line, text, (2 + shift, LINE - 5), _FONT, _SCALE, INK, 1, cv2.LINE_AA)
    return line


def tile(picture: Optional[np.ndarray], size: Tuple[int, int], caption: str) -> np.ndarray:
    """A picture of a size (h, w) under its caption; an empty place without a picture."""
    body = np.full((*size, 3), 235, np.uint8) if picture is None else fitted(picture, size)
    return np.concatenate([text_line(caption, size[1]), body])


def beside(tiles: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Tiles of one height in a row of this width."""
    height = max(part.shape[0] for part in tiles)
    row = np.full((height, width, 3), BACKGROUND, np.uint8)
    left = 0
    for part in tiles:
        row[:part.shape[0], left:left + part.shape[1]] = part
        left += part.shape[1] + GAP
    return row


def below(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of one width, one below the other, with a margin around all."""
    width = rows[0].shape[1]
    parts: List[np.ndarray] = []
    for row in rows:
        parts += [row, np.full((GAP, width, 3), BACKGROUND, np.uint8)]
    return cv2.copyMakeBorder(np.concatenate(parts), GAP, 0, GAP, GAP, cv2.BORDER_CONSTANT, value=BACKGROUND)
