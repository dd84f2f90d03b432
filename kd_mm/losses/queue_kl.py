"""Divergence of the relations between an image and a queue of teacher vectors."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops import distributed
from kd_mm.ops.checks import one_of, positive, whole
from kd_mm.ops.functional import apply_weights, nonzero, parameter_options, unit_vectors
from kd_mm.ops.sampling import seeded_generator
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

UPDATES = ('after', 'before')
EMPTY = ('random', 'zero')


def image_vectors(features: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Mean over the cells, (N, C), weighted by a mask (N, 1, H, W); rows (N, C) as they are.

    Example:
        >>> image_vectors(torch.tensor([1., 3.]).view(1, 1, 1, 2)).item()
        2.0
    """
    if features.dim() == 2:
        return features
    if mask is None:
        return features.mean(dim=(2, 3))
    return apply_weights(features, mask).sum(dim=(2, 3)) / nonzero(mask.to(features.dtype).sum(dim=(2, 3)))


def queue_divergence(student: Tensor, teacher: Tensor, queue: Tensor, tau: float = 0.07) -> Tensor:
    """``KL(softmax(Z t / tau) || softmax(Z x / tau))`` of each vector, (N,).

    Args:
        student: x, (N, C) of length 1.
        teacher: t, (N, C) of length 1.
        queue: Z, (Q, C).
        tau: temperature, above 0.

    Example:
        >>> x = torch.tensor([[1., 0.]])
        >>> abs(queue_divergence(x, x, torch.eye(2)).item()) < 1e-6
        True
    """
    log_s, log_t = (F.log_softmax(side @ queue.t() / tau, dim=1) for side in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(dim=1)


@MODELS.register_module()
class QueueKLLoss(KDLoss):
    """Queue KL (the global term of distillation v3 of LightlyTrain, Lightly AG 2026; written from the formula).

    ``mean over images of KL(softmax(Z t / tau) || softmax(Z x / tau))``: an image's mean feature, of length 1, is
    compared with a queue ``Z`` of Q teacher vectors of earlier images, in the student's space and in the teacher's.
    There is no ``tau^2``.  The student needs the teacher's channels:
    ``adapter=dict(type='ConvAdapter', always=True)`` is the published linear layer (of the mean it is the mean of the
    convolution).

    Where the published code goes wrong and what is done here: there the queue gets the batch *before* the loss, so that
    each image meets itself and half the softmax is its own cosine with itself; here the batch comes in afterwards
    (``update='after'``).  There the rows never filled are zeros that take part as neighbours of everyone; here the
    queue starts with random unit vectors (``empty='random'``), as memories of contrastive methods do.  There every
    process has a queue of its own; here what comes in is gathered, so that the queue, which a checkpoint keeps, is the
    same on all.

    Args:
        size: Q, rows of the queue. Default 1024 [C: for about 2000 images; a quarter to a half of the number of
            training images, from 16 to 8192].
        tau: temperature, above 0. Default 0.07 [C].
        update: 'after' the loss (default) or 'before' [C], see above.
        empty: the rows never filled are 'random' (default) or 'zero' [C].
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    With a region the mean is over its cells; an image without any does not count and is not kept.

    Returns:
        Reduction: per level; mean over images
        Summed over levels.

    Raises:
        ValueError: an option has a bad value, or one channel only.

    Example:
        >>> from kd_mm.registry import build
        >>> x = torch.randn(2, 4, 8, 8)
        >>> build(dict(type='QueueKLLoss', size=16))(2 * x, x).item() < 1e-5
        True
    """

    takes = (2, 4)
    same_size = False

    def __init__(self, size: int = 1024, tau: float = 0.07, update: str = 'after', empty: str = 'random',
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.size = whole('QueueKLLoss', 'size', size, 2)
        self.tau = positive('QueueKLLoss', 'tau', tau)
        self.update = one_of('QueueKLLoss', 'update', update, UPDATES)
        self.empty = one_of('QueueKLLoss', 'empty', empty, EMPTY)
        #: one queue a level, newest first.
        self.queues = nn.ModuleList()

    def check_shapes(self, student: Any, teacher: Any) -> None:
        super().check_shapes(student, teacher)
        for level, tensor in enumerate(teacher):
            if tensor.shape[1] < 2:
                raise ValueError(f'QueueKLLoss, level {level}: {tuple(tensor.shape)} has one channel, whose direction '
                                 'is its sign. Tap features')

    def prepare(self, student: Features, teacher: Features) -> None:
        for level in range(len(self.queues), len(teacher)):
            self.queues.append(Queue(self.size, teacher[level], self.empty, level))

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        own, theirs = image_vectors(student, mask), image_vectors(teacher, self._resized(mask, teacher))
        own, theirs = unit_vectors(own, dim=1), unit_vectors(theirs, dim=1)
        present = own.new_ones(len(own)) if mask is None else (mask.flatten(1) > 0).any(dim=1).to(own.dtype)
        queue: Any = self.queues[level]
        if queue.opens(batch.info.step) and self.training:
            queue.add(gather_rows(theirs[present > 0]))
        keys = queue.rows.clone() if self.update == 'before' else queue.earlier.to(own)
        rows = queue_divergence(own, theirs, keys, self.tau)
        return (rows * present).sum() / nonzero(present.sum())

    def _resized(self, mask: Optional[Tensor], features: Tensor) -> Optional[Tensor]:
        if mask is None or mask.shape[2:] == features.shape[2:]:
            return mask
        return F.adaptive_avg_pool2d(mask.to(features.dtype), (features.shape[2], features.shape[3]))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (M, C) of all ranks, which may have different numbers of them, in the order of the ranks.

    Example:
        >>> gather_rows(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if distributed.world_size() == 1:
        return rows.detach()
    counts = distributed.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    filled = F.pad(rows.detach(), (0, 0, 0, max(counts) - len(rows)))
    parts = distributed.gather(filled).split(max(counts)) if max(counts) else [filled]
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


class Queue(nn.Module):
    """Rows of unit vectors, newest first.

    Args:
        size: how many.
        like: (N, C, ...); channels, device and dtype.
        empty: 'random' unit vectors or 'zero' rows at the start.
        number: which random ones.

    Attributes:
        earlier: the rows before the current step added any.
    """

    rows: Tensor

    def __init__(self, size: int, like: Tensor, empty: str, number: int):
        super().__init__()
        draw = torch.randn(size, like.shape[1], generator=seeded_generator(number), dtype=torch.float64)
        rows = unit_vectors(draw, dim=1) if empty == 'random' else torch.zeros_like(draw)
        self.register_buffer('rows', rows.to(**parameter_options(like)))
        self.earlier = self.rows.clone()
        self._step: Optional[int] = None

    def opens(self, step: int) -> bool:
        """Whether this is the first time in a step; the loss may be asked for more than once."""
        if step == self._step:
            return False
        self.earlier, self._step = self.rows.clone(), step
        return True

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Put vectors (M, C) in front; what is beyond the size falls out."""
        self.rows.copy_(torch.cat([vectors.to(self.rows), self.rows])[:len(self.rows)])
