"""The only reader of the hosts' data samples.

Losses and regions ask :mod:`kd_mm.types.targets`; what that needs of a data sample is read here, when it is asked for
and not before.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

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
        """(M, 4) as (x1, y1, x2, y2) in pixels of the padded input."""
        found = self._of_instances('bboxes')
        if found is None:
            return None
        tensors = [boxes.tensor if hasattr(boxes, 'tensor') else boxes for boxes in found]  # mmdet's wrap a tensor
        return [boxes.reshape(-1, boxes.shape[-1])[:, :4] for boxes in tensors]

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
        """(M, 4), regions in which nothing is said about objects; empty where a sample has none."""
        found = []
        for sample in self.data_samples:
            boxes: Any = getattr(getattr(sample, 'ignored_instances', None), 'bboxes', None)
            boxes = torch.zeros(0, 4) if boxes is None else boxes
            boxes = boxes.tensor if hasattr(boxes, 'tensor') else boxes
            found.append(boxes.reshape(-1, boxes.shape[-1])[:, :4])
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
