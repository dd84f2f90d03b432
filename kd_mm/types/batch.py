"""Types and the shape letters of the package.

Shape letters: N images, L levels, C channels (Cs student, Ct teacher), H W cells of a feature map, Hin Win the padded
input in pixels, K classes, M boxes of one image (or rows of RoI logits), A anchors per cell.

Boxes are ``(x1, y1, x2, y2)`` in pixels of the padded input; a name ending in ``_cells`` is in feature cells.
A *level* is a scale of a pyramid, a *stage* a part of a backbone, a *step* one training iteration.
"""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple, Union

from torch import Tensor

#: L tensors, usually of shape (N, C_l, H_l, W_l); RoI logits are (M, K).
Features = Tuple[Tensor, ...]


@dataclass
class KDBatch:
    """What a loss may know about the images of one step, besides the tapped tensors.

    Only :mod:`kd_mm.types.targets` reads it.  A Runner gives ``data_samples``; plain-tensor use (notebooks, tests)
    gives the other fields directly.

    Attributes:
        input_shape: (Hin, Win) of the padded batch, in pixels.
        data_samples: the host's data samples, one an image.
        boxes: N tensors (M, 4) in input pixels.
        labels: N tensors (M,) of class indices.
        instances: N tensors (M, 4), boxes whose features are to be compared; None for the ground truth.
        masks: N tensors (M, h, w), 1 in the pixels of each object, from the upper left corner of the input.
        img_shapes: N pairs (h, w): image sizes before padding.
        row_labels: (M,) target classes of logits that come as rows (RoIs), all images one after the other; given by
            whoever makes the rows, a data sample does not know them. Several of them where levels have rows of their
            own (the stages of a cascade).
        row_targets: (M, 4) encoded regression targets of the rows of box deltas; one tensor per level where levels have
            their own rows.
        row_totals: for each level, how many proposals were sampled, of which the rows may be the positive ones.
        seg_map: (N, Hin, Win) integer labels.
        images: (N, 3, Hin, Win), normalised as the student sees them; for a loss that looks at the input itself.
        ignore_index: label of ``seg_map`` that no loss may look at.
        step: iteration number, from 0; schedules and random masks depend on it.
        max_steps: iterations of the whole training, 0 if unknown.
        student_logits, teacher_logits: class logits (N, A*K, H, W), one a level, for regions made of predictions; a
            distiller fills them in from the region's own taps (``logits_at``).
        seed: base of the random masks; they depend on (seed, rank, step) alone, so a resumed run draws the same.
    """

    input_shape: Optional[Tuple[int, int]] = None
    data_samples: Sequence[Any] = ()
    boxes: Optional[List[Tensor]] = None
    labels: Optional[List[Tensor]] = None
    instances: Optional[List[Tensor]] = None
    masks: Optional[List[Tensor]] = None
    img_shapes: Optional[List[Tuple[int, int]]] = None
    row_labels: Union[Tensor, Sequence[Tensor], None] = None
    row_targets: Union[Tensor, Sequence[Tensor], None] = None
    row_totals: Optional[Sequence[int]] = None
    seg_map: Optional[Tensor] = None
    images: Optional[Tensor] = None
    ignore_index: int = 255
    student_logits: Features = ()
    teacher_logits: Features = ()
    step: int = 0
    max_steps: int = 0
    seed: int = 0
