"""The only readers of the hosts' data samples.

Losses and regions ask :mod:`kd_mm.types.targets`; what that needs of a data sample is read here, when it is asked for
and not before.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.boxes import envelope
from kd_mm.types.records import Seen


class Samples:
    """Targets of a batch, from the data samples of mmdet or mmseg.

    Each method gives one entry an image, or None where the samples do not have it.

    Args:
        data_samples: one an image.
    """

    def __init__(self, data_samples: Sequence[Any]):
        self.data_samples = data_samples

    def img_shapes(self, padded: Optional[Tuple[int, int]]) -> List[Tuple[int, int]]:
        """(h, w) of every image before padding; ``padded`` where it is not known.

        Raises:
            ValueError: neither is known.
        """
        shapes: List[Any] = [sample.metainfo.get('img_shape') or padded for sample in self.data_samples]
        if any(shape is None for shape in shapes):
            raise ValueError('the size of the padded input is not known: give KDBatch(input_shape=(Hin, Win))')
        return shapes

    def boxes(self) -> Optional[List[Tensor]]:
        """(M, 4) as (x1, y1, x2, y2) in pixels of the padded input; of rotated ones the boxes around them."""
        found = self._numbers()
        return None if found is None else [envelope(boxes) for boxes in found]

    def rotated(self) -> Optional[List[Tensor]]:
        """(M, 5), centre, width, height, angle; None where boxes are upright."""
        found = self._numbers()
        return found if found and all(boxes.shape[-1] == 5 for boxes in found) else None

    def _numbers(self) -> Optional[List[Tensor]]:
        found = self._of_instances('bboxes')
        if found is None:
            return None
        tensors = [boxes.tensor if hasattr(boxes, 'tensor') else boxes for boxes in found]  # mmdet's wrap a tensor
        return [boxes.reshape(-1, boxes.shape[-1]) for boxes in tensors]

    def labels(self) -> Optional[List[Tensor]]:
        """(M,) class indices."""
        return self._of_instances('labels')

    def masks(self) -> Optional[List[Tensor]]:
        """(M, h, w) bool, from the upper left corner of the padded input."""
        found = self._of_instances('masks')
        if found is None:
            return None
        return [masks if isinstance(masks, Tensor) else masks.to_tensor(dtype=torch.bool, device='cpu')
                for masks in found]  # mmdet's bitmap and polygon masks

    def ignored(self) -> List[Tensor]:
        """(M, 4), regions in which nothing is said about objects, of rotated ones the boxes around them; empty where a
        sample has none."""
        found = []
        for sample in self.data_samples:
            boxes: Any = getattr(getattr(sample, 'ignored_instances', None), 'bboxes', None)
            boxes = torch.zeros(0, 4) if boxes is None else boxes
            boxes = boxes.tensor if hasattr(boxes, 'tensor') else boxes
            found.append(envelope(boxes.reshape(-1, boxes.shape[-1])))
        return found

    def _of_instances(self, name: str) -> Optional[List[Any]]:
        every = [getattr(sample, 'gt_instances', None) for sample in self.data_samples]
        if not every or any(instances is None or name not in instances for instances in every):
            return None
        return [getattr(instances, name) for instances in every]

    def has_seg_map(self) -> bool:
        """Whether there are labels of a segmentor: ``gt_sem_seg.data``."""
        return len(self.data_samples) > 0 and all(
            'data' in (getattr(sample, 'gt_sem_seg', None) or ()) for sample in self.data_samples)

    def seg_map(self) -> Optional[Tensor]:
        """(N, Hin, Win) integer labels."""
        if not self.has_seg_map():
            return None
        maps = [sample.gt_sem_seg.data for sample in self.data_samples]
        return torch.stack([labels.reshape(labels.shape[-2:]) for labels in maps])


class TensorSamples(Samples):
    """Targets of a batch whose labels are one tensor, as MMYOLO's fast collate makes it.

    The labels are copied at once: some heads (YOLOv5, YOLOv7) rewrite the tensor while they compute their losses.

    Args:
        data_samples: ``bboxes_labels`` (M, 2 + 4): image, class, x1, y1, x2, y2, or (M, 2 + 5) with rotated boxes; and
            ``img_metas``, one an image.
    """

    def __init__(self, data_samples: Dict[str, Any]):
        super().__init__(())
        self.table = data_samples['bboxes_labels'].clone()
        self.metas: Sequence[Dict[str, Any]] = data_samples['img_metas']

    def img_shapes(self, padded: Optional[Tuple[int, int]]) -> List[Tuple[int, int]]:
        shapes: List[Any] = [meta.get('img_shape') or padded or meta['batch_input_shape'] for meta in self.metas]
        return shapes

    def _numbers(self) -> Optional[List[Tensor]]:
        return [self.table[self.table[:, 0] == index, 2:] for index in range(len(self.metas))]

    def labels(self) -> Optional[List[Tensor]]:
        return [self.table[self.table[:, 0] == index, 1].long() for index in range(len(self.metas))]


def samples_of(data_samples: Any) -> Samples:
    """The reader of a batch's data samples: one an image, or a dict with the labels of all in one tensor."""
    return TensorSamples(data_samples) if is_table(data_samples) else Samples(data_samples)


