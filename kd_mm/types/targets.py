"""What a batch says about its images: sizes, boxes, labels, segmentation maps and the valid area.

Losses and regions ask these functions and never read a data sample, so that plain tensors and both hosts look the
same.  :mod:`kd_mm.hosts.samples` reads the data samples of the hosts.
"""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_mm.ops.boxes import envelope
from kd_mm.ops.functional import parameter_options
from kd_mm.types.batch import KDBatch

NO_MASKS = ('this region needs instance masks and the data has none (data_samples[i].gt_instances.masks). Load them '
            "with dict(type='LoadAnnotations', with_bbox=True, with_mask=True), or use GTBoxRegion")


def input_shape(batch: KDBatch) -> Tuple[int, int]:
    """(Hin, Win) of the padded batch, in pixels.

    Raises:
        ValueError: the batch does not know it.
    """
    shape = batch.targets.input_shape
    if shape is None:
        raise ValueError('the size of the padded input is not known: give KDBatch(input_shape=(Hin, Win))')
    return int(shape[0]), int(shape[1])


def images(batch: KDBatch) -> Tensor:
    """(N, 3, Hin, Win), as the student sees them.

    Raises:
        ValueError: the batch does not have them.
    """
    if batch.targets.images is None:
        raise ValueError('this loss looks at the input images and the batch has none: give KDBatch(images=...)')
    return batch.targets.images


def img_shapes(batch: KDBatch) -> List[Tuple[int, int]]:
    """(h, w) of every image before padding; the padded size where it is not known."""
    known, source = batch.targets.img_shapes, batch.targets.source
    if known is None:
        known = [] if source is None else source.img_shapes(batch.targets.input_shape)
    return [(int(shape[0]), int(shape[1])) for shape in known]


def gt_boxes(batch: KDBatch) -> List[Tensor]:
    """Ground-truth boxes of every image, (M, 4) as (x1, y1, x2, y2) in pixels of the padded input; of rotated boxes the
    upright ones around them.

    Raises:
        ValueError: the data has no boxes.
    """
    found = _of_source(batch, batch.targets.boxes, 'boxes')
    if found is not None:
        return [envelope(boxes) for boxes in found]
    raise ValueError('this loss or region needs ground-truth boxes and the data has none '
                     '(data_samples[i].gt_instances.bboxes). Use a loss without region, or a dataset with boxes')


def rotated_boxes(batch: KDBatch) -> Optional[List[Tensor]]:
    """Ground-truth boxes of every image (M, 5), centre, width, height and angle in radians; None for upright boxes."""
    given, source = batch.targets.boxes, batch.targets.source
    if given is not None:
        return list(given) if given and all(boxes.shape[-1] == 5 for boxes in given) else None
    return None if source is None else source.rotated()


def gt_labels(batch: KDBatch) -> List[Tensor]:
    """Class indices (M,) of the boxes of every image."""
    found = _of_source(batch, batch.targets.labels, 'labels')
    if found is None:
        raise ValueError('this loss needs class labels of the boxes and the data has none '
                         '(data_samples[i].gt_instances.labels)')
    return list(found)


def ignored_boxes(batch: KDBatch) -> List[Tensor]:
    """Regions of every image in which nothing is said about objects (crowds), (M, 4) in pixels of the padded input."""
    known, source = batch.targets.ignored, batch.targets.source
    if known is not None:
        return known
    return [] if source is None else list(source.ignored())


def _of_source(batch: KDBatch, value: Any, name: str) -> Any:
    """A target that was given, or what the host's samples say; None where neither has it."""
    if value is not None or batch.targets.source is None:
        return value
    return getattr(batch.targets.source, name)()


def row_labels(batch: KDBatch, rows: int, level: int = 0) -> Tensor:
    """Target classes of logits that come as rows (RoIs), (M,).

    Raises:
        ValueError: nobody gave them, or not as many as there are rows.
    """
    labels = _of_level(batch.given.row_labels, level)
    if labels is None:
        raise ValueError("this loss needs the target class of every row (KDBatch.row_labels) and nobody gave it. In a "
                         "config at='@roi_logits' does; DKDLoss takes target='teacher_argmax' as well")
    if tuple(labels.shape) != (rows, ):
        raise ValueError(f'row_labels of shape {tuple(labels.shape)} for {rows} rows')
    return labels


def row_targets(batch: KDBatch, rows: Tensor, level: int = 0) -> Tuple[Tensor, int]:
    """Encoded regression targets of rows of box deltas, (M, 4), and the number of sampled proposals.

    Raises:
        ValueError: nobody gave them, or they do not fit.
    """
    targets = _of_level(batch.given.row_targets, level)
    if targets is None:
        raise ValueError("this loss needs the target of every box (KDBatch.row_targets) and nobody gave it. In a "
                         "config at='@roi_boxes' or '@rpn_boxes' does")
    if targets.shape != rows.shape:
        raise ValueError(f'row_targets of shape {tuple(targets.shape)} for box deltas {tuple(rows.shape)}')
    total = len(rows) if batch.given.row_totals is None else int(batch.given.row_totals[level])
    return targets.to(rows), total


def _of_level(value: Union[Tensor, Sequence[Tensor], None], level: int) -> Optional[Tensor]:
    return value if value is None or isinstance(value, Tensor) else value[level]


