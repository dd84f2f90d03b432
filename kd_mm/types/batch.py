"""Types and the shape letters of the package.

Shape letters: N images, L levels, C channels (Cs student, Ct teacher), H W cells of a feature map, Hin Win the padded
input in pixels, K classes, M boxes of one image (or rows of RoI logits), A anchors per cell.

Boxes are ``(x1, y1, x2, y2)`` in pixels of the padded input; a name ending in ``_cells`` is in feature cells.
A *level* is a scale of a pyramid, a *stage* a part of a backbone, a *step* one training iteration.
"""

from dataclasses import dataclass, field
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from kd_mm.ops import distributed
from kd_mm.ops.sampling import seeded_generator

#: L tensors, usually of shape (N, C_l, H_l, W_l); RoI logits are (M, K).
Features = Tuple[Tensor, ...]


#: N tensors, or one for each level where levels have rows of their own.
PerLevel = Union[Tensor, Sequence[Tensor], None]


@dataclass
class Targets:
    """What is known of the images of a step.

    :mod:`kd_mm.types.targets` reads it.  What is not given is asked of ``source`` when a loss wants it, and not before:
    nothing is decoded that nobody looks at.

    Attributes:
        input_shape: (Hin, Win) of the padded batch, in pixels.
        img_shapes: N pairs (h, w): image sizes before padding.
        boxes: N tensors (M, 4) in input pixels.
        labels: N tensors (M,) of class indices.
        masks: N tensors (M, h, w), 1 in the pixels of each object, from the upper left corner of the input.
        seg_map: (N, Hin, Win) integer labels.
        ignore_index: label of ``seg_map`` that no loss may look at. Default 255.
        images: (N, C, Hin, Win), normalised as the student sees them; for a loss that looks at the input itself.
        source: the data samples of a host, see :class:`kd_mm.hosts.samples.Samples`.
        ignored: N tensors (M, 4) in input pixels: regions in which nothing is said about objects.
    """

    input_shape: Optional[Tuple[int, int]] = None
    img_shapes: Optional[List[Tuple[int, int]]] = None
    boxes: Optional[List[Tensor]] = None
    labels: Optional[List[Tensor]] = None
    masks: Optional[List[Tensor]] = None
    seg_map: Optional[Tensor] = None
    ignore_index: int = 255
    images: Optional[Tensor] = None
    source: Any = None
    ignored: Optional[List[Tensor]] = None


@dataclass(frozen=True)
class StepInfo:
    """Which step it is.

    Attributes:
        step: iteration number, from 0; schedules and random masks depend on it.
        max_steps: iterations of the whole training, 0 if unknown.
        seed: base of the random masks.
        rank: of this process among those that train together. Default: its own.
    """

    step: int = 0
    max_steps: int = 0
    seed: int = 0
    rank: int = field(default_factory=distributed.rank)

    def generator(self, *numbers: int) -> torch.Generator:
        """Random numbers that depend on (seed, rank, step, numbers) alone, so that a resumed run draws the same.

        Example:
            >>> draws = [torch.rand(1, generator=StepInfo(step=step, rank=0).generator(0)).item() for step in (1, 1, 2)]
            >>> draws[0] == draws[1], draws[0] == draws[2]
            (True, False)
        """
        return seeded_generator(self.seed, self.rank, self.step, *numbers)


@dataclass(frozen=True)
class Given:
    """What one term needs besides the images' targets, from its reader.

    Attributes:
        instances: N tensors (M, 4), boxes whose features are to be compared; None for the ground truth.
        row_labels: (M,) target classes of logits that come as rows (RoIs), all images one after the other. Several of
            them where levels have rows of their own (the stages of a cascade).
        row_targets: (M, 4) encoded regression targets of the rows of box deltas; one tensor per level where levels
            have their own rows.
        row_totals: for each level, how many proposals were sampled, of which the rows may be the positive ones.
        student_logits, teacher_logits: class logits (N, A*K, H, W), one a level, for regions made of predictions.
    """

    instances: Optional[List[Tensor]] = None
    row_labels: PerLevel = None
    row_targets: PerLevel = None
    row_totals: Optional[Sequence[int]] = None
    student_logits: Features = ()
    teacher_logits: Features = ()


class KDBatch:
    """What a loss may know besides the tensors that it compares, in three parts.

    A distiller makes the parts.  In plain-tensor use (notebooks, tests) their fields may be given directly, by the
    names that they have in their parts::

        KDBatch(boxes=[...], input_shape=(480, 640), step=100)

    Args:
        targets: of the images.
        info: which step it is.
        given: what belongs to one term alone.

    Raises:
        ValueError: a part and a field of it are both given.

    Example:
        >>> batch = KDBatch(boxes=[torch.zeros(0, 4)], step=3)
        >>> len(batch.targets.boxes), batch.info.step, batch.given.instances
        (1, 3, None)
    """

    __slots__ = ('targets', 'info', 'given')  # so that a field set beside them is an error

    def __init__(self, targets: Optional[Targets] = None, info: Optional[StepInfo] = None,
                 given: Optional[Given] = None, *, input_shape: Optional[Tuple[int, int]] = None,
                 img_shapes: Optional[List[Tuple[int, int]]] = None, boxes: Optional[List[Tensor]] = None,
                 labels: Optional[List[Tensor]] = None, masks: Optional[List[Tensor]] = None,
                 seg_map: Optional[Tensor] = None, ignore_index: int = 255, images: Optional[Tensor] = None,
                 step: int = 0, max_steps: int = 0, seed: int = 0, instances: Optional[List[Tensor]] = None,
                 row_labels: PerLevel = None, row_targets: PerLevel = None,
                 row_totals: Optional[Sequence[int]] = None, student_logits: Features = (),
                 teacher_logits: Features = ()):
        of_images = (input_shape, img_shapes, boxes, labels, masks, seg_map, images)
        of_term = (instances, row_labels, row_targets, row_totals, student_logits or None, teacher_logits or None)
        for name, part, fields in (('targets', targets, of_images), ('given', given, of_term),
                                   ('info', info, (step or None, max_steps or None, seed or None))):
            if part is not None and any(value is not None for value in fields):
                raise ValueError(f'KDBatch: give either `{name}` or its fields, not both')
        self.targets = targets or Targets(input_shape, img_shapes, boxes, labels, masks, seg_map, ignore_index, images)
        self.info = info or StepInfo(step, max_steps, seed)
        self.given = given or Given(instances, row_labels, row_targets, row_totals, student_logits, teacher_logits)
