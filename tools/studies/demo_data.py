"""Draw the two data sets of the demo: shapes to detect (COCO format) and street scenes (Cityscapes layout).

Everything is drawn here with numpy and OpenCV from one seed; nothing is downloaded.  The same seed gives the same
pixels, boxes and labels, image by image: image ``i`` depends on ``(seed, split, i)`` alone, so that a larger set
begins with the smaller one.

    python tools/studies/demo_data.py work_dirs/demo/data --train 480 --val 120
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

DET_SIZE = (160, 128)  # width, height
DET_CLASSES = ('disc', 'square', 'triangle', 'star')

SEG_SIZE = (192, 96)
ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR, IGNORE = 0, 1, 2, 5, 8, 10, 11, 13, 255
SEG_TRAIN_IDS = (ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR)

# Bump when the drawing changes: the demo's stamps contain it, so that old pictures are not taken for new ones.
VERSION = 2

Random = np.random.Generator
Folder = Union[str, Path]


# ---------------------------------------------------------------------------------------------------------------------
# shared brushes


def texture(rng: Random, height: int, width: int, cell: float, strength: float) -> np.ndarray:
    """Smooth noise of about ``cell`` pixels grain: (height, width, 1), zero mean, standard deviation ``strength``."""
    grid = rng.standard_normal((max(2, int(height / cell) + 1), max(2, int(width / cell) + 1))).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)[..., None] * strength


def stripes(rng: Random, height: int, width: int, strength: float) -> np.ndarray:
    """A sine grating of random direction and period, (height, width, 1)."""
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(3, 9), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase)[..., None] * strength


def colour(rng: Random, low: float = 30, high: float = 225) -> np.ndarray:
    return rng.uniform(low, high, 3).astype(np.float32)


def paint(image: np.ndarray, mask: np.ndarray, value: Any) -> None:
    """Blend ``value`` (colour or picture) into ``image`` in place where ``mask`` (height, width; 0..1) covers it."""
    alpha = mask[..., None].astype(np.float32)
    image *= 1 - alpha
    image += alpha * value


def polygon_mask(shape: Tuple[int, int], points: Any, scale: int = 8) -> np.ndarray:
    """Anti-aliased mask, 0..1, of one polygon given in float pixels."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(np.asarray(points) * scale).astype(np.int32)], 255, cv2.LINE_AA, int(np.log2(scale)))
    return mask.astype(np.float32) / 255


