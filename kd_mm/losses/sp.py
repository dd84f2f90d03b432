"""Similarity-preserving distillation."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import one_of, sample_limit
from kd_mm.ops.functional import safe_sqrt
from kd_mm.ops.sampling import SAMPLES, relation_rows
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

NORMS = ('l2', 'l1')


def similarity_gap(student: Tensor, teacher: Tensor, norm: str = 'l2') -> Tensor:
    """``sum((G_t - G_s)^2) / M^2``, ``G = F F^T`` with each row divided by its norm.

    Holds M^2 numbers, see :func:`similarity_gap_factored` for the other way.

    Args:
        student: (M, Ds).
        teacher: (M, Dt).
        norm: of the rows of G, 'l2' or 'l1'.

    Example:
        >>> import torch
        >>> similarity_gap(torch.eye(2), torch.ones(2, 2))  # rows (1, 0) and (0.7, 0.7): 2 * 0.5858 / 4
        tensor(0.2929)
    """
    order = 2 if norm == 'l2' else 1
    gap = (F.normalize(teacher @ teacher.t(), p=order, dim=1) - F.normalize(student @ student.t(), p=order, dim=1))
    return gap.square().sum() / max(student.shape[0], 1)**2


def similarity_gap_factored(student: Tensor, teacher: Tensor) -> Tensor:
    """The same for L2 rows without any (M, M) matrix: Ds^2 + Ds Dt + Dt^2 numbers.

    Row i of ``G_s`` times row i of ``G_t`` is ``s_i (S^T T) t_i``, and a row's squared norm ``s_i (S^T S) s_i``; the
    squared distance of two unit rows is 2 - 2 cos.

    Example:
        >>> import torch
        >>> similarity_gap_factored(torch.eye(2), torch.ones(2, 2))
        tensor(0.2929)
    """
    square_s = ((student @ (student.t() @ student)) * student).sum(dim=1)
    square_t = ((teacher @ (teacher.t() @ teacher)) * teacher).sum(dim=1)
    cross = ((student @ (student.t() @ teacher)) * teacher).sum(dim=1)
    norms = safe_sqrt(square_s.clamp(min=0)) * safe_sqrt(square_t.clamp(min=0))
    cosine = cross / norms.clamp(min=1e-24)
    ones = (square_s > 0).to(cosine.dtype) + (square_t > 0).to(cosine.dtype)  # a row of zeros has no unit vector
    return (ones - 2 * cosine).clamp(min=0).sum() / max(student.shape[0], 1)**2


@MODELS.register_module()
class SPLoss(KDLoss):
    """Similarity-preserving distillation (Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019).

    ``sum((G_t - G_s)^2) / M^2``, where ``G = F F^T`` are the products between the M samples and each row of G is
    divided by its L2 norm.  Channels and sizes may differ: only relations are compared.

    The published samples are the images of a batch (``samples='image'``).  A detector or segmentor has two to four a
    process, so by default the cells of all images are the samples.

    As published: mdistiller is ``samples='image'``.  torchdistill divides the rows by their L1 norm by mistake
    (``norm='l1'``).

    Memory: with L2 rows the loss is exact for any number of cells: where there are more samples M than features D, the
    products are taken in another order, which holds D^2 and M * D numbers and never M^2; time grows with M * D^2. With
    L1 rows M^2 numbers are held, so set ``limit``.

    Args:
        samples: 'cell' (default) or 'image', see :func:`kd_mm.ops.sampling.relation_rows`; rows (M, C) are M samples.
            One sample has no relation: 0, without gradient.
        limit: the most samples; more are drawn at random, for each step anew. Default None: all.
        norm: of the rows of G, 'l2' or 'l1'. Default 'l2' [P].
        loss_weight: see :class:`KDLoss`. Default 3000 [C: mdistiller, for 64 images a batch]. The squares are summed
            over M rows and divided by M^2, so the loss goes as 1 / M: with cells the weight must follow ``limit`` (or
            the number of cells).

    A region chooses the cells: they are drawn by its weights; with 'image' it multiplies the maps.

    Returns:
        Reduction: per level; mean over pairs
        Summed over levels.

    Raises:
        ValueError: an option is not among its choices, or ``limit`` is no whole number from 2.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='SPLoss'))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)).shape
        torch.Size([])
    """

    takes = (2, 3, 4)
    same_channels = False

    def __init__(self, samples: str = 'cell', limit: Optional[int] = None, norm: str = 'l2',
                 loss_weight: Any = 3000.0):
        super().__init__(loss_weight)
        self.samples = one_of('SPLoss', 'samples', samples, SAMPLES)
        self.limit = sample_limit('SPLoss', limit)
        self.norm = one_of('SPLoss', 'norm', norm, NORMS)
        self.same_size = samples == 'cell'
        self.fewest_images = 2 if samples == 'image' else 1

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        generator = batch.info.generator(level)
        s, t = relation_rows(student, teacher, mask, self.samples, self.limit, generator)
        if self.norm == 'l2' and s.shape[0] > max(s.shape[1], t.shape[1]):
            return similarity_gap_factored(s, t)
        return similarity_gap(s, t, self.norm)
