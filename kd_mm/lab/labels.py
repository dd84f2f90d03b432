"""What teachers add to the labels of some training images, as a picture."""

import os
from typing import Any, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.vis import fixed_images
from kd_mm.hosts.samples import Samples
from kd_mm.hosts.semi import is_semi
from kd_mm.lab.data import open_set
from kd_mm.lab.models import scope_of
from kd_mm.ops import drawing
from kd_mm.ops.modes import preserved_random_state

#: Width of one picture of a row.
WIDTH = 480
#: What labellers count, in words.
WORDS = {'boxes': '{:.0f} objects added', 'pixels': '{:.0f} pixels added', 'share': '{:.0f} % of those without a label',
         'score': 'mean score {:.2f}'}
TRUE, NEW = (60, 200, 80), (255, 140, 0)


def draw_labels(file: str, cfg: Config, whole: nn.Module, distiller: Distiller, count: int) -> List[str]:
    """Draw some training images: with their labels, and with those that teachers add.

    Nothing is trained; the training's own step is made as far as its labels.

    Args:
        file: to write (.png, .jpg).
        cfg: whose training data are opened.
        whole: the model of the config.
        distiller: with labels.
        count: of images, spread over the data.

    Returns:
        A line for each image.

    Raises:
        ValueError: the data cannot be opened, or the file not be written.
    """
    if is_semi(whole):
        raise ValueError('the labels of a semi-supervised detector are not drawn: its data have several branches')
    with scope_of(cfg), preserved_random_state(0):
        try:
            dataset: Any = open_set(cfg, cfg.train_dataloader.dataset)
            given = fixed_images(dataset, count, whole)
        except Exception as error:  # the registry and the readers of annotations raise anything
            raise ValueError(f'--plot: the labels of the training data cannot be drawn, since they cannot be opened: '
                             f'{type(error).__name__}: {error}') from error
        rows, lines = [], []
        for index, (picture, batch) in enumerate(given):
            device = next(distiller.student.parameters()).device
            inputs = batch['inputs'].to(device)
            samples = [sample.to(device) for sample in batch['data_samples']]
            step = distiller.current
            try:
                step.begin(inputs, samples)
                step.teach(inputs, samples)
                found = step.label(inputs, samples)
            finally:
                step.clear()
            log = {name.removeprefix('kd_labels_'): float(value) for name, value in distiller.labelling.log.items()}
            text = ', '.join(_said(name, value) for name, value in log.items())
            lines.append(f'image {index}: {text}')
            rows.append(_row(picture, samples, found, distiller.classes, f'image {index}: {text}'))
    extension = os.path.splitext(file)[1].lower()
    drawn = drawing.below([row for pair in rows for row in pair])
    if extension not in ('.png', '.jpg', '.jpeg') or not cv2.imwrite(file, np.ascontiguousarray(drawn[..., ::-1])):
        raise ValueError(f'--plot: {file} cannot be written (looked at {os.path.abspath(file)}); labels are drawn as '
                         '.png or .jpg')
    return lines


def _said(name: str, value: float) -> str:
    """A number of the log in words: of several labellers with the name before; what is not known stays as it is.

    Example:
        >>> _said('boxes', 3.0), _said('sure_score', 0.68), _said('hits', 2.0)
        ('3 objects added', 'sure: mean score 0.68', 'hits 2')
    """
    owner, _, word = name.rpartition('_')
    if word not in WORDS:
        return f'{name} {value:.4g}'
    return (f'{owner}: ' if owner else '') + WORDS[word].format(100 * value if word == 'share' else value)


def _row(picture: np.ndarray, before: Any, after: Any, names: Optional[Sequence[str]], text: str) -> Tuple[
        np.ndarray, np.ndarray]:
    size = max(round(picture.shape[0] * WIDTH / picture.shape[1]), 1), WIDTH
    canvas = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    shape = Samples(before).img_shapes(None)[0]
    width = 2 * WIDTH + drawing.GAP
    tiles = [drawing.tile(_annotated(canvas, samples, before, shape, names), size, caption)
             for samples, caption in ((before, 'ground truth'), (after, 'with the labels of teachers'))]
    return drawing.text_line(text, width, True), drawing.beside(tiles, width)


def _annotated(canvas: np.ndarray, samples: Any, before: Any, shape: Tuple[int, int],
               names: Optional[Sequence[str]]) -> np.ndarray:
    """The canvas with the labels of its sample, masks as areas; new objects in another colour."""
    drawn = canvas.copy()
    found = Samples(samples)
    boxes, classes = found.boxes(), found.labels()
    if boxes is not None and classes is not None:
        old = Samples(before).boxes()  # None for a picture without labels
        known = 0 if old is None else len(old[0])
        scale = canvas.shape[1] / shape[1], canvas.shape[0] / shape[0]
        masks = found.masks()
        for index, mask in enumerate(masks[0] if masks is not None else ()):
            inside = _as_drawn(mask[:shape[0], :shape[1]], canvas) > 0
            drawn[inside] = drawn[inside] * 0.5 + np.array(TRUE if index < known else NEW) * 0.5
        for index, (box, label) in enumerate(zip(boxes[0].tolist(), classes[0].tolist())):
            colour = TRUE if index < known else NEW
            left, top, right, bottom = (round(edge * scale[side % 2]) for side, edge in enumerate(box))
            cv2.rectangle(drawn, (left, top), (right, bottom), colour, 2)
            word = names[label] if names and label < len(names) else str(label)
            cv2.putText(drawn, word, (left + 2, max(top - 3, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1,
                        cv2.LINE_AA)
        return drawn
    maps = found.seg_map()
    if maps is None:
        return drawn
    values = _as_drawn(maps[0][:shape[0], :shape[1]], canvas)
    palette = cv2.applyColorMap(((np.arange(256) * 67) % 256).astype(np.uint8), cv2.COLORMAP_HSV)[:, 0, ::-1]
    inside = (values >= 0) & (values < 255)
    drawn[inside] = (drawn[inside] * 0.4 + palette[values[inside]] * 0.6).astype(np.uint8)
    drawn[~inside] = drawn[~inside] // 3
    return drawn


def _as_drawn(area: torch.Tensor, canvas: np.ndarray) -> np.ndarray:
    """(H, W) whole numbers of a map or mask of the picture, at the size of the canvas."""
    resized = torch.nn.functional.interpolate(area.cpu()[None, None].float(), size=canvas.shape[:2], mode='nearest')
    return resized[0, 0].numpy().astype(int)