def develop(rng: Random, image: np.ndarray, noise: float, blur: float, light: float) -> np.ndarray:
    """Uneven light, blur and sensor noise: what a camera does to a drawing.  Returns uint8."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle)
    image = image * (1 + light * ramp)[..., None] * rng.uniform(1 - light / 2, 1 + light / 2)
    sigma = rng.uniform(0, blur)
    if sigma > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = image + rng.standard_normal(image.shape).astype(np.float32) * rng.uniform(noise / 3, noise)
    return np.clip(image, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# detection: four shapes, told apart by outline and, less reliably, by colour


def outline(name: str, radius: float, angle: float) -> np.ndarray:
    """Corners of a regular shape around the origin; a disc is many-sided."""
    corners = {'disc': 32, 'square': 4, 'triangle': 3, 'star': 10}[name]
    around = angle + np.arange(corners) * 2 * np.pi / corners
    length = np.full(corners, radius)
    if name == 'star':
        length[1::2] *= 0.45
    return np.stack([np.cos(around), np.sin(around)], 1) * length[:, None]


def shape_points(rng: Random, name: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """Corners of a rotated, slightly squeezed shape."""
    squeeze = np.diag(rng.uniform([0.78, 0.9], 1.0))
    turn = rng.uniform(0, np.pi)
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return outline(name, radius, rng.uniform(0, 2 * np.pi)) @ squeeze @ spin + centre


def class_colour(rng: Random, label: int) -> np.ndarray:
    """Each class has a favourite hue, from which it strays, and which it ignores one time in ten.

    With no hint at all a short training learns to find the shapes but hardly to name them; with a sure one the
    outline, which takes a larger network to see, would not matter.
    """
    hue = label * 180 / len(DET_CLASSES) + rng.normal(0, 11) if rng.random() < 0.9 else rng.uniform(0, 180)
    hsv = np.array([[[hue % 180, rng.uniform(70, 240), rng.uniform(90, 235)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def draw_filling(rng: Random, height: int, width: int, base: np.ndarray) -> np.ndarray:
    """What a shape or a background is made of: colour, grain and, at times, stripes."""
    filling = np.broadcast_to(base, (height, width, 3)).copy()
    filling += texture(rng, height, width, rng.uniform(2, 10), rng.uniform(2, 14)) * rng.uniform(0.5, 1.2, 3)
    if rng.random() < 0.2:
        filling += stripes(rng, height, width, rng.uniform(6, 18))
    return filling.astype(np.float32)


def draw_clutter(rng: Random, image: np.ndarray, least: int, most: int) -> None:
    """Unlabelled strokes, scribbles and odd polygons that a detector has to learn to pass over."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(least, most + 1)):
        kind, tint = rng.integers(3), colour(rng)
        start = rng.uniform(0, [width, height])
        if kind == 0:  # a straight stroke
            end = start + rng.normal(0, 30, 2)
            canvas = np.zeros((height, width), np.uint8)
            cv2.line(canvas, tuple(start.astype(int).tolist()), tuple(end.astype(int).tolist()), 255,
                     int(rng.integers(1, 5)), cv2.LINE_AA)
            mask = canvas.astype(np.float32) / 255
        elif kind == 1:  # a scribble
            path = start + np.cumsum(rng.normal(0, 9, (6, 2)), 0)
            canvas = np.zeros((height, width), np.uint8)
            cv2.polylines(canvas, [path.astype(np.int32)], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA)
            mask = canvas.astype(np.float32) / 255
        else:  # an irregular patch
            around = np.sort(rng.uniform(0, 2 * np.pi, 7))
            radius = rng.uniform(4, 16) * rng.uniform(0.35, 1.0, 7)
            corners = np.stack([np.cos(around), np.sin(around)], 1) * radius[:, None]
            mask = polygon_mask((height, width), start + corners)
        paint(image, mask * rng.uniform(0.5, 1.0), tint)


