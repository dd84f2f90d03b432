"""The only reader of the hosts' data samples.

Losses and regions ask :mod:`kd_mm.types.targets`; what that needs of a data sample is read here, when it is asked for
and not before.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor


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
