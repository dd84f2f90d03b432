"""What a teacher is sure of, where the ground truth says nothing."""

from typing import Any, List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from kd_mm.ops.boxes import intersection
from kd_mm.ops.checks import entries, from_zero, number, whole
from kd_mm.registry import MODELS
from kd_mm.teachers.labels.base import Labeller
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch
from kd_mm.types.labels import Detections, Pixels, join


@MODELS.register_module()
class PseudoLabels(Labeller):
    """Adds what a teacher predicts with a high score and the ground truth does not say.

    Detectors: an object is added where its score is above ``score``, its IoU with every object of the ground truth is
    below ``iou``, whatever the classes, and less than ``inside`` of its area lies in one ignored region (crowds).  Two
    teachers that see the same object (equal class, IoU from ``iou``) add it once, by the higher score.

    Segmentors: a pixel of the picture (not of the padding) whose label is among ``fill`` gets the class with the
    largest score of all teachers, if that is above ``score``.

    Where nothing passes, the step is that without labels, bit for bit.  The samples of the data set stay as they are.

    Args:
        teacher, classes, prompts: see :class:`kd_mm.teachers.labels.base.Labeller`.
        score: threshold, from 0 to 1: a class score of a detector as its own prediction gives it, a softmax (or
            sigmoid) of a segmentor. Default 0.7 [ours].
        iou: from 0 (nothing that touches an object) to 1. Default 0.5 [ours]. Of detectors.
        inside: share of an object's area in an ignored region from which it is left out, above 0 to 1. Default 0.5
            [ours]. Of detectors.
        min_size: smallest width and height of a box, in pixels. Default 1 [ours].
        fill: labels that say nothing. Default: the ignored label of the student's head. Of segmentors.

    Raises:
        ValueError: a bad value.

    Example:
        >>> batch = KDBatch(input_shape=(64, 64), boxes=[torch.tensor([[0., 0., 10., 10.]])])
        >>> found = Detections(torch.tensor([[1., 0., 10., 10.], [20., 20., 40., 40.], [50., 50., 60., 60.]]),
        ...                    torch.tensor([1, 0, 0]), torch.tensor([0.9, 0.8, 0.6]))
        >>> added, = PseudoLabels(score=0.7).objects(batch, dict(teacher=[found]))
        >>> added.boxes, added.labels
        (tensor([[20., 20., 40., 40.]]), tensor([0]))
    """

    def __init__(self, teacher: Any = None, classes: Any = None, prompts: Any = None, score: float = 0.7,
                 iou: float = 0.5, inside: float = 0.5, min_size: float = 1.0, fill: Optional[Sequence[int]] = None):
        super().__init__(teacher, classes, prompts)
        self.score = number(self.name, 'score', score, 0.0, 1.0)
        self.iou = number(self.name, 'iou', iou, 0.0, 1.0)
        self.inside = number(self.name, 'inside', inside, 0.0, 1.0)
        self.min_size = from_zero(self.name, 'min_size', min_size)
        self.fill = None if fill is None else entries(
            self.name, 'fill', fill, lambda owner, name, value: whole(owner, name, value, 0))

    def objects(self, batch: KDBatch, predictions: Mapping[str, List[Detections]]) -> List[Optional[Detections]]:
        boxes, ignored = targets.gt_boxes(batch), targets.ignored_boxes(batch)
        found: List[Optional[Detections]] = []
        for index, own in enumerate(boxes):
            parts = [self._new(part[index], own, ignored[index] if ignored else own[:0])
                     for part in predictions.values()]
            found.append(self._once(parts))
        added = [part for part in found if part is not None]
        device = boxes[0].device if boxes else None
        total = sum(len(part) for part in added)
        self.count('boxes', torch.tensor(float(total), device=device))
        if total:
            self.count('score', torch.cat([part.scores for part in added]).mean())
        return found

    def _new(self, found: Detections, boxes: Tensor, ignored: Tensor) -> Detections:
        """What passes of one teacher in one image."""
        sizes = (found.boxes[:, 2:] - found.boxes[:, :2]).amin(dim=1)
        # A box without an area has no overlap that could be judged.
        keep = (found.scores > self.score) & (sizes >= self.min_size) & (sizes > 0)
        found = found[keep]
        overlap, union = intersection(found.boxes[:, None], boxes[None].to(found.boxes))
        keep = ~(overlap >= self.iou * union.clamp(min=1e-9)).any(dim=1) if self.iou else ~(overlap > 0).any(dim=1)
        if len(ignored):
            overlap, _ = intersection(found.boxes[:, None], ignored[None].to(found.boxes))
            area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(dim=1)
            keep &= ~(overlap >= self.inside * area[:, None]).any(dim=1)
        return found[keep]

    def _once(self, parts: List[Detections]) -> Optional[Detections]:
        """The objects of all teachers, each once; None for none."""
        kept: List[Detections] = []
        best = sorted(((float(score), -number, row) for number, part in enumerate(parts)
                       for row, score in enumerate(part.scores)), reverse=True) if len(parts) > 1 else []
        if len(parts) == 1:
            return parts[0] if len(parts[0]) else None
        chosen: List[List[int]] = [[] for _ in parts]
        for _, negative, row in best:
            number, one = -negative, parts[-negative]
            twice = False
            for other, part in enumerate(parts):
                if other == number or not chosen[other]:
                    continue
                rows = part[torch.tensor(chosen[other], device=part.boxes.device)]
                overlap, union = intersection(rows.boxes, one.boxes[row])
                same = (rows.labels == one.labels[row]) & (overlap > 0) & (overlap >= self.iou * union)
                twice = twice or bool(same.any())
            if not twice:
                chosen[number].append(row)
        kept = [part[torch.tensor(sorted(rows), device=part.boxes.device)]
                for part, rows in zip(parts, chosen) if rows]
        return join(kept) if kept else None

    def pixels(self, batch: KDBatch, predictions: Mapping[str, Pixels]) -> Optional[Tensor]:
        old = targets.seg_map(batch)
        found = list(predictions.values())
        best, which = torch.stack([part.scores for part in found]).max(dim=0)
        labels = torch.stack([part.labels for part in found]).gather(0, which[None])[0]
        fill = [batch.targets.ignore_index] if self.fill is None else self.fill
        silent = torch.isin(old, torch.tensor(fill, device=old.device, dtype=old.dtype))
        for index, (height, width) in enumerate(targets.img_shapes(batch)):
            silent[index, height:] = False
            silent[index, :, width:] = False
        new = silent & (best > self.score)
        self.count('pixels', new.sum())
        if not bool(new.any()):
            return None
        self.count('share', new.sum() / silent.sum().clamp(min=1))
        self.count('score', best[new].mean())
        return torch.where(new, labels.to(old), old)
