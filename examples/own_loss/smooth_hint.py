"""A loss of your own, in a file of your own: smooth L1 between two maps.

A config finds it by ``custom_imports``; see ``config.py`` beside it.
"""

from torch.nn import functional as F

from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS


@MODELS.register_module()
class SmoothHintLoss(KDLoss):
    """``mean(smooth_l1(F_s - F_t))`` over images, channels and cells.

    Args:
        beta: gap from which on the loss is linear, above 0.
        loss_weight: a number, one a level, a schedule or ``'auto'``.
    """

    takes = (4, )  # maps (N, C, H, W); kd_mm says what it is given instead, before the first step

    def __init__(self, beta=1.0, loss_weight=1.0):
        super().__init__(loss_weight)
        self.beta = beta

    def level_loss(self, level, student, teacher, batch, mask):
        gap = F.smooth_l1_loss(student, teacher, beta=self.beta, reduction='none')
        # The weights (N, 1, H, W) of a region, if the config names one.
        return gap.mean() if mask is None else (gap * mask).sum() / (mask.sum() * gap.shape[1]).clamp(min=1)
