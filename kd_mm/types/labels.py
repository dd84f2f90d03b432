"""What a model says about images, in the frame of the student's batch: the stuff that labels are made of."""

from dataclasses import dataclass
from typing import List, Optional, Union

import torch
from torch import Tensor


@dataclass
class Detections:
    """Objects of one image.

    Attributes:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the padded input.
        labels: (M,), classes of the student.
        scores: (M,), from 0 to 1.
        masks: (M, h, w) bool, from the upper left corner of the padded input; None where there are none.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, chosen: Tensor) -> 'Detections':
        """Some of them, by indices or a (M,) bool.

        Example:
            >>> found = Detections(torch.zeros(2, 4), torch.tensor([3, 5]), torch.tensor([0.9, 0.1]))
            >>> found[found.scores > 0.5].labels
            tensor([3])
        """
        return Detections(self.boxes[chosen], self.labels[chosen], self.scores[chosen],
                          None if self.masks is None else self.masks[chosen])


@dataclass
class Pixels:
    """The best class of every pixel of a batch.

    Attributes:
        labels: (N, Hin, Win), classes of the student.
        scores: (N, Hin, Win), from 0 to 1.
    """

    labels: Tensor
    scores: Tensor


#: Of a detector one entry an image, of a segmentor one for the batch.
Predictions = Union[List[Detections], Pixels]


def join(parts: List[Detections]) -> Detections:
    """Several of one image as one; their masks where all have some.

    Example:
        >>> one = Detections(torch.zeros(1, 4), torch.tensor([3]), torch.tensor([0.9]))
        >>> len(join([one, one]))
        2
    """
    masks = [part.masks for part in parts if part.masks is not None]
    return Detections(torch.cat([part.boxes for part in parts]), torch.cat([part.labels for part in parts]),
                      torch.cat([part.scores for part in parts]),
                      torch.cat(masks) if len(masks) == len(parts) else None)
