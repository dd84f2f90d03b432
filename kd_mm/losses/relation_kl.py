"""Divergence of the relations between the cells of an image."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.blocks import relation_divergence
from kd_mm.ops.checks import positive, whole
from kd_mm.ops.functional import average_to, nonzero, resize, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch


def grid_of(height: int, width: int, cells: Optional[int]) -> Tuple[int, int]:
    """The largest grid with about the shape of (height, width) and at most ``cells`` cells.

    Example:
        >>> grid_of(100, 200, 5000), grid_of(4, 5, 100)
        ((50, 100), (4, 5))
    """
    if cells is None or height * width <= cells:
        return height, width
    scale = (cells / (height * width))**0.5
    rows = min(max(int(height * scale), 1), cells)
    return rows, max(min(int(width * scale), cells // rows), 1)


def relation_gap(student: Tensor, teacher: Tensor, tau: float = 0.07, mask: Optional[Tensor] = None) -> Tensor:
    """``mean over cells i of KL(softmax_j(t_i . t_j / tau) || softmax_j(x_i . x_j / tau))``, cells of one image.

    ``x`` and ``t`` are the channels of a cell brought to length 1; ``j`` runs over all cells of the image, ``i``
    included.  The matrix of all pairs is never held whole.

    Args:
        student: (N, Cs, H, W).
        teacher: (N, Ct, H, W).
        tau: temperature, above 0.
        mask: (N, 1, H, W), not negative, or None; rows count by it, and the softmax is proportional to it.

    Returns:
        A scalar; 0 where the whole mask is.

    Example:
        >>> x = torch.randn(2, 4, 3, 3)
        >>> relation_gap(2 * x, x).abs().item() < 1e-5
        True
    """
    own, theirs = (unit_vectors(side.flatten(2)).transpose(1, 2) for side in (student, teacher))
    weights = torch.ones_like(own[..., :1]) if mask is None else mask.to(own.dtype).flatten(2).transpose(1, 2)
    total = nonzero(weights.sum())
    rows = [relation_divergence(x, x[None], t, t[None], weight / total, tau,
                                None if mask is None else weight[None, :, 0])
            for x, t, weight in zip(own, theirs, weights)]
    return torch.stack(rows).sum() if rows else own.sum() * 0


@MODELS.register_module()
class RelationKLLoss(KDLoss):
    """Dense relation KL (the local term of distillation v3 of LightlyTrain, Lightly AG 2026; written from the formula).

    ``mean over images and cells i of KL(softmax_j(t_i . t_j / tau) || softmax_j(x_i . x_j / tau))`` with ``j`` over all
    cells of the same image: which cells are alike, not what they are.  Features have length 1 in each cell, so student
    and teacher may differ in channels, and no adapter is needed.  There is no ``tau^2``.

    As published: a linear layer on the student first (``adapter=dict(type='ConvAdapter', always=True)``), then the
    student is resized to the teacher's grid (bilinear) before the vectors get length 1.  The method adds
    :class:`QueueKLLoss` with the weight 1.

    Args:
        tau: temperature, above 0. Default 0.07 [C].
        max_cells: maps with more cells are averaged to a grid with at most so many; None for no limit. Default 4096
            [ours]: time grows with the square of the number of cells, memory does not.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    A region weights the cells on both sides: rows by their share, and as part of the softmax.

    Returns:
        Reduction: per level; mean over cells
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, a side has one channel only, or the inputs are rows.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 4, 4)
        >>> build(dict(type='RelationKLLoss'))(torch.cat([x, x], dim=1), x).item() < 1e-5
        True
    """

    takes = (4, )
    same_channels = False
    same_size = False

    def __init__(self, tau: float = 0.07, max_cells: Optional[int] = 4096, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.tau = positive('RelationKLLoss', 'tau', tau)
        self.max_cells = None if max_cells is None else whole('RelationKLLoss', 'max_cells', max_cells)

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        for level, pair in enumerate(zip(student, teacher)):
            for side, tensor in zip(('student', 'teacher'), pair):
                if tensor.dim() != 4 or tensor.shape[1] < 2:
                    raise ValueError(f'RelationKLLoss, level {level}: {side} {tuple(tensor.shape)}: it relates the '
                                     'cells of a map by their direction, which needs (N, C, H, W) with two channels '
                                     'or more')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        student = resize(student, (teacher.shape[2], teacher.shape[3]))
        grid = grid_of(teacher.shape[2], teacher.shape[3], self.max_cells)
        student, teacher = average_to(student, grid), average_to(teacher, grid)
        mask = None if mask is None else average_to(mask.to(student.dtype), grid)
        return relation_gap(student, teacher, self.tau, mask)
