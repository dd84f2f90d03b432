"""Distillation on masks that learned tokens find in the teacher's features."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from kd_mm.losses.base.learner import Learner, load_learned, read_learned
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import from_zero, one_of, whole
from kd_mm.ops.functional import dice_similarity, nonzero, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

WEIGHTS = ('softmax', 'mean')


def masked_distance(student: Tensor, teacher: Tensor, masks: Tensor, region: Optional[Tensor] = None,
                    eps: float = 0.0) -> Tensor:
    """``mean_c sum_i (m_i * (F_s - F_t)_ci)^2 / (sum_i m_i + eps)``, one number a mask and image.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        masks: (N, T, H, W), not negative.
        region: weights of the cells (N, 1, H, W), or None.
        eps: added to the divisor.

    Returns:
        (N, T).

    Example:
        >>> masked_distance(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), 0.5))
        tensor([[0.5000]])
    """
    gap = (student - teacher).square().mean(dim=1, keepdim=True)
    if region is not None:
        gap, masks_in = gap * region.to(gap.dtype), masks * region.to(masks.dtype)
    else:
        masks_in = masks
    return (masks.square() * gap).sum(dim=(2, 3)) / (nonzero(masks_in.sum(dim=(2, 3))) + eps)


class MaskTokens(nn.Module):
    """T vectors, each of which looks for one kind of place; and how much each counts for an image."""

    def __init__(self, channels: int, tokens: int, weighted: bool, **options: Any):
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(tokens, channels, **options))
        self.prob = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, **options), nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, tokens, 1, **options)) if weighted else None

    def masks(self, features: Tensor) -> Tensor:
        """(N, T, H, W) in 0..1: ``sigmoid(token . F_i)``."""
        return torch.einsum('tc,nchw->nthw', self.tokens, features).sigmoid()

    def weights(self, features: Tensor) -> Tensor:
        """(N, T): a softmax over the tokens, or the same for all; each row sums to 1."""
        if self.prob is None:
            return features.new_full((features.shape[0], len(self.tokens)), 1.0 / len(self.tokens))
        return self.prob(features).flatten(1).softmax(dim=1)


class TokenLearner(Learner):
    """First stage of MasKD: tokens whose masks let the teacher's own losses stay low, and differ from each other.

    The teacher goes on with ``F * sum_t w_t m_t`` (the plain sum over the tokens without learned weights, as
    published for segmentation); the loss of its own is the Dice coefficient between the masks.
    """

    lr, weight_decay, iters = 0.01, 1e-3, 2000  # [C: the configs for detection]

    def __init__(self, tokens: int, weighted: bool):
        super().__init__()
        self.tokens, self.weighted = tokens, weighted
        self.levels = nn.ModuleList()

    def prepare(self, teacher: Features) -> None:
        if len(self.levels) == 0:
            for tensor in teacher:
                self.levels.append(MaskTokens(tensor.shape[1], self.tokens, self.weighted,
                                              **parameter_options(tensor)))

    def forward(self, level: int, teacher: Tensor) -> Tuple[Tensor, Tensor]:
        module: Any = self.levels[level]
        masks = module.masks(teacher)
        shown = masks
        if self.weighted:
            shown = masks * module.weights(teacher)[:, :, None, None]
        return teacher * shown.sum(dim=1, keepdim=True), dice_similarity(masks)


@MODELS.register_module()
class MasKDLoss(KDLoss):
    """Masked distillation with receptive tokens (Huang et al., Masked Distillation with Receptive Tokens, ICLR 2023).

    ``mean over images of sum_t w_t * mean_c sum_i (m_ti (F_s - F_t)_ci)^2 / sum_i m_ti`` with the masks
    ``m_t = sigmoid(token_t . F_t)`` and ``w`` a softmax over the tokens, ``softmax(conv1x1(mean(conv3x3(F_t))))``.  The
    mask enters squared, its sum does not, as published.  From step ``student_mask_after`` on the masks are multiplied
    by those that the tokens find in the student (without gradient).

    The tokens are learned from the teacher alone, once, by ``python tools/learn_tokens.py CONFIG``, and are frozen
    here.  (In the published code they keep a gradient that no optimizer is given.)

    As published, detection: the defaults.  Segmentation, on the logits: ``num_tokens=8, token_weights='mean',
    student_mask_after=None, eps=1e-5, loss_weight=0.5``.

    Args:
        tokens: file that ``tools/learn_tokens.py`` wrote (or writes), a state dict, or ``'random'`` (tests).
        num_tokens: masks of a level. Default 6 [C: detection]; 8 segmentation [C].
        token_weights: 'softmax' (learned, for each image) or 'mean'. Default 'softmax' [C: detection].
        student_mask_after: step from which the student's masks multiply the teacher's; None for never. Default 1000
            [C: detection].
        eps: added to the sum of a mask. Default 0; 1e-5 segmentation [C].
        loss_weight: see :class:`KDLoss`. Default 7 [C: RetinaNet].

    A region weights the cells in both sums.

    Returns:
        Reduction: per level; mean over channels
        In each the sum over the tokens; summed over levels.

    Raises:
        ValueError: without tokens, or tokens of another teacher; an option has a bad value.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='MasKDLoss', tokens='random'))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)) > 0
        tensor(True)
    """

    takes = (4, )
    learned = 'tokens'

    def __init__(self, tokens: Any = None, num_tokens: int = 6, token_weights: str = 'softmax',
                 student_mask_after: Optional[int] = 1000, eps: float = 0.0, loss_weight: Any = 7.0):
        super().__init__(loss_weight)
        self.token_weights = one_of('MasKDLoss', 'token_weights', token_weights, WEIGHTS)
        self.num_tokens = whole('MasKDLoss', 'num_tokens', num_tokens)
        self.student_mask_after = None if student_mask_after is None else whole(
            'MasKDLoss', 'student_mask_after', student_mask_after, 0)
        self.eps = from_zero('MasKDLoss', 'eps', eps)
        self.given = read_learned('MasKDLoss', 'tokens', tokens)
        self.finder = self.learner()

    def learner(self) -> TokenLearner:
        return TokenLearner(self.num_tokens, self.token_weights == 'softmax')

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.finder.levels) == 0:
            self.finder.prepare(teacher)
            load_learned('MasKDLoss', 'tokens', self.finder, self.given)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        module: Any = self.finder.levels[level]
        masks = module.masks(teacher)
        if self.student_mask_after is not None and batch.info.step >= self.student_mask_after:
            with torch.no_grad():
                seen = module.masks(student)
            masks = masks * seen
        distances = masked_distance(student, teacher, masks, mask, self.eps)
        return (distances * module.weights(teacher)).sum() / max(student.shape[0], 1)
