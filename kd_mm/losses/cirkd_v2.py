"""Channel relations of the second version of cross-image relational distillation."""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.cirkd import Queue, projection
from kd_mm.ops import distributed
from kd_mm.ops.blocks import relation_divergence
from kd_mm.ops.checks import from_zero, pair, positive, whole
from kd_mm.ops.functional import parameter_options, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch


def channel_vectors(features: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """(N, C, h, w) to unit vectors over space, (N, C, h*w); weighted by ``mask`` (N, 1, h, w) first.

    Example:
        >>> channel_vectors(torch.full((1, 2, 2, 2), 3.0))[0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return unit_vectors((features if mask is None else features * mask).flatten(2), dim=2)


@MODELS.register_module()
class CIRKDChannelLoss(KDLoss):
    """Channel relations of CIRKD's second version (Yang et al., Cross-Image Relational Knowledge Distillation,
    technical report 2025).

    Both maps are average-pooled to a grid and the student is projected (conv 1x1 - batch norm - ReLU - conv 1x1); each
    channel, flattened over the grid and divided by its length, is a vector ``v``.  Then::

        minibatch_weight * mean over image pairs (i, j) and channels a of i of KL(p_t[a] || p_s[a]),
                           p[a] the softmax over the channels b of j of v_a . v_b / tau
      + memory_weight    * kd_tau^2 * mean over all channels of the KL with the softmax over vectors drawn from a memory
                           of teacher channels, divided by tau * kd_tau
      + mse_weight       * mean((v_s - v_t)^2)

    Each step adds channels of the batch (of all processes) to the memory, then draws from it.  The memory is state: see
    :class:`CIRKDMemoryLoss`, whose rules hold here too (written once a step and in training mode only, saved and
    resumed, draws by seed, rank, step and level).

    As published the maps are pooled 4x4, which ties the memory to one crop size; ``grid`` is that size in cells, and
    any map is pooled to it.  Labels are not used; ignored pixels take part.

    Args:
        grid: height and width of the pooled maps. Default (16, 32) [C: 4x4 pooling of features at 1/8 of 512x1024].
        tau: temperature, above 0. Default 0.1 [C].
        kd_tau: further temperature of the memory term, above 0. Default 1 [C].
        memory: vectors kept. Default 10000 [C].
        keys: vectors drawn. Default 2048 [C].
        channels_per_step: vectors of a process that are added in a step, at most. Default 256 [C].
        minibatch_weight: Default 1 [C].
        memory_weight: Default 0.1 [C].
        mse_weight: Default 100 [C].
        max_block: similarities of one matrix at a time. Default None, see :func:`kd_mm.ops.blocks.relation_divergence`.
        loss_weight: factor of the three terms, see :class:`KDLoss`. Default 1.

    A region, pooled to the grid, weights the cells of both vectors before they are divided by their lengths.

    Returns:
        Reduction: per level; mean over channels, pairs
        Reduction: per level; mean over channels
        Reduction: per level; mean over elements
        Parts: minibatch, memory, mse
        The three terms in turn; summed over levels.

    Raises:
        ValueError: an option has a bad value.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='CIRKDChannelLoss', grid=(2, 2), memory=300, keys=8))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)) > 0
        tensor(True)
    """

    takes = (4, )
    same_channels = False
    last_step: Tensor

    def __init__(self, grid: Tuple[int, int] = (16, 32), tau: float = 0.1, kd_tau: float = 1.0, memory: int = 10000,
                 keys: int = 2048, channels_per_step: int = 256, minibatch_weight: float = 1.0,
                 memory_weight: float = 0.1, mse_weight: float = 100.0, max_block: Optional[int] = None,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        name = 'CIRKDChannelLoss'
        self.grid = pair(name, 'grid', grid)
        self.tau, self.kd_tau = positive(name, 'tau', tau), positive(name, 'kd_tau', kd_tau)
        self.memory, self.keys = whole(name, 'memory', memory), whole(name, 'keys', keys)
        self.channels_per_step = whole(name, 'channels_per_step', channels_per_step)
        if self.memory < max(self.keys, self.channels_per_step):
            raise ValueError(f'{name}: memory={memory!r} is less than keys={keys!r} or '
                             f'channels_per_step={channels_per_step!r}')
        given = {'minibatch': minibatch_weight, 'memory': memory_weight, 'mse': mse_weight}
        self.factors = {kind: from_zero(name, f'{kind}_weight', value) for kind, value in given.items()}
        self.max_block = None if max_block is None else whole(name, 'max_block', max_block)
        self.projections = nn.ModuleList()
        self.queues = nn.ModuleList()
        self.register_buffer('last_step', torch.tensor(-1))
        #: rows to store and slots to draw instead of random ones, one entry a level.
        self.fixed_rows: Optional[List[Tensor]] = None
        self.fixed_slots: Optional[List[Tensor]] = None

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.projections) == 0:
            self.last_step = self.last_step.to(teacher[0].device)
            for s, t in zip(student, teacher):
                self.projections.append(projection(s, t))
                self.queues.append(Queue(1, self.memory, self.grid[0] * self.grid[1], **parameter_options(t)))

    @torch.no_grad()
    def remember(self, level: int, vectors: Tensor, batch: KDBatch) -> None:
        """Add random ones of the teacher's channels (M, h*w) of this step to the memory, rank after rank."""
        generator = batch.info.generator(level)
        rows = torch.randperm(len(vectors), generator=generator)
        if self.fixed_rows is not None:
            rows = self.fixed_rows[level]
        queue: Any = self.queues[level]
        for part in distributed.gather(vectors[rows[:self.channels_per_step].to(vectors.device)][None]):
            queue.write(part[None], torch.tensor([len(part)], device=part.device))

    def slots(self, level: int, batch: KDBatch) -> Tensor:
        """The slots of the memory that are compared with in this step."""
        if self.fixed_slots is not None:
            return self.fixed_slots[level]
        generator = batch.info.generator(level, 1)
        return torch.randperm(self.memory, generator=generator)[:self.keys]

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The three terms of one level without their weights: minibatch, memory and mse."""
        student, teacher = (F.adaptive_avg_pool2d(part, self.grid) for part in (student, teacher))
        if mask is not None:
            mask = F.adaptive_avg_pool2d(mask.to(student.dtype), self.grid)
        vectors_s = channel_vectors(self.projections[level](student), mask)
        vectors_t = channel_vectors(teacher, mask)
        rows_s, rows_t = vectors_s.flatten(0, 1), vectors_t.flatten(0, 1)
        if self.training and int(self.last_step) != batch.info.step:
            self.remember(level, channel_vectors(teacher).flatten(0, 1), batch)
            if level == len(self.queues) - 1:
                self.last_step.fill_(batch.info.step)
        queue: Any = self.queues[level]
        keys = queue.draw(self.slots(level, batch).to(student.device)).to(student.dtype)
        groups, total = len(vectors_s), max(len(rows_s), 1)
        each = rows_s.new_full((len(rows_s), 1), 1.0 / total)
        return {
            'minibatch': relation_divergence(rows_s, vectors_s, rows_t, vectors_t, each.expand(-1, groups) / groups,
                                             self.tau, max_block=self.max_block),
            'memory': self.kd_tau**2 * relation_divergence(rows_s, keys, rows_t, keys, each, self.tau * self.kd_tau,
                                                           max_block=self.max_block),
            'mse': (rows_s - rows_t).square().mean(),
        }

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, batch, mask)
