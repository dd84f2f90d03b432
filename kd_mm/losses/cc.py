"""Correlation congruence."""

import math
from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops.checks import boolean, one_of, positive, sample_limit, whole
from kd_mm.ops.functional import safe_sqrt
from kd_mm.ops.sampling import SAMPLES, relation_rows
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

KERNELS = ('gaussian', 'bilinear')
DISTANCES = ('squared', 'norm')


def taylor_gaussian(rows: Tensor, gamma: float, order: int) -> Tensor:
    """``exp(-2 gamma) sum_{p=0..order} (2 gamma)^p / p! (f_i . f_j)^p``: (M, M).

    For unit rows it tends to ``exp(-gamma |f_i - f_j|^2)`` as the order grows.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1., 0.], [0., 1.]])
        >>> torch.allclose(taylor_gaussian(x, 0.4, 12), torch.exp(-0.4 * torch.cdist(x, x)**2))
        True
    """
    products = rows @ rows.t()
    terms = [math.exp(-2 * gamma) * (2 * gamma)**p / math.factorial(p) * products**p for p in range(1, order + 1)]
    return sum(terms, products.new_full((), math.exp(-2 * gamma)))


@MODELS.register_module()
class CCLoss(KDLoss):
    """Correlation congruence (Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019).

    ``|| K(F_s) - K(F_t) ||^2 / M^2``, K a kernel between the M samples: a Gaussian by its Taylor series (see
    :func:`taylor_gaussian`) or the plain products.

    The published samples are the images of a batch, after a linear embedding of both sides that is trained too.  Here
    the samples are by default the cells of all images, as they are (a jointly trained embedding of the teacher can make
    both sides constant).

    As published: torchdistill is ``normalize=False, distance='norm', samples='image'``: it takes the root of the
    squares (the paper does not), and its embeddings are not made unit vectors, for which the Taylor series stands.

    Memory: M^2 numbers a few times, which ``limit`` bounds.

    Args:
        kernel: 'gaussian' or 'bilinear'. Default 'gaussian' [P].
        gamma: of the Gaussian, above 0. Default 0.4 [C: torchdistill].
        order: last power of the Taylor series, from 1. Default 2 [C: torchdistill].
        normalize: make the samples unit vectors first. Default True.
        distance: 'squared' (default, the mean of the squares [P]) or 'norm' (their root over M^2).
        samples: 'cell' (default) or 'image', see :func:`kd_mm.ops.sampling.relation_rows`; rows (M, C) are M samples.
            One sample has no relation: 0, without gradient.
        limit: the most samples; more are drawn at random, for each step anew. None for all. Default 1024.
        loss_weight: see :class:`KDLoss`. Default 1; torchdistill's 0.003 is for 'norm' [C].

    A region chooses the cells: they are drawn by its weights; with 'image' it multiplies the maps.

    Returns:
        Reduction: per level; mean over pairs
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, or cells of one channel are made unit vectors.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='CCLoss'))(3 * x.flip(1), x) < 1e-6)
        True
    """

    takes = (2, 3, 4)
    same_channels = False

    def __init__(self, kernel: str = 'gaussian', gamma: float = 0.4, order: int = 2, normalize: bool = True,
                 distance: str = 'squared', samples: str = 'cell', limit: Optional[int] = 1024,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.kernel = one_of('CCLoss', 'kernel', kernel, KERNELS)
        self.gamma = positive('CCLoss', 'gamma', gamma)
        self.order = whole('CCLoss', 'order', order)
        self.normalize = boolean('CCLoss', 'normalize', normalize)
        self.distance = one_of('CCLoss', 'distance', distance, DISTANCES)
        self.samples = one_of('CCLoss', 'samples', samples, SAMPLES)
        self.limit = sample_limit('CCLoss', limit)
        self.same_size = samples == 'cell'
        self.fewest_images = 2 if samples == 'image' and self.normalize else 1

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if self.normalize and self.samples == 'cell':
            needs_channels('CCLoss', student, 2,
                           'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def relations(self, rows: Tensor) -> Tensor:
        """(M, D) -> (M, M)."""
        if self.normalize:
            rows = F.normalize(rows, dim=1)
        return rows @ rows.t() if self.kernel == 'bilinear' else taylor_gaussian(rows, self.gamma, self.order)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        generator = batch.info.generator(level)
        s, t = relation_rows(student, teacher, mask, self.samples, self.limit, generator)
        if self.normalize and len(s) < 2:  # a unit vector with itself; what rounding leaves is no gradient
            return student.sum() * 0
        total = (self.relations(s) - self.relations(t)).square().sum()
        return (safe_sqrt(total) if self.distance == 'norm' else total) / max(s.shape[0], 1)**2
