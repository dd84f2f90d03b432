"""The only reader of data samples: boxes, labels, segmentation maps and the valid area.

Losses and regions ask these functions, never a data sample, so that plain-tensor use and both hosts look the same.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.types import KDBatch


def input_shape(batch: KDBatch) -> Tuple[int, int]:
    """(Hin, Win) of the padded batch, in pixels.

    Raises:
        ValueError: the batch does not know it.
    """
    if batch.input_shape is None:
        raise ValueError('the size of the padded input is not known: give KDBatch(input_shape=(Hin, Win))')
    return int(batch.input_shape[0]), int(batch.input_shape[1])


def images(batch: KDBatch) -> Tensor:
    """(N, 3, Hin, Win), as the student sees them.

    Raises:
        ValueError: the batch does not have them.
    """
    if batch.images is None:
        raise ValueError('this loss looks at the input images and the batch has none: give KDBatch(images=...)')
    return batch.images


def img_shapes(batch: KDBatch) -> List[Tuple[int, int]]:
    """(h, w) of every image before padding; the padded size where it is not known."""
    if batch.img_shapes is not None:
        return [(int(shape[0]), int(shape[1])) for shape in batch.img_shapes]
    shapes = []
    for sample in batch.data_samples:
        shape = sample.metainfo.get('img_shape') or input_shape(batch)
        shapes.append((int(shape[0]), int(shape[1])))
    return shapes


def gt_boxes(batch: KDBatch) -> List[Tensor]:
    """Ground-truth boxes of every image, (M, 4) as (x1, y1, x2, y2) in pixels of the padded input.

    Raises:
        ValueError: the data has no boxes.
    """
    if batch.boxes is not None:
        return list(batch.boxes)
    boxes = []
    for sample in batch.data_samples:
        instances = getattr(sample, 'gt_instances', None)
        if instances is None or 'bboxes' not in instances:
            break
        found = instances.bboxes
        found = found.tensor if hasattr(found, 'tensor') else found  # mmdet's box classes wrap a tensor
        boxes.append(found.reshape(-1, found.shape[-1])[:, :4])
    else:
        if boxes:
            return boxes
    raise ValueError('this loss or region needs ground-truth boxes and the data has none '
                     '(data_samples[i].gt_instances.bboxes). Use a loss without region, or a dataset with boxes')


def gt_labels(batch: KDBatch) -> List[Tensor]:
    """Class indices (M,) of the boxes of every image."""
    if batch.labels is not None:
        return list(batch.labels)
    labels = [sample.gt_instances.labels for sample in batch.data_samples
              if getattr(sample, 'gt_instances', None) is not None and 'labels' in sample.gt_instances]
    if not labels or len(labels) != len(batch.data_samples):
        raise ValueError('this loss needs class labels of the boxes and the data has none '
                         '(data_samples[i].gt_instances.labels)')
    return labels


def has_seg_map(batch: KDBatch) -> bool:
    """Whether the batch carries segmentation labels."""
    return batch.seg_map is not None or (len(batch.data_samples) > 0 and all(
        getattr(sample, 'gt_sem_seg', None) is not None for sample in batch.data_samples))


def seg_map(batch: KDBatch, size: Optional[Tuple[int, int]] = None) -> Tensor:
    """Segmentation labels (N, H, W), integers; with ``size`` resized by nearest neighbour (cell i reads
    ``floor(i * Hin / H)``).

    Raises:
        ValueError: the data has no segmentation map.
    """
    if batch.seg_map is not None:
        labels = batch.seg_map
    elif has_seg_map(batch):
        labels = torch.stack([sample.gt_sem_seg.data.reshape(sample.gt_sem_seg.data.shape[-2:])
                              for sample in batch.data_samples])
    else:
        raise ValueError('this loss or region needs a segmentation map and the data has none '
                         '(data_samples[i].gt_sem_seg)')
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
    return seg_map(batch, size) != (batch.ignore_index if ignore_index is None else ignore_index)
