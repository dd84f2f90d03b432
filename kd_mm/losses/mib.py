"""MiB: a segmenter that learns new classes, whose old classes were background before or are background now."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, labelled, needs_channels
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, one_of, positive, whole
from kd_mm.ops.functional import apply_weights, nonzero, resize
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import seg_map

SIZES = ('labels', 'logits')
DIVISORS = ('labelled', 'all')
DIVERGENCES = ('kl', 'cross_entropy')


def merged_log_softmax(logits: Tensor, merged: Tensor) -> Tensor:
    """Logarithms of the softmax over dimension 1, where channel 0 gets the sum of all ``merged`` probabilities.

    Args:
        logits: (M, K) or (N, K, H, W).
        merged: bool (K,), which channels are added up; channel 0 among them.  The others are as they are, in their
            order.

    Returns:
        (..., 1 + number of the others, ...).

    Example:
        >>> merged_log_softmax(torch.zeros(1, 4), torch.tensor([True, False, True, False])).exp()
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    whole_sum = logits.logsumexp(dim=1, keepdim=True)
    background = logits[:, merged].logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits[:, ~merged]], dim=1) - whole_sum


def old_class_count(owner: str, student: Features, teacher: Features, old_classes: Optional[int], grown: bool) -> int:
    """How many classes the teacher knows, background included, checked against the student's.

    Args:
        owner: class name of the loss.
        student, teacher: their levels.
        old_classes: given by the user; None for the teacher's channels.
        grown: the student must know more classes than that.

    Raises:
        ValueError: a level has fewer channels than that.
    """
    count = teacher[0].shape[1] if old_classes is None else old_classes
    for level, (s, t) in enumerate(zip(student, teacher)):
        if s.dim() != 4 or t.dim() != 4:
            raise ValueError(f'{owner}, level {level}: student {tuple(s.shape)} and teacher {tuple(t.shape)}: it needs '
                             'the logits of a segmenter, (N, K, H, W)')
        least = count + 1 if grown else count
        if s.shape[1] < least or t.shape[1] < count:
            raise ValueError(
                f'{owner}, level {level}: student {tuple(s.shape)} and teacher {tuple(t.shape)}: with {count} old '
                f'classes, background included, the student needs {least} channels or more (old classes first, in the '
                f"teacher's order, then the new ones) and the teacher {count}")
    return count


