"""Probabilistic knowledge transfer."""

from typing import Any, Optional

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops.checks import one_of, positive, sample_limit
from kd_mm.ops.functional import safe_sqrt
from kd_mm.ops.sampling import SAMPLES, relation_rows
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def neighbour_probabilities(rows: Tensor, eps: float = 1e-7) -> Tensor:
    """How likely each sample would choose each one as its neighbour: (M, M), rows sum to 1.

    ``(cos(f_i, f_j) + 1) / 2``, divided by its sum over j (j = i included).

    Example:
        >>> import torch
        >>> neighbour_probabilities(torch.tensor([[1., 0.], [0., 1.]]), 1e-12)
        tensor([[0.6667, 0.3333],
                [0.3333, 0.6667]])
    """
    unit = rows / (safe_sqrt(rows.square().sum(dim=1, keepdim=True)) + eps)
    similar = (unit @ unit.t() + 1) / 2
    return similar / similar.sum(dim=1, keepdim=True)


@MODELS.register_module()
class PKTLoss(KDLoss):
    """Probabilistic knowledge transfer (Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge
    Transfer, ECCV 2018).

    ``mean over i, j of p_t(j | i) log((p_t(j | i) + eps) / (p_s(j | i) + eps))`` with the probabilities of
    :func:`neighbour_probabilities` between the M samples.

    The published samples are the images of a batch (``samples='image'``).  A detector or segmentor has two to four a
    process, so by default the cells of all images are the samples.

    As published: mdistiller is the default on rows (its features are pooled to one vector an image).

    Memory: the logarithm needs every one of the M^2 probabilities, no order of products avoids them; ``limit`` bounds
    M, by random draws.

    Args:
        eps: added to norms and probabilities, above 0. Default 1e-7 [C].
        samples: 'cell' (default) or 'image', see :func:`kd_mm.ops.sampling.relation_rows`; rows (M, C) are M samples.
            One sample has no relation: 0, without gradient.
        limit: the most samples; more are drawn at random, for each step anew. None for all. Default 1024.
        loss_weight: see :class:`KDLoss`. Default 30000 [C: mdistiller, for 64 images a batch]. The mean is over M^2 and
            a row sums to 1, so the loss goes as 1 / M.

    A region chooses the cells: they are drawn by its weights; with 'image' it multiplies the maps.

    Returns:
        Reduction: per level; mean over pairs
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, or the cells have one channel only.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='PKTLoss'))(3 * x.flip(1), x).abs() < 1e-3)
        True
    """

    takes = (2, 3, 4)
    same_channels = False

    def __init__(self, eps: float = 1e-7, samples: str = 'cell', limit: Optional[int] = 1024,
                 loss_weight: Any = 30000.0):
        super().__init__(loss_weight)
        self.eps = positive('PKTLoss', 'eps', eps)
        self.samples = one_of('PKTLoss', 'samples', samples, SAMPLES)
        self.limit = sample_limit('PKTLoss', limit)
        self.same_size = samples == 'cell'
        self.fewest_images = 2 if samples == 'image' else 1

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if self.samples == 'cell':
            needs_channels('PKTLoss', student, 2,
                           'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        generator = batch.info.generator(level)
        rows = relation_rows(student, teacher, mask, self.samples, self.limit, generator)
        if len(rows[0]) < 2:  # a sample alone has no neighbour; what rounding leaves is no gradient
            return student.sum() * 0
        s, t = (neighbour_probabilities(side, self.eps) for side in rows)
        return (t * ((t + self.eps) / (s + self.eps)).log()).sum() / max(t.numel(), 1)
