"""Channel-wise knowledge distillation."""

from typing import Any, List, Optional, Sequence, Tuple, Union

from torch import Tensor

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, entries, one_of, positive, whole
from kd_mm.ops.divergences import standardise_logits
from kd_mm.ops.functional import spatial_log_softmax
from kd_mm.registry import MODELS
from kd_mm.types.batch import KDBatch

DIVERGENCES = ('kl', 'cross_entropy')
DIVISORS = ('teacher', 'student')


def channel_wise_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0, divergence: str = 'kl',
                            mask: Optional[Tensor] = None, standardise: bool = False) -> Tensor:
    """Divergence of the distributions over space, one for each image and channel.

    ``sum_i p_t(i) * (log p_t(i) - log p_s(i))`` over the H*W cells, ``p = softmax(F / tau)`` over the cells.  With a
    mask the distributions live on the region: ``p(i)`` is proportional to ``m_i * exp(F_i / tau)``.  (Multiplying the
    terms by the mask instead would give a sum that can be negative.)

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        tau: temperature, above 0.
        divergence: 'kl' or 'cross_entropy' (without the teacher's entropy).
        mask: (N, 1, H, W), or (N, C, H, W) with one for each channel, not negative, or None.
        standardise: mean and deviation over the cells of each image and channel are made equal first, see
            :func:`kd_mm.ops.divergences.standardise_logits`.

    Returns:
        (N, C), not multiplied by tau squared; 0 for an image whose mask is empty.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4)
        >>> channel_wise_divergence(x + 5, x).abs().max().item() < 1e-5
        True
    """
    if standardise:
        cells = None if mask is None else mask.flatten(2)
        student, teacher = (standardise_logits(side.flatten(2), 2, cells).view_as(side) for side in (student, teacher))
    log_s, filled = spatial_log_softmax(student, tau, mask)
    log_t, _ = spatial_log_softmax(teacher, tau, mask)
    terms = log_t.exp() * (log_t - log_s if divergence == 'kl' else -log_s)
    rows = terms.sum(dim=2)
    return rows if filled is None else rows * filled.to(rows.dtype)


@MODELS.register_module()
class CWDLoss(KDLoss):
    """Channel-wise distillation (Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021).

    ``tau^2 * (1 / (N * C)) * sum_{n,c} KL(p_t[n,c] || p_s[n,c])`` with ``p[n,c] = softmax(F[n,c] / tau)`` over the H*W
    cells.  It grows with the number of cells, at most by their logarithm.

    As published: mmrazor and TorchDistiller are the default.  CIRKD divides by the student's channels before its
    adapter (``divisor='student'``), which changes the weight by Ct/Cs; pppppM's mmdetection- and
    mmsegmentation-distiller do so too and leave out the teacher's entropy (``divergence='cross_entropy'``: the loss
    never reaches 0, its gradient is the same).

    Args:
        tau: temperature, above 0. Default 1 [C: mmrazor]; TorchDistiller and CIRKD use 4.
        divergence: 'kl' or 'cross_entropy'. Default 'kl'.
        divisor: 'teacher' (the channels that are compared) or 'student' (those before the adapter). Default 'teacher'.
        standardise: mean and deviation of the cells of each channel are made equal before the temperature, see
            :func:`channel_wise_divergence`. Default False.
        student_channels: channels of the student before the adapter, a number or one a level; only for
            ``divisor='student'``, the loss cannot see them.
        loss_weight: see :class:`KDLoss`. Default 5 [C: mmrazor and pppppM, segmentation logits]; mmrazor's FPN recipe
            uses 10 a level, TorchDistiller 3 on logits with tau=4 and 50 on features [C].

    With a region the distributions are over its cells and the mean is over the images that have any.

    Returns:
        Reduction: per level; mean over channels
        Summed over levels.

    Raises:
        ValueError: an option is not among its choices, or ``student_channels`` is missing or of the wrong length.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='CWDLoss', tau=4.0, loss_weight=3.0))
        >>> loss(torch.randn(2, 19, 8, 8), torch.randn(2, 19, 8, 8)).shape
        torch.Size([])
    """

    takes = (4, )

    def __init__(self, tau: float = 1.0, divergence: str = 'kl', divisor: str = 'teacher',
                 student_channels: Optional[Union[int, Sequence[int]]] = None, standardise: bool = False,
                 loss_weight: Any = 5.0):
        super().__init__(loss_weight)
        self.tau = positive('CWDLoss', 'tau', tau)
        self.divergence = one_of('CWDLoss', 'divergence', divergence, DIVERGENCES)
        self.standardise = boolean('CWDLoss', 'standardise', standardise)
        self.divisor = one_of('CWDLoss', 'divisor', divisor, DIVISORS)
        if (self.divisor == 'student') != (student_channels is not None):
            raise ValueError(f"CWDLoss: divisor={divisor!r} and student_channels={student_channels!r}; "
                             "divisor='student' needs student_channels, and nothing else uses them")
        self.student_channels: Union[int, List[int], None] = None
        if isinstance(student_channels, (list, tuple)):
            self.student_channels = entries('CWDLoss', 'student_channels', student_channels, whole)
        elif student_channels is not None:
            self.student_channels = whole('CWDLoss', 'student_channels', student_channels)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        def total_of(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor]:
            return (channel_wise_divergence(one, other, self.tau, self.divergence, weights, self.standardise).sum(), )

        total, = sum_in_blocks(total_of, 'channels', student, teacher, mask)
        images = total.new_tensor(float(max(student.shape[0], 1)))
        if mask is not None:
            images = (mask > 0).flatten(1).any(dim=1).sum().clamp(min=1).to(total.dtype)
        return self.tau**2 * total / (images * self._channels(level, student))

    def _channels(self, level: int, student: Tensor) -> int:
        if self.student_channels is None:
            return student.shape[1]
        if isinstance(self.student_channels, int):
            return self.student_channels
        if level >= len(self.student_channels):
            raise ValueError(f'CWDLoss: student_channels has {len(self.student_channels)} entries, but there is a '
                             f'level {level}')
        return self.student_channels[level]