def is_table(data_samples: Any) -> bool:
    """Whether the labels of a batch are one tensor instead of a data sample an image."""
    return isinstance(data_samples, dict) and 'bboxes_labels' in data_samples


def samples_seen(data_samples: Any, seen: Seen) -> Any:
    """New data samples for a model that sees the batch at another size; those of the host stay as they are.

    Sizes, boxes, masks and segmentation maps are those of its own pictures. What a pipeline put beside the picture as
    an array is left out.

    Args:
        data_samples: of mmdet or mmseg.
        seen: how it sees the batch.
    """
    if not data_samples or seen.size == seen.shape == seen.content:
        return data_samples
    if is_table(data_samples):
        down, along = seen.factors
        table = data_samples['bboxes_labels']
        factors = [1, 1, along, down, along, down, *([1] * (table.shape[1] - 6))]
        return dict(data_samples, bboxes_labels=table * table.new_tensor(factors),
                    img_metas=[dict(meta, batch_input_shape=seen.size) for meta in data_samples['img_metas']])
    return [_sample_seen(sample, seen) for sample in data_samples]


def _sample_seen(sample: Any, seen: Seen) -> Any:
    down, along = seen.factors

    def scaled(size: Any) -> Tuple[int, ...]:
        return (min(round(size[0] * down), seen.content[0]), min(round(size[1] * along), seen.content[1]), *size[2:])

    meta: Dict[str, Any] = {key: value for key, value in sample.metainfo.items() if getattr(value, 'ndim', 0) < 2}
    for key in ('img_shape', 'pad_shape'):
        if meta.get(key) is not None:
            meta[key] = scaled(meta[key])
    if 'batch_input_shape' in meta:
        meta['batch_input_shape'] = seen.size
    factor = meta.get('scale_factor')
    if isinstance(factor, (tuple, list)) and len(factor) == 2:
        meta['scale_factor'] = (factor[0] * along, factor[1] * down)
    found = type(sample)(metainfo=meta)
    for name, value in sample.items():
        if hasattr(value, 'bboxes') or hasattr(value, 'masks'):
            value = _instances_seen(value, seen)
        elif name == 'gt_sem_seg' or name == 'gt_edge_map':
            value = _maps_seen(value, seen)
        found.set_field(value, name)
    return found


def _instances_seen(instances: Any, seen: Seen) -> Any:
    down, along = seen.factors
    found = instances.new()
    boxes = getattr(instances, 'bboxes', None)
    if boxes is not None and hasattr(boxes, 'rescale_'):
        boxes = boxes.clone()
        boxes.rescale_((along, down))
        found.bboxes = boxes
    elif boxes is not None and boxes.shape[-1] == 4:
        found.bboxes = boxes * boxes.new_tensor([along, down, along, down])
    masks = getattr(instances, 'masks', None)
    if masks is not None and hasattr(masks, 'resize'):
        found.masks = masks.resize((round(masks.height * down), round(masks.width * along)))
    return found


def _maps_seen(data: Any, seen: Seen) -> Any:
    down, along = seen.factors
    found = type(data)(metainfo=data.metainfo)
    for name, value in data.items():
        if isinstance(value, Tensor) and value.dim() in (2, 3):
            size = round(value.shape[-2] * down), round(value.shape[-1] * along)
            maps = value.reshape(1, -1, *value.shape[-2:]).float()  # labels up to 2**24 are exact
            resized = torch.nn.functional.interpolate(maps, size=size, mode='nearest')[0].to(value.dtype)
            value = resized.reshape(*value.shape[:-2], *size)
        found.set_field(value, name)
    return found