def gt_masks(batch: KDBatch) -> List[Tensor]:
    """Instance masks of every image, bool (M, h, w), from the upper left corner of the padded input.

    Raises:
        ValueError: the data has no masks.
    """
    found = _of_source(batch, batch.targets.masks, 'masks')
    if found is None:
        raise ValueError(NO_MASKS)
    return [masks > 0 for masks in found]


def has_seg_map(batch: KDBatch) -> bool:
    """Whether the batch carries segmentation labels, a segmentor's.

    Some detectors (HTC, panoptic ones) have a map of stuff besides their boxes, ``gt_sem_seg.sem_seg``; its classes are
    not those of their logits, and 255 in it does not mean that a place is to be ignored.
    """
    source = batch.targets.source
    return batch.targets.seg_map is not None or (source is not None and source.has_seg_map())


def seg_map(batch: KDBatch, size: Optional[Tuple[int, int]] = None) -> Tensor:
    """Segmentation labels (N, H, W), integers; with ``size`` resized by nearest neighbour (cell i reads
    ``floor(i * Hin / H)``).

    Raises:
        ValueError: the data has no segmentation map.
    """
    if not has_seg_map(batch):
        raise ValueError('this loss or region needs a segmentation map and the data has none '
                         '(data_samples[i].gt_sem_seg)')
    labels = _of_source(batch, batch.targets.seg_map, 'seg_map')
    if size is not None and tuple(labels.shape[-2:]) != tuple(size):
        # Labels up to 2**24 are exact in float32, the only type that interpolate takes on every device.
        labels = F.interpolate(labels[:, None].float(), size=tuple(size), mode='nearest')[:, 0].to(labels.dtype)
    return labels


def valid_pixels(batch: KDBatch, size: Tuple[int, int], ignore_index: Optional[int] = None) -> Optional[Tensor]:
    """(N, H, W) bool, false where the label is ``ignore_index``; None when there are no labels to tell.

    Args:
        ignore_index: the label; the batch's own when None.
    """
    if not has_seg_map(batch):
        return None
    return seg_map(batch, size) != (batch.targets.ignore_index if ignore_index is None else ignore_index)


def class_members(batch: KDBatch, features: Tensor, classes: Optional[int] = None,
                  mask: Optional[Tensor] = None) -> Tensor:
    """Weight of each cell in each class, (N, H*W, K): 1 (or the mask's weight) in its own class, 0 elsewhere.

    Args:
        batch: gives the labels.
        features: (N, C, H, W); size, device and dtype of the result.
        classes: K; labels from K on are in no class. None: the highest label and one, at least 1.
        mask: weights (N, 1, H, W) or None.

    Raises:
        ValueError: the data has no segmentation map.
    """
    labels = seg_map(batch, (features.shape[2], features.shape[3])).to(features.device).flatten(1).long()
    known = (labels != batch.targets.ignore_index) & (labels >= 0)
    if classes is None:
        classes = int(labels.where(known, torch.zeros_like(labels)).max()) + 1 if labels.numel() else 1
    known = known & (labels < classes)
    weights = known.to(features.dtype)
    if mask is not None:
        weights = weights * mask.to(features.dtype).flatten(1)
    members = features.new_zeros(*labels.shape, classes)
    return members.scatter_(2, labels.where(known, torch.zeros_like(labels))[:, :, None], weights[:, :, None])


FRAMES = ('input', 'image')


def batch_boxes(batch: KDBatch, frame: str, like: Tensor, classes: Optional[Sequence[int]] = None,
                rotated: bool = False) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes of all images in one tensor.

    Args:
        batch: gives boxes, labels and sizes.
        frame: 'input' or 'image': the size that box coordinates refer to.
        like: device and dtype of the result (half precision becomes float32).
        classes: keep only boxes of these class indices; None keeps all.
        rotated: give rotated boxes as they are, (N, M, 5). Default False: the upright boxes around them.

    Returns:
        boxes (N, M, 4) in input pixels, filled up with zeros; whether each is a box (N, M); (h, w) of the frames
        (N, 2), the padded input where the image is not known.

    Raises:
        ValueError: the data has no boxes (or no labels, with ``classes``), or not as many as images.

    Example:
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[torch.rand(2, 4), torch.rand(0, 4)])
        >>> boxes, real, frames = batch_boxes(batch, 'input', torch.zeros(2, 8, 4, 4))
        >>> boxes.shape, real.sum(dim=1).tolist()
        (torch.Size([2, 2, 4]), [2, 0])
    """
    options = parameter_options(like)
    turned = rotated_boxes(batch) if rotated else None
    found: List[Tensor] = [boxes.detach().to(**options).reshape(-1, 4 if turned is None else 5)
                           for boxes in (gt_boxes(batch) if turned is None else turned)]
    if len(found) != like.shape[0]:
        raise ValueError(f'boxes of {len(found)} images for features of {like.shape[0]} images')
    if classes is not None:
        wanted = torch.tensor(list(classes), device=options['device'])
        found = [boxes[torch.isin(labels.to(options['device']), wanted)]
                 for boxes, labels in zip(found, gt_labels(batch))]
    frames = img_shapes(batch) if frame == 'image' else []
    frames = frames or [input_shape(batch)] * len(found)
    if len(frames) != len(found):
        raise ValueError(f'boxes of {len(found)} images and sizes of {len(frames)}')
    boxes = pad_sequence(found, batch_first=True)
    counts = torch.tensor([len(boxes) for boxes in found], device=options['device'])
    real = torch.arange(boxes.shape[1], device=options['device'])[None] < counts[:, None]
    return boxes, real, torch.tensor(frames, **options)
