"""Relational knowledge distillation."""

from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, Value, needs_channels
from kd_mm.ops.checks import boolean, from_zero, one_of, positive, sample_limit
from kd_mm.ops.functional import nonzero
from kd_mm.ops.sampling import SAMPLES, relation_rows
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def relative_distances(rows: Tensor) -> Tensor:
    """Distances between all samples, divided by the mean of those that are not 0: (M, M).

    Example:
        >>> relative_distances(torch.tensor([[0.], [1.], [3.]]))
        tensor([[0.0000, 0.5000, 1.5000],
                [0.5000, 0.0000, 1.0000],
                [1.5000, 1.0000, 0.0000]])
    """
    # Not by products of the rows: in float32 they lose the distance of two rows that are close to each other.
    distances = torch.cdist(rows, rows, compute_mode='donot_use_mm_for_euclid_dist')
    return distances / nonzero(distances.sum() / nonzero((distances > 0).sum()))


def angles(rows: Tensor) -> Tensor:
    """Cosine of the angle at sample i between samples j and k: (M, M, M), 0 where j or k is i.

    Example:
        >>> angles(torch.tensor([[0., 0.], [2., 0.], [0., 3.]]))[0]
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    arms = F.normalize(rows[None] - rows[:, None], dim=2)
    return torch.bmm(arms, arms.transpose(1, 2))


@MODELS.register_module()
class RKDLoss(KDLoss):
    """Relational knowledge distillation (Park et al., Relational Knowledge Distillation, CVPR 2019).

    ``w_d * mean_ij h(d_s - d_t) + w_a * mean_ijk h(c_s - c_t)`` between M samples: d the distances relative to their
    mean, c the cosines of the angles of all triples, h the smooth L1 (Huber) function.  Channels may differ.

    The published samples are the images of a batch (``samples='image'``): with two of them both terms are 0.  So by
    default the cells of all images are the samples.

    As published: the authors and mdistiller are the default on rows; mmrazor makes each sample a unit vector first
    (``normalize=True``) and does not detach the teacher.

    Memory: the angles hold M^3 numbers, and M^2 * C on the way, a few times; so ``limit`` is small, and more samples
    are drawn at random.  At 128 samples of 256 channels that is 8 and 16 MB each.

    Args:
        distance_weight: not negative. Default 25 [C: mdistiller, mmrazor].
        angle_weight: not negative. Default 50 [C]. With 0 no angles are computed and a larger ``limit`` costs M^2.
        normalize: make the samples unit vectors first. Default False.
        beta: where h goes from square to linear, above 0. Default 1 [C].
        samples: 'cell' (default) or 'image', see :func:`kd_mm.ops.sampling.relation_rows`; rows (M, C) are M samples.
        limit: the most samples; more are drawn at random, for each step anew. None for all. Default 128.
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    A region chooses the cells: they are drawn by its weights; with 'image' it multiplies the maps.

    Returns:
        Reduction: per level; mean over pairs
        Reduction: per level; mean over triples
        Parts: distance, angle
        Distances, then angles; summed over levels.

    Raises:
        ValueError: an option has a bad value, or cells of one channel have nothing but angles or are made unit vectors.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> bool(build(dict(type='RKDLoss'))(3 * x.flip(1) + 2, x) < 1e-6)
        True
    """

    takes = (2, 3, 4)
    same_channels = False

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, normalize: bool = False,
                 beta: float = 1.0, samples: str = 'cell', limit: Optional[int] = 128, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'distance': from_zero('RKDLoss', 'distance_weight', distance_weight),
                        'angle': from_zero('RKDLoss', 'angle_weight', angle_weight)}
        self.normalize = boolean('RKDLoss', 'normalize', normalize)
        self.beta = positive('RKDLoss', 'beta', beta)
        self.samples = one_of('RKDLoss', 'samples', samples, SAMPLES)
        self.limit = sample_limit('RKDLoss', limit)
        self.same_size = samples == 'cell'
        self.fewest_images = 3 if samples == 'image' else 1

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if self.samples == 'cell' and (self.normalize or not self.factors['distance']):
            needs_channels('RKDLoss', student, 2,
                           'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def terms(self, student: Tensor, teacher: Tensor) -> Dict[str, Tensor]:
        """The terms whose weight is not 0, without it, of rows (M, Cs) and (M, Ct)."""
        if self.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        result = {}
        for name, relation in (('distance', relative_distances), ('angle', angles)):
            # One distance is its own mean, and an angle takes three: what rounding leaves is no gradient.
            if self.factors[name] and len(student) < 3:
                result[name] = student.sum() * 0
            elif self.factors[name]:
                s, t = relation(student), relation(teacher)
                result[name] = F.smooth_l1_loss(s, t, beta=self.beta, reduction='sum') / max(t.numel(), 1)
        return result

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Value:
        generator = batch.info.generator(level)
        rows = relation_rows(student, teacher, mask, self.samples, self.limit, generator)
        return self.terms(*rows) or student.sum() * 0