@MODELS.register_module()
class MiBCELoss(KDLoss):
    """Unbiased cross-entropy of MiB (Cermelli et al., Modeling the Background for Incremental Learning in Semantic
    Segmentation, CVPR 2020).

    In the data of a step with new classes the objects of the old ones are labelled as background.  So "background" here
    means "background or any old class": with ``q`` the softmax over all channels and K old ones,

    ``-mean over labelled pixels of log Q(label)``, ``Q(0) = sum of q over channels 0..K-1``, ``Q(c) = q_c`` for new c;
    labels below K count as 0.

    It takes the place of the student's own cross-entropy: switch that off with ``task_loss_weight=0`` in the hook.  (An
    auxiliary head then learns from a term of its own, or not at all.)  Of the
    teacher it uses the number of classes alone.

    Args:
        old_classes: classes of the teacher, background included, from 1. Default None: the teacher's channels.
        size: 'labels': the logits are enlarged to the labels, as hosts do (default [C]), or 'logits': the labels are
            resized by nearest neighbour.
        divisor: the number of 'labelled' pixels (default [C: variant "mean"]) or of 'all', ignored ones too [C: the
            training script].
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    A region weights the pixels.  Labels that the student does not know are ignored.

    Returns:
        Reduction: per level; mean over cells
        Over labelled pixels; summed over levels.

    Raises:
        ValueError: an option has a bad value, the student knows no new class, or the data has no segmentation map.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.zeros(1, 8, 8, dtype=torch.long))
        >>> loss = build(dict(type='MiBCELoss'))
        >>> round(loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 8, 8), batch).item(), 4)  # log 2
        0.6931
    """

    takes = (4, )
    logits = True
    grows = True
    needs_background = True
    same_channels = False
    needs_seg_map = True

    def __init__(self, old_classes: Optional[int] = None, size: str = 'labels', divisor: str = 'labelled',
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.old_classes = None if old_classes is None else whole('MiBCELoss', 'old_classes', old_classes)
        self.size = one_of('MiBCELoss', 'size', size, SIZES)
        self.divisor = one_of('MiBCELoss', 'divisor', divisor, DIVISORS)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        old_class_count('MiBCELoss', student, teacher, self.old_classes, True)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        old = teacher.shape[1] if self.old_classes is None else self.old_classes
        student, labels, known, weights = at_labels(student, batch, mask, self.size)
        merged = torch.arange(student.shape[1], device=student.device) < old
        index = (labels - old + 1).clamp(min=0).where(known > 0, torch.zeros_like(labels))

        def total_of(one: Tensor, target: Tensor, share: Tensor) -> Tuple[Tensor]:
            return (-(merged_log_softmax(one, merged).gather(1, target) * share).sum(), )

        total, = sum_in_blocks(total_of, 'cells', student, index[:, None], (known * weights)[:, None])
        return total / nonzero((weights if self.divisor == 'all' else known * weights).sum())


def at_labels(logits: Tensor, batch: KDBatch, mask: Optional[Tensor], size: str) -> Tuple[Tensor, Tensor, Tensor,
                                                                                         Tensor]:
    """Logits and labels at one size for a cross-entropy.

    Args:
        logits: (N, K, H, W).
        batch: gives the labels.
        mask: region weights (N, 1, H', W') or None.
        size: 'labels' (the logits are resized) or 'logits' (the labels are).

    Returns:
        logits; labels (N, h, w); 1 where a label is one of the K classes; the region's weights (N, h, w).
    """
    labels = seg_map(batch, None if size == 'labels' else (logits.shape[2], logits.shape[3]))
    labels = labels.to(logits.device).long()
    shape = (labels.shape[1], labels.shape[2])
    logits = resize(logits, shape)
    known = (labels != batch.targets.ignore_index) & (labels >= 0) & (labels < logits.shape[1])
    weights = logits.new_ones(labels.shape) if mask is None else resize(mask.to(logits.dtype), shape)[:, 0]
    return logits, labels, known.to(logits.dtype), weights


@MODELS.register_module()
class MiBKDLoss(KDLoss):
    """Unbiased distillation of MiB (Cermelli et al., Modeling the Background for Incremental Learning in Semantic
    Segmentation, CVPR 2020).

    What the teacher calls background may be one of the student's new classes.  With ``p`` the teacher's softmax over
    its K classes, ``q`` the student's over all channels and ``Q(0) = q_0 + sum of q over the new channels``,
    ``Q(c) = q_c`` for the old ones: ``mean over pixels and the K classes of p_c (log p_c - log Q(c))``.

    As published: ``divergence='cross_entropy'`` (less by the teacher's entropy here; the gradient is the same) and
    ``mask_ignored=False``.  The published slice fails where there is no new class; here it is a plain divergence.
    ``unbiased=False`` is the distillation of LwF and ILT: both softmaxes over the old channels.

    Args:
        alpha: the teacher's logits are multiplied by it, above 0; the student's are not, and there is no factor to make
            up for it. Default 1 [C].
        old_classes: classes of the teacher, background included, from 2. Default None: the teacher's channels.
        unbiased: see above. Default True [C].
        divergence: 'kl' (default) or 'cross_entropy' [C].
        mask_ignored: leave out the pixels whose label is ignored, where the data has labels. Default True; the training
            script does not [C].
        loss_weight: see :class:`KDLoss`. Default 10 [C]; 100 with ``unbiased=False`` [C].

    A region weights the pixels.

    Returns:
        Reduction: per level; mean over cells, classes
        Over valid pixels; summed over levels.

    Raises:
        ValueError: an option has a bad value, or the channels do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> z = torch.randn(2, 5, 8, 8)
        >>> abs(build(dict(type='MiBKDLoss'))(z, z).item()) < 1e-5
        True
    """

    takes = (4, )
    logits = True
    grows = True
    needs_background = True
    same_channels = False

    def __init__(self, alpha: float = 1.0, old_classes: Optional[int] = None, unbiased: bool = True,
                 divergence: str = 'kl', mask_ignored: bool = True, loss_weight: Any = 10.0):
        super().__init__(loss_weight)
        self.alpha = positive('MiBKDLoss', 'alpha', alpha)
        self.old_classes = None if old_classes is None else whole('MiBKDLoss', 'old_classes', old_classes, 2)
        self.unbiased = boolean('MiBKDLoss', 'unbiased', unbiased)
        self.divergence = one_of('MiBKDLoss', 'divergence', divergence, DIVERGENCES)
        self.mask_ignored = boolean('MiBKDLoss', 'mask_ignored', mask_ignored)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        old_class_count('MiBKDLoss', student, teacher, self.old_classes, False)
        needs_channels('MiBKDLoss', teacher, 2, 'the softmax over one class is always 1. It needs the background and '
                       'an old class', 'teacher')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self.mask_ignored:
            mask = labelled(student, batch, mask)
        old = teacher.shape[1] if self.old_classes is None else self.old_classes
        channel = torch.arange(student.shape[1], device=student.device)
        merged = (channel == 0) | (channel >= old)

        def total_of(one: Tensor, other: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor]:
            own = merged_log_softmax(one, merged) if self.unbiased else F.log_softmax(one[:, :old], dim=1)
            theirs = F.log_softmax(self.alpha * other, dim=1)
            gap = theirs - own if self.divergence == 'kl' else -own
            return (apply_weights(theirs.exp() * gap, weights).sum(), )

        total, = sum_in_blocks(total_of, 'cells', student, teacher[:, :old], mask)
        cells = total.new_tensor(float(student[:, 0].numel())) if mask is None else mask.to(total.dtype).sum()
        return total / (nonzero(cells) * old)
