"""Data samples with more labels than those of the pipeline, which stay as they are.

A data set may keep its samples, and a loader its batches: nothing of them is changed, what is written is new.
"""

from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from kd_mm.types.labels import Detections

#: What an object may have besides its box, class and mask is not known of a new one.
KNOWN = ('bboxes', 'labels', 'masks')


def fault_of(sample: Any, detector: bool) -> Optional[str]:
    """Why a sample of the training data cannot get more labels; None if it can.

    Args:
        sample: of the host.
        detector: whether it is a detector's.
    """
    instances = getattr(sample, 'gt_instances', None)
    if not detector or instances is None:
        return None
    more = sorted(set(instances.keys()) - set(KNOWN))
    if more:
        return (f'objects of the training data have {", ".join(more)} besides {", ".join(KNOWN)}, which a new object '
                'has not. Leave it out of the pipeline')
    boxes = getattr(instances, 'bboxes', None)
    width = None if boxes is None else boxes.shape[-1]
    return None if width in (None, 4) else f'boxes of {width} numbers are not supported, only x1 y1 x2 y2'


def _has(sample: Any, part: str, name: str) -> bool:
    """Whether a part of a sample has something of this name; a part without objects is false, but there."""
    found = getattr(sample, part, None)
    return found is not None and name in found


def has_masks(samples: Sequence[Any]) -> bool:
    """Whether objects of these samples have masks."""
    return any(_has(sample, 'gt_instances', 'masks') for sample in samples)


def with_room(samples: Any, detector: bool, shape: Tuple[int, int], ignore_index: int, device: Any) -> Any:
    """Samples that all say something: nothing at all for a picture without labels.

    Args:
        samples: of the host; they stay as they are.
        detector: whether they are a detector's.
        shape: (Hin, Win) of the padded input.
        ignore_index: label of a pixel that is not known.
        device: of the labels.

    Returns:
        The samples themselves where each has labels.
    """
    def complete(sample: Any) -> bool:
        return _has(sample, 'gt_instances', 'bboxes') if detector else _has(sample, 'gt_sem_seg', 'data')

    if all(map(complete, samples)):
        return samples
    first = next((sample for sample in samples if complete(sample)), None)
    found = []
    for sample in samples:
        if complete(sample):
            found.append(sample)
            continue
        new = _copy(sample)
        if detector:
            instances = InstanceData()
            empty = torch.zeros(0, 4, device=device)
            instances.bboxes = empty if first is None else _boxes(first.gt_instances.bboxes, empty)
            instances.labels = torch.zeros(0, dtype=torch.long, device=device)
            if first is not None and 'masks' in first.gt_instances:
                instances.masks = _masks(first.gt_instances.masks, np.zeros((0, *shape), dtype=np.uint8), shape, False)
            new.gt_instances = instances
            if getattr(sample, 'ignored_instances', None) is not None and not _has(
                    sample, 'ignored_instances', 'bboxes'):
                ignored = InstanceData()
                ignored.bboxes, ignored.labels = instances.bboxes[:0], instances.labels[:0]
                new.ignored_instances = ignored
        else:
            new.gt_sem_seg = PixelData(data=torch.full((1, *shape), ignore_index, dtype=torch.long, device=device))
        found.append(new)
    return found


def with_objects(samples: Any, additions: Sequence[Optional[Detections]]) -> Any:
    """Samples with more objects.

    Args:
        samples: of a detector; they stay as they are.
        additions: for each image; None for nothing.

    Returns:
        The samples themselves where there is nothing to add.
    """
    if not any(addition is not None and len(addition) for addition in additions):
        return samples
    found = []
    for sample, addition in zip(samples, additions):
        if addition is not None and len(addition):
            old, sample = sample.gt_instances, _copy(sample)
            sample.gt_instances = _joined(old, addition)
        found.append(sample)
    return found


def with_map(samples: Any, maps: Optional[Tensor]) -> Any:
    """Samples with other segmentation maps.

    Args:
        samples: of a segmentor; they stay as they are.
        maps: (N, Hin, Win); None to leave them.
    """
    if maps is None:
        return samples
    found = []
    for sample, labels in zip(samples, maps):
        old, sample = sample.gt_sem_seg, _copy(sample)
        sample.gt_sem_seg = PixelData(metainfo=old.metainfo, data=labels.to(old.data).reshape(old.data.shape))
        found.append(sample)
    return found


def _copy(sample: Any) -> Any:
    """A sample of its own that shares what it holds."""
    new = type(sample)(metainfo=sample.metainfo)
    for name, value in sample.items():
        new.set_field(value, name)
    return new


def _joined(old: Any, addition: Detections) -> InstanceData:
    new = InstanceData(metainfo=old.metainfo)
    boxes = old.bboxes.tensor if hasattr(old.bboxes, 'tensor') else old.bboxes
    new.bboxes = _boxes(old.bboxes, torch.cat([boxes, addition.boxes.to(boxes)]))
    new.labels = torch.cat([old.labels, addition.labels.to(old.labels)])
    if 'masks' in old:
        assert addition.masks is not None
        masks = old.masks
        if isinstance(masks, Tensor):
            size = (int(masks.shape[-2]), int(masks.shape[-1]))
            more = torch.as_tensor(_padded(addition.masks, size), device=masks.device).to(masks)
            new.masks = torch.cat([masks, more])
        else:
            size = (int(masks.height), int(masks.width))
            new.masks = _masks(masks, _padded(addition.masks, size), size, True)
    return new


def _boxes(like: Any, boxes: Tensor) -> Any:
    return type(like)(boxes) if hasattr(like, 'tensor') else boxes.to(like)


def _padded(masks: Tensor, size: Tuple[int, int]) -> np.ndarray:
    """(M, H, W) of 0 and 1: the masks from the upper left corner."""
    found = np.zeros((len(masks), *size), dtype=np.uint8)
    content = masks[:, :size[0], :size[1]].cpu().numpy()
    found[:, :content.shape[1], :content.shape[2]] = content
    return found


def _masks(like: Any, more: np.ndarray, size: Tuple[int, int], keep: bool) -> Any:
    """Bitmaps of the host, polygons drawn first; with ``keep`` after those that are there."""
    bitmap = like.to_bitmap() if hasattr(like, 'to_bitmap') else like
    parts: List[np.ndarray] = [bitmap.masks.reshape(-1, *size), more] if keep else [more]
    return type(bitmap)(np.concatenate(parts).astype(np.uint8), *size)