def draw_shapes(rng: Random, size: Tuple[int, int] = DET_SIZE) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One detection picture.

    Returns:
        tuple: BGR uint8 image, boxes (M, 4) as x, y, w, h in pixels, class indices (M,).
    """
    width, height = size
    image = draw_filling(rng, height, width, colour(rng))
    image += texture(rng, height, width, rng.uniform(20, 60), rng.uniform(5, 18))
    draw_clutter(rng, image, 1, 3)
    owner = np.full((height, width), -1, np.int32)  # which shape is on top of each pixel
    areas, boxes, labels = [], [], []
    for index in range(rng.integers(4, 9)):
        label = int(rng.integers(len(DET_CLASSES)))
        radius = np.exp(rng.uniform(np.log(10), np.log(26)))
        centre = rng.uniform([-2, -2], [width + 2, height + 2])
        outer = shape_points(rng, DET_CLASSES[label], centre, radius)
        mask = polygon_mask((height, width), outer)
        filling = draw_filling(rng, height, width, class_colour(rng, label))
        if rng.random() < 0.05:  # camouflage: nearly the colour of what lies under it
            under = image[mask > 0.5].mean(0) if (mask > 0.5).any() else 128
            filling += under - filling.mean((0, 1)) + rng.choice([-1, 1]) * rng.uniform(14, 30)
        paint(image, mask, filling)
        owner[mask > 0.5] = index
        x1, y1 = np.clip(outer.min(0), 0, [width, height])
        x2, y2 = np.clip(outer.max(0), 0, [width, height])
        areas.append(max(1, int((mask > 0.5).sum())))
        full = np.prod(outer.max(0) - outer.min(0))
        boxes.append([x1, y1, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1) / full])
        labels.append(label)
    if rng.random() < 0.5:  # a few strokes lie on top
        draw_clutter(rng, image, 1, 3)
    keep = []
    for index, (_, _, w, h, inside) in enumerate(boxes):
        visible = (owner == index).sum() / areas[index]
        # A shape hidden or cut off by more than about half is not labelled: nobody could name it.
        if visible > 0.45 and inside > 0.5 and min(w, h) >= 6:
            keep.append(index)
    if not keep:  # stock data sets skip pictures without boxes; an epoch shall be as long as it looks
        return draw_shapes(rng, size)
    kept_boxes = np.asarray([boxes[i][:4] for i in keep], np.float64).reshape(-1, 4)
    kept_labels = np.asarray([labels[i] for i in keep], np.int64)
    return develop(rng, image, noise=6, blur=0.5, light=0.3), kept_boxes, kept_labels


def make_detection(root: Folder, train: int, val: int, seed: int = 0) -> None:
    """Write the detection set in COCO format below ``root``: ``{train,val}/*.png``, ``annotations/*.json``."""
    root = Path(root)
    for number, (split, count) in enumerate((('train', train), ('val', val))):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / 'annotations').mkdir(exist_ok=True)
        images: List[Any] = []
        annotations: List[Any] = []
        for index in range(count):
            image, boxes, labels = draw_shapes(np.random.default_rng([seed, 11, number, index]))
            name = f'{index:05d}.png'
            cv2.imwrite(str(root / split / name), image)
            images.append(dict(id=index + 1, file_name=name, width=image.shape[1], height=image.shape[0]))
            for box, label in zip(boxes.round(2).tolist(), labels.tolist()):
                annotations.append(dict(id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, bbox=box,
                                        area=round(box[2] * box[3], 2), iscrowd=0))
        categories = [dict(id=i + 1, name=name, supercategory='shape') for i, name in enumerate(DET_CLASSES)]
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(dict(info=dict(description='shapes drawn by tools/studies/demo_data.py'), images=images,
                            annotations=annotations, categories=categories)))


# ---------------------------------------------------------------------------------------------------------------------
# segmentation: street scenes


class Scene:
    """A picture and its label map, drawn from far to near."""

    def __init__(self, rng: Random, size: Tuple[int, int]) -> None:
        self.rng = rng
        self.width, self.height = size
        self.image = np.zeros((self.height, self.width, 3), np.float32)
        self.labels = np.full((self.height, self.width), IGNORE, np.uint8)

    def fill(self, points: Any, value: Any, label: Optional[int] = None) -> None:
        """A filled polygon; ``label=None`` paints a detail (a window, a lane mark) that belongs to what is below."""
        points, value = np.asarray(points, np.float64), np.asarray(value, np.float32)
        # Only the rectangle around it: most polygons are windows of a few pixels.
        x1, y1 = np.clip(np.floor(points.min(0)) - 1, 0, [self.width, self.height]).astype(int)
        x2, y2 = np.clip(np.ceil(points.max(0)) + 2, 0, [self.width, self.height]).astype(int)
        if x1 >= x2 or y1 >= y2:
            return
        mask = polygon_mask((y2 - y1, x2 - x1), points - [x1, y1])
        paint(self.image[y1:y2, x1:x2], mask, value[y1:y2, x1:x2] if value.ndim == 3 else value)
        if label is not None:
            self.labels[y1:y2, x1:x2][mask > 0.5] = label

    def box(self, x1: float, y1: float, x2: float, y2: float, value: Any, label: Optional[int] = None) -> None:
        self.fill([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], value, label)

    def blob(self, x: float, y: float, rx: float, ry: float, value: Any, label: Optional[int] = None,
             ragged: float = 0.25, corners: int = 18) -> None:
        around = np.arange(corners) * 2 * np.pi / corners
        length = 1 + self.rng.uniform(-ragged, ragged, corners)
        self.fill(np.stack([x + rx * length * np.cos(around), y + ry * length * np.sin(around)], 1), value, label)

    def grain(self, base: Any, cell: float, strength: float) -> np.ndarray:
        return base + texture(self.rng, self.height, self.width, cell, strength)


def draw_building(scene: Scene, x1: float, x2: float, top: float, foot: float) -> None:
    rng = scene.rng
    wall = colour(rng, 50, 200)
    wall = wall.mean() + (wall - wall.mean()) * rng.uniform(0.1, 0.8)
    scene.box(x1, top, x2, foot, scene.grain(wall, rng.uniform(2, 6), rng.uniform(3, 12)), BUILDING)
    step = rng.uniform(5, 10)
    pane = wall + rng.choice([-1, 1]) * rng.uniform(15, 60)
    for y in np.arange(top + 3, foot - 5, step).tolist():
        for x in np.arange(x1 + 2, x2 - 3, step * rng.uniform(0.8, 1.1)).tolist():
            if rng.random() < 0.85:
                scene.box(x, y, x + step * 0.45, y + step * 0.5, pane + rng.normal(0, 8))


def draw_tree(scene: Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    green = np.array([rng.uniform(30, 90), rng.uniform(60, 140), rng.uniform(40, 120)], np.float32)
    if rng.random() < 0.75:
        scene.box(x - size * 0.07, foot - size, x + size * 0.07, foot, green * 0.5, VEGETATION)
        middle = foot - size * 1.2
    else:  # a bush
        middle = foot - size * 0.4
    for _ in range(rng.integers(3, 6)):
        dx, dy = rng.normal(0, size * 0.28, 2)
        leaves = scene.grain(green * rng.uniform(0.75, 1.2), rng.uniform(1.5, 3), rng.uniform(10, 26))
        scene.blob(x + dx, middle + dy * 0.7, size * 0.5, size * 0.42, leaves, VEGETATION, ragged=0.4)


def draw_car(scene: Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    body, glass = colour(rng, 20, 230), colour(rng, 30, 110)
    width, height = size * rng.uniform(1.3, 2.1), size * rng.uniform(0.8, 1.05)
    left, right = x - width / 2, x + width / 2
    scene.blob(x, foot, width * 0.52, size * 0.12, np.float32(35), None, ragged=0.05)  # its shadow
    for wheel in (left + width * 0.2, right - width * 0.2):
        scene.blob(wheel, foot - size * 0.1, size * 0.15, size * 0.17, np.float32(28), CAR, ragged=0.03)
    scene.box(left, foot - height * 0.55, right, foot - size * 0.1, body, CAR)
    cabin = [[left + width * 0.14, foot - height * 0.5], [left + width * 0.27, foot - height],
             [right - width * 0.25, foot - height], [right - width * 0.1, foot - height * 0.5]]
    scene.fill(cabin, body * 0.9, CAR)
    scene.fill(np.array(cabin) * 0.76 + np.array([x, foot - height * 0.72]) * 0.24, glass)
    lamp = colour(rng, 120, 250)
    for lamp_x in (left + width * 0.06, right - width * 0.06):
        scene.box(lamp_x - 1, foot - height * 0.45, lamp_x + 1, foot - height * 0.33, lamp)


def draw_person(scene: Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    shirt, trousers, skin = colour(rng), colour(rng, 20, 160), np.array([110, 140, 190]) * rng.uniform(0.4, 1.15)
    width = size * rng.uniform(0.26, 0.36)
    scene.box(x - width * 0.4, foot - size * 0.5, x - width * 0.04, foot, trousers, PERSON)
    scene.box(x + width * 0.04, foot - size * 0.5, x + width * 0.4, foot, trousers, PERSON)
    scene.box(x - width * 0.5, foot - size * 0.84, x + width * 0.5, foot - size * 0.45, shirt, PERSON)
    scene.blob(x, foot - size * 0.92, size * 0.09, size * 0.1, skin, PERSON, ragged=0.05)


def draw_pole(scene: Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    tint, half = np.float32(rng.uniform(40, 170)), max(0.8, size * rng.uniform(0.02, 0.035))
    scene.box(x - half, foot - size, x + half, foot, tint, POLE)
    if rng.random() < 0.5:  # a lamp arm
        reach = size * rng.uniform(0.15, 0.3) * rng.choice([-1, 1])
        scene.box(min(x, x + reach), foot - size - half, max(x, x + reach), foot - size + half, tint, POLE)


def draw_street(rng: Random, size: Tuple[int, int] = SEG_SIZE) -> Tuple[np.ndarray, np.ndarray]:
    """One street scene: BGR uint8 image and uint8 map of Cityscapes train ids (255: ignored)."""
    scene = Scene(rng, size)
    width, height = size
    horizon = height * rng.uniform(0.36, 0.52)
    vanish = width * rng.uniform(0.3, 0.7)
    night = rng.random() < 0.25

    # sky, from blue over grey to dusk, with clouds
    grey = rng.uniform(90, 235)
    top = np.array([grey + rng.uniform(0, 50), grey, grey - rng.uniform(0, 60)], np.float32)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = top * (1 - down) + (top + rng.normal(0, 25, 3)) * down
    scene.box(-1, -1, width + 1, horizon + 2, sky + texture(rng, height, width, rng.uniform(10, 30), 9), SKY)

    # ground: sidewalk everywhere, the road cut into it
    stone = np.float32(rng.uniform(70, 170)) + rng.normal(0, 9, 3).astype(np.float32)
    tar = np.float32(rng.uniform(50, 140)) + rng.normal(0, 6, 3).astype(np.float32)
    scene.box(-1, horizon, width + 1, height + 1, scene.grain(stone, 3, rng.uniform(3, 9)), SIDEWALK)
    for line in np.geomspace(2, height - horizon, 7):  # slabs
        scene.box(-1, horizon + line - 0.3, width + 1, horizon + line + 0.3, stone * rng.uniform(0.8, 0.95))
    left, right = vanish - width * rng.uniform(0.35, 0.8), vanish + width * rng.uniform(0.35, 0.8)
    road = [[vanish - 3, horizon], [vanish + 3, horizon], [right, height + 1], [left, height + 1]]
    scene.fill(road, scene.grain(tar, rng.uniform(1.5, 5), rng.uniform(3, 9)), ROAD)
    for near in np.arange(rng.uniform(0, 0.2), 1, 0.22):  # lane marks
        y1, y2 = horizon + (height - horizon) * near**2, horizon + (height - horizon) * (near + 0.1) ** 2
        middle = (left + right) / 2
        x1, x2 = vanish + (middle - vanish) * near**2, vanish + (middle - vanish) * (near + 0.1) ** 2
        scene.fill([[x1 - near, y1], [x1 + near, y1], [x2 + near * 1.3, y2], [x2 - near * 1.3, y2]], tar + 55)

    # the row of houses and trees behind the pavement, with gaps
    x = -rng.uniform(0, 20)
    while x < width:
        span = rng.uniform(16, 46)
        nearness = abs(x + span / 2 - vanish) / width
        foot = horizon + (height - horizon) * min(0.35, nearness * 0.3) + 1
        kind = rng.random()
        if kind < 0.62:
            draw_building(scene, x, x + span, horizon - (8 + nearness * 70) * rng.uniform(0.5, 1.3), foot)
        elif kind < 0.85:
            draw_tree(scene, x + span / 2, foot, rng.uniform(9, 15) + nearness * 22)
        x += span * rng.uniform(0.9, 1.15)

    # things, far to near; ``depth`` 0 is the horizon, 1 the lower edge
    for depth in np.sort(rng.uniform(0.1, 0.95, rng.integers(6, 14))):
        foot = horizon + (height - horizon) * depth
        scale = depth * (height - horizon)
        road_left, road_right = vanish + (left - vanish) * depth, vanish + (right - vanish) * depth
        side = rng.choice([-1, 1])
        edge = road_left if side < 0 else road_right
        beside = edge + side * rng.uniform(0.1, 0.5) * scale * 1.6
        kind = rng.choice(['car', 'person', 'pole', 'tree', 'thing'], p=[0.32, 0.29, 0.22, 0.09, 0.08])
        if kind == 'car':
            draw_car(scene, rng.uniform(road_left, road_right), foot, scale * rng.uniform(0.55, 0.75) + 3)
        elif kind == 'person':
            x = beside if rng.random() < 0.75 else rng.uniform(road_left, road_right)
            draw_person(scene, x, foot, scale * rng.uniform(0.6, 0.85) + 6)
        elif kind == 'pole':
            draw_pole(scene, beside, foot, scale * rng.uniform(1.2, 2.0) + 14)
        elif kind == 'tree':
            draw_tree(scene, beside, foot, scale * rng.uniform(0.4, 0.7) + 5)
        else:  # a bin, a box: present in the picture, not one of the classes
            scene.box(beside - scale * 0.12, foot - scale * 0.4, beside + scale * 0.12, foot, colour(rng), IGNORE)

    # cast shadows and, at times, the bonnet of the car that carries the camera
    for _ in range(rng.integers(0, 3)):
        x, y = rng.uniform(0, width), rng.uniform(horizon, height)
        around = np.arange(12) * np.pi / 6
        rx, ry = rng.uniform(12, 50), rng.uniform(3, 12)
        shade = polygon_mask((height, width), np.stack([x + rx * np.cos(around), y + ry * np.sin(around)], 1))
        scene.image *= 1 - shade[..., None] * rng.uniform(0.2, 0.5)
    if rng.random() < 0.5:
        scene.blob(width / 2, height + 2, width * 0.45, height * 0.09, colour(rng, 20, 80), IGNORE, ragged=0.02)

    haze = np.exp(-np.abs(np.arange(height) - horizon) / (height * 0.25)).astype(np.float32)[:, None, None]
    scene.image += (grey - scene.image) * haze * rng.uniform(0, 0.4)
    if night:
        scene.image *= rng.uniform(0.3, 0.6)
    return develop(rng, scene.image, noise=14, blur=0.7, light=0.5), scene.labels


def make_segmentation(root: Folder, train: int, val: int, seed: int = 0) -> None:
    """Write the street scenes below ``root`` in Cityscapes' layout (already as train ids)."""
    root = Path(root)
    for number, (split, count) in enumerate((('train', train), ('val', val))):
        images, maps = root / 'leftImg8bit' / split / 'demo', root / 'gtFine' / split / 'demo'
        images.mkdir(parents=True, exist_ok=True)
        maps.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, labels = draw_street(np.random.default_rng([seed, 23, number, index]))
            name = f'demo_{index:06d}_000019'
            cv2.imwrite(str(images / f'{name}_leftImg8bit.png'), image)
            cv2.imwrite(str(maps / f'{name}_gtFine_labelTrainIds.png'), labels)


def make(root: Folder, train: int = 480, val: int = 120, seed: int = 0) -> None:
    """Both sets below ``root``: ``shapes/`` and ``streets/``.  What was there before is replaced."""
    root = Path(root)
    with ProcessPoolExecutor(2) as pool:
        jobs = []
        for name, maker in (('shapes', make_detection), ('streets', make_segmentation)):
            if (root / name).exists():
                shutil.rmtree(root / name)
            jobs.append(pool.submit(maker, root / name, train, val, seed))
        for job in jobs:
            job.result()


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('root', help='folder to write to')
    parser.add_argument('--train', type=int, default=480, help='training images of each set')
    parser.add_argument('--val', type=int, default=120, help='validation images of each set')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    make(args.root, args.train, args.val, args.seed)
    print(f'{args.root}: {args.train} + {args.val} images in shapes/ and in streets/')
    return 0


if __name__ == '__main__':
    sys.exit(main())
