"""Pictures of a page: an image with boxes over it as vectors, so that their labels are sharp at every zoom, and label
maps.
"""

import base64
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np

#: Width of an image in a page, in pixels of its own.
WIDTH = 640
#: Height of a label's text, as a part of the image's width, and width of a letter as a part of that.
TEXT, LETTER = 0.036, 0.56

Rectangle = Tuple[float, float, float, float]
Colour = Tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        box: (x1, y1, x2, y2) in pixels of the picture.
        text: its label.
        colour: as in CSS.
        dashed: for what is not there.
    """

    box: Rectangle
    text: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Label:
    """A label that has found a place: the rectangle behind it, and the text."""

    area: Rectangle
    text: str
    colour: str
    ink: str


@dataclass(frozen=True)
class Panel:
    """One picture of several that stand side by side.

    Attributes:
        caption: below it.
        image: data URL.
        size: (width, height) in pixels.
        boxes, labels: over it.
        note: a few words more.
    """

    caption: str
    image: str
    size: Tuple[int, int]
    boxes: Tuple[Box, ...] = ()
    labels: Tuple[Label, ...] = ()
    note: str = ''

    @property
    def text(self) -> float:
        """Height of the letters."""
        return TEXT * self.size[0]


def hexadecimal(colour: Sequence[int]) -> str:
    """``#rrggbb`` of (r, g, b).

    Example:
        >>> hexadecimal((255, 0, 16))
        '#ff0010'
    """
    return '#' + ''.join(f'{int(part):02x}' for part in colour)


def ink_on(colour: str) -> str:
    """Black or white, what is easier to read on a colour ``#rrggbb``.

    Example:
        >>> ink_on('#ffee00'), ink_on('#202080')
        ('#000000', '#ffffff')
    """
    red, green, blue = (int(colour[at:at + 2], 16) for at in (1, 3, 5))
    return '#000000' if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else '#ffffff'


def _meet(one: Rectangle, two: Rectangle) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def place_labels(boxes: Sequence[Box], size: Tuple[int, int]) -> Tuple[Label, ...]:
    """A place for each label where it covers no other and stays in the picture; those without one are left out.

    It is tried above the box, below it, and at its corners inside; the first boxes choose first.

    Args:
        boxes: what matters most first.
        size: (width, height) of the picture.

    Example:
        >>> boxes = [Box((10, 40, 60, 90), 'cat', '#ff0000'), Box((12, 40, 60, 90), 'dog', '#00ff00')]
        >>> [(label.text, label.area[1]) for label in place_labels(boxes, (200, 100))]
        [('cat', 30.64), ('dog', 90.0)]
    """
    width, height = size
    text = TEXT * width
    taken: List[Rectangle] = []
    found = []
    for box in boxes:
        if not box.text:
            continue
        wide, high = LETTER * text * len(box.text) + 0.5 * text, 1.3 * text
        x1, y1, x2, y2 = map(float, box.box)
        for left, top in ((x1, y1 - high), (x1, y2), (x2 - wide, y1 - high), (x1, y1), (x2 - wide, y2),
                          (x1, y2 - high), (x2 - wide, y1), (x2, y1), (x1 - wide, y1)):
            left = min(max(left, 0.0), max(width - wide, 0.0))
            area = (left, top, left + wide, top + high)
            if top < 0 or area[3] > height or any(_meet(area, other) for other in taken):
                continue
            taken.append(area)
            found.append(Label((round(left, 2), round(top, 2), round(area[2], 2), round(area[3], 2)), box.text,
                               box.colour, ink_on(box.colour)))
            break
    return tuple(found)


def data_url(image: np.ndarray, lossless: bool = False) -> str:
    """An RGB picture (h, w, 3), uint8, as a JPEG (or PNG) inside of an address."""
    kind, options = ('png', [cv2.IMWRITE_PNG_COMPRESSION, 9]) if lossless else ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 85])
    done, data = cv2.imencode(f'.{kind}', np.ascontiguousarray(image[..., ::-1]), options)
    assert done
    return f'data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}'


def scaled(image: np.ndarray, width: int = WIDTH, nearest: bool = False) -> np.ndarray:
    """A picture of this width."""
    size = width, max(round(image.shape[0] * width / image.shape[1]), 1)
    way = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=way)


def boxes_panel(caption: str, image: str, size: Tuple[int, int], boxes: Sequence[Box], note: str = '') -> Panel:
    """A panel with boxes (in pixels of the picture), the most important first."""
    return Panel(caption, image, size, tuple(boxes), place_labels(boxes, size), note)


def moved(box: Sequence[float], factors: Tuple[float, float]) -> Rectangle:
    """A box in the pixels of a picture that was scaled by (x, y)."""
    x1, y1, x2, y2 = (round(float(value), 1) for value in (
        box[0] * factors[0], box[1] * factors[1], box[2] * factors[0], box[3] * factors[1]))
    return x1, y1, x2, y2


def map_panel(caption: str, labels: np.ndarray, palette: Sequence[Colour], image: Optional[np.ndarray] = None,
              note: str = '', strength: float = 0.65) -> Panel:
    """A label map in colours, over the grey image where there is one; what is no class stays grey.

    Args:
        caption: of the panel.
        labels: (H, W).
        palette: (r, g, b) of each class.
        image: (H, W, 3), RGB.
        strength: of the colours over the image.
    """
    small = scaled(labels.astype(np.int32).astype(np.float32), nearest=True).astype(np.int64)
    known = (small >= 0) & (small < len(palette))
    colours = np.array([*palette, (128, 128, 128)], np.float64)
    picture = colours[np.where(known, small, len(palette))]
    if image is not None:
        below = scaled(image).astype(np.float64).mean(axis=2, keepdims=True)
        picture = np.where(known[..., None], strength * picture + (1 - strength) * below, below)
    return Panel(caption, data_url(picture.round().clip(0, 255).astype(np.uint8)), (small.shape[1], small.shape[0]),
                 note=note)
