"""Cross-image relational distillation: relations between the pixels of a batch, and to a memory of classes."""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.ops import distributed
from kd_mm.ops.blocks import relation_divergence
from kd_mm.ops.checks import boolean, from_zero, one_of, positive, whole
from kd_mm.ops.functional import nonzero, parameter_options, unit_vectors
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import seg_map

ENQUEUE = ('class', 'published')


def rows_of(features: Tensor) -> Tensor:
    """(N, C, H, W) to unit vectors (N, H*W, C), one a cell.

    Example:
        >>> rows_of(torch.full((1, 4, 1, 2), 3.0))[0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return unit_vectors(features.flatten(2), dim=1).transpose(1, 2).contiguous()


def pair_weights(mask: Optional[Tensor], others: Optional[Tensor], student: Tensor, groups: int) -> Tensor:
    """Weights (N*B, G) that make a sum over rows and groups the mean over pairs of the mean over the rows of a pair.

    Args:
        mask: weights of the rows (N, B), or None for ones.
        others: weights of the keys (G, B); a pair with an empty side does not count.
        student: (N, B, C), for shape, type and device.
        groups: G.

    Example:
        >>> pair_weights(None, None, torch.zeros(2, 4, 3), 2).sum()
        tensor(1.)
    """
    count, cells = student.shape[:2]
    if mask is None or others is None:
        return student.new_full((count * cells, groups), 1.0 / max(count * cells * groups, 1))
    mask = mask.to(student.dtype)
    filled = (others > 0).any(dim=1).to(student.dtype)
    pairs = (mask > 0).any(dim=1).sum() * filled.sum()
    share = mask / nonzero(mask.sum(dim=1, keepdim=True))
    return share.reshape(-1, 1) * filled / nonzero(pairs)


@MODELS.register_module()
class CIRKDMiniBatchLoss(KDLoss):
    """Mini-batch relations of CIRKD (Yang et al., Cross-Image Relational Knowledge Distillation for Semantic
    Segmentation, CVPR 2022).

    ``mean over image pairs (i, j), i = j included, of mean_a KL(p_t[a] || p_s[a])``: ``p[a]`` is the softmax, over the
    cells b of image j, of the cosine similarity of cell a of image i with cell b, divided by ``tau``.  No temperature
    squared, as published.  Student and teacher may have different channels: relations are compared, not features.

    The matrix of all relations, ``N^2 (H*W)^2`` numbers, never exists: it is made, used and dropped in blocks of
    ``max_block`` numbers, in forward and backward.

    As published (CIRKD's code) the images are those of one process, although the paper speaks of the batch; and
    pixels with the ignored label take part (``region=dict(type='SegClassRegion')`` leaves them out).

    Args:
        tau: temperature, above 0. Default 0.1 [C].
        pool_above: maps at least this high and wide are average-pooled 4x4 first. Default 256 [C].
        gather: relate the images of this process to those of all processes. The gradient is that of one process with
            the joined batch. Default False [C]. It needs equal sizes on all ranks, and memory for the features of all.
        max_block: similarities of one matrix at a time. Default None, see :func:`kd_mm.ops.blocks.relation_divergence`;
            the value is the same for any, but for rounding.
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    A region weights the cells on both sides: rows by their share, keys as part of the softmax.

    Returns:
        Reduction: per level; mean over cells, pairs
        Over the cells of one image and the pairs of images; summed over levels.

    Raises:
        ValueError: an option has a bad value, or the student has one channel only; with ``gather``, batches of
            different sizes on the ranks.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='CIRKDMiniBatchLoss'))
        >>> loss(torch.randn(2, 4, 6, 8), torch.randn(2, 16, 6, 8)) > 0
        tensor(True)
    """

    takes = (4, )
    same_channels = False

    def __init__(self, tau: float = 0.1, pool_above: int = 256, gather: bool = False, max_block: Optional[int] = None,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.tau = positive('CIRKDMiniBatchLoss', 'tau', tau)
        self.pool_above = whole('CIRKDMiniBatchLoss', 'pool_above', pool_above)
        self.max_block = None if max_block is None else whole('CIRKDMiniBatchLoss', 'max_block', max_block)
        self.gather = boolean('CIRKDMiniBatchLoss', 'gather', gather)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_channels('CIRKDMiniBatchLoss', student, 2,
                       'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss')

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if min(student.shape[2:]) >= self.pool_above:
            student, teacher = (F.avg_pool2d(part, 4, 4, ceil_mode=True) for part in (student, teacher))
            mask = None if mask is None else F.avg_pool2d(mask.to(student.dtype), 4, 4, ceil_mode=True)
        rows_s, rows_t = rows_of(student), rows_of(teacher)
        inside = None if mask is None else mask.to(student.dtype).flatten(1)
        keys_s, keys_t, others = rows_s, rows_t, inside
        if self.gather:
            keys_s, keys_t = distributed.gather_with_gradient(rows_s), distributed.gather(rows_t)
            others = None if inside is None else distributed.gather(inside)
        weights = pair_weights(inside, others, rows_s, keys_s.shape[0])
        return relation_divergence(rows_s.flatten(0, 1), keys_s, rows_t.flatten(0, 1), keys_t, weights, self.tau,
                                   others, self.max_block)


class Queue(nn.Module):
    """The newest ``size`` vectors of each of ``groups`` classes, as buffers.

    A write that reaches the end goes to the last slots and starts over at slot 0, as published.
    """

    vectors: Tensor
    pointer: Tensor

    def __init__(self, groups: int, size: int, width: int, **options: Any):
        super().__init__()
        self.size = size
        # Random directions until real ones come, as published; in place, since this is the largest tensor here.
        vectors = torch.randn(groups, size, width, **options)
        self.register_buffer('vectors', vectors.div_(vectors.norm(dim=2, keepdim=True)))
        self.register_buffer('pointer', torch.zeros(groups, dtype=torch.long, device=options.get('device')))

    def write(self, values: Tensor, counts: Tensor) -> None:
        """Add the first ``counts[g]`` of ``values[g]`` (G, P, C) to each class; P is at most ``size``."""
        full = self.pointer + counts >= self.size
        start = torch.where(full, self.size - counts, self.pointer)
        place = torch.arange(values.shape[1], device=counts.device)
        valid = place < counts[:, None]
        group = torch.arange(len(counts), device=counts.device)[:, None].expand_as(valid)
        self.vectors[group[valid], (start[:, None] + place)[valid]] = values[valid].to(self.vectors.dtype)
        moved = torch.where(full, torch.zeros_like(counts), self.pointer + counts)
        self.pointer.copy_(torch.where(counts > 0, moved, self.pointer))

    def draw(self, index: Tensor) -> Tensor:
        """Keys (1, G*M, C): the same slots of every class, class after class."""
        return self.vectors[:, index].flatten(0, 1)[None]


def projection(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """conv 1x1 - batch norm - ReLU - conv 1x1 without biases, from the student's channels to the teacher's.

    The norm has no running statistics: the projection is used in training only.
    """
    options, width = parameter_options(teacher), teacher.shape[1]
    return nn.Sequential(
        nn.Conv2d(student.shape[1], width, 1, bias=False, **options),
        BatchNorm(width, track_running_stats=False, **options),
        nn.ReLU(),
        nn.Conv2d(width, width, 1, bias=False, **options))


def class_cells(labels: Tensor, uniform: Tensor, classes: int, most: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Random cells of every class of every image.

    Args:
        labels: (N, B), ``classes`` where there is no class.
        uniform: random numbers (N, B); their order decides.
        classes: K.
        most: P, cells of one class and image.

    Returns:
        Cells (N, K, P), meaningless from the count on; counts (N, K), at most P; and for every cell (N, B) its place
        among the cells of its class, from 0.

    Example:
        >>> cells, counts, place = class_cells(torch.tensor([[1, 0, 1, 2]]), torch.rand(1, 4), 2, 1)
        >>> counts.tolist(), cells[0, 0].tolist(), place.tolist()
        ([[1, 1]], [1], [[0, 0, 1, 0]])
    """
    sizes = torch.zeros(len(labels), classes + 1, dtype=torch.long, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    starts = sizes.cumsum(dim=1) - sizes
    shuffled = uniform.argsort(dim=1)
    order = shuffled.gather(1, labels.gather(1, shuffled).argsort(dim=1, stable=True))
    taken = starts[:, :classes, None] + torch.arange(most, device=labels.device)
    cells = order.gather(1, taken.clamp(max=labels.shape[1] - 1).flatten(1)).view_as(taken)
    raster = labels.argsort(dim=1, stable=True)
    number = torch.arange(labels.shape[1], device=labels.device) - starts.gather(1, labels.gather(1, raster))
    return cells, sizes[:, :classes].clamp(max=most), torch.zeros_like(labels).scatter(1, raster, number)


def class_means(rows: Tensor, labels: Tensor, classes: int) -> Tuple[Tensor, Tensor]:
    """Unit vectors of the mean row of every class of every image, and whether there is any.

    Args:
        rows: (N, B, C).
        labels: (N, B), ``classes`` where there is no class.
        classes: K.

    Returns:
        (N, K, C) and, as 0 or 1, (N, K).
    """
    count, cells, width = rows.shape
    sums = rows.new_zeros(count, classes + 1, width)
    sums.scatter_add_(1, labels[:, :, None].expand(-1, -1, width), rows)
    sizes = torch.zeros(count, classes + 1, dtype=torch.long, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    means = sums[:, :classes] / sizes[:, :classes, None].clamp(min=1)
    return unit_vectors(means, dim=2), sizes[:, :classes].clamp(max=1)


@MODELS.register_module()
class CIRKDMemoryLoss(KDLoss):
    """Memory relations of CIRKD (Yang et al., Cross-Image Relational Knowledge Distillation for Semantic Segmentation,
    CVPR 2022).

    ``pixel_weight * R(pixel keys) + region_weight * R(region keys)`` with
    ``R = kd_tau^2 * mean over labelled cells of KL(p_t || p_s)``: ``p`` is the softmax, over keys drawn from a memory,
    of their cosine similarity with the cell, divided by ``tau * kd_tau``.  The student is projected first (conv 1x1 -
    batch norm - ReLU - conv 1x1).  The memory holds teacher vectors of each class: single cells, and means over the
    cells of a class in an image.  Each step adds the batch (of all processes) to it, then draws one set of slots that
    serves all classes and cells.

    The memory is state: buffers that a checkpoint keeps and a resume restores, equal on all processes because what is
    added is gathered.  It is written once a step (``batch.info.step``) and in training mode only.  Draws depend on
    ``(seed, rank, step, level)`` alone.  Relations are computed in blocks, see
    :func:`kd_mm.ops.blocks.relation_divergence`.

    As published, with an error: CIRKD's code picks places *within* the cells of a class and applies them to the whole
    map, so that the cells stored are random ones among the first of the image, whatever their class.
    ``enqueue='published'`` does that; the default stores cells of the class.

    Args:
        num_classes: K, the classes of the labels.
        tau: temperature, above 0. Default 0.1 [C].
        kd_tau: further temperature of both distributions, above 0. Default 1 [C].
        pixel_memory: cells kept for each class. Default 20000 [C]; 2000 for SegFormer [C]. Memory (and checkpoint) for
            ``K * pixel_memory * Ct`` numbers: 0.8 GB in float32 for 19 classes and 512 channels.
        region_memory: means kept for each class. Default 2000 [C].
        pixels_per_image: cells of each class and image that are added. Default 16 [C].
        pixel_keys: cells drawn for each class. Default None: ``4096 // K + 1`` [C].
        region_keys: means drawn for each class. Default None: ``1024 // K + 1`` [C].
        pixel_weight: factor of the pixel term. Default 0.1 [C].
        region_weight: factor of the region term. Default 0.1 [C].
        enqueue: 'class' or 'published', see above. Default 'class'.
        max_block: similarities of one matrix at a time. Default None, see :func:`kd_mm.ops.blocks.relation_divergence`.
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    A region weights the cells that are compared; what is stored comes from all labelled cells.

    Returns:
        Reduction: per level; mean over cells
        Parts: pixel, region
        Over the labelled cells; summed over levels.

    Raises:
        ValueError: an option has a bad value, the teacher has one channel only, the data has no segmentation map, or a
            label is not below ``num_classes``.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.randint(0, 3, (2, 32, 32)))
        >>> loss = build(dict(type='CIRKDMemoryLoss', num_classes=3, pixel_memory=50, region_memory=10, pixel_keys=8,
        ...                   region_keys=4))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8), batch) > 0
        tensor(True)
    """

    takes = (4, )
    same_channels = False
    needs_seg_map = True
    last_step: Tensor

    def __init__(self, num_classes: int, tau: float = 0.1, kd_tau: float = 1.0, pixel_memory: int = 20000,
                 region_memory: int = 2000, pixels_per_image: int = 16, pixel_keys: Optional[int] = None,
                 region_keys: Optional[int] = None, pixel_weight: float = 0.1, region_weight: float = 0.1,
                 enqueue: str = 'class', max_block: Optional[int] = None, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        name = 'CIRKDMemoryLoss'
        self.num_classes = whole(name, 'num_classes', num_classes)
        self.tau, self.kd_tau = positive(name, 'tau', tau), positive(name, 'kd_tau', kd_tau)
        self.sizes = {'pixel': whole(name, 'pixel_memory', pixel_memory),
                      'region': whole(name, 'region_memory', region_memory)}
        self.pixels_per_image = whole(name, 'pixels_per_image', pixels_per_image)
        self.drawn = {
            'pixel': whole(name, 'pixel_keys', 4096 // self.num_classes + 1 if pixel_keys is None else pixel_keys),
            'region': whole(name, 'region_keys', 1024 // self.num_classes + 1 if region_keys is None else region_keys)}
        for kind, size in self.sizes.items():
            if size < self.drawn[kind]:
                raise ValueError(f'{name}: {kind}_memory={size!r} is less than {kind}_keys={self.drawn[kind]}, the '
                                 'vectors to be drawn from it')
        if self.sizes['pixel'] < self.pixels_per_image:
            raise ValueError(f'{name}: pixel_memory={pixel_memory!r} is less than '
                             f'pixels_per_image={pixels_per_image!r}')
        self.factors = {'pixel': from_zero(name, 'pixel_weight', pixel_weight),
                        'region': from_zero(name, 'region_weight', region_weight)}
        self.enqueue = one_of(name, 'enqueue', enqueue, ENQUEUE)
        self.max_block = None if max_block is None else whole(name, 'max_block', max_block)
        self.projections = nn.ModuleList()
        self.queues = nn.ModuleList()
        self.register_buffer('last_step', torch.tensor(-1))
        #: cells (N, K, P) to store and slots to draw ('pixel', 'region') instead of random ones, one entry a level
        #: (a golden vector's, for example).
        self.fixed_cells: Optional[List[Tensor]] = None
        self.fixed_slots: Optional[List[Dict[str, Tensor]]] = None

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        needs_channels('CIRKDMemoryLoss', teacher, 2,
                       'the cosine of single numbers is 1 or -1, whatever they are. Use CWDLoss or FitNetLoss',
                       'teacher')

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.projections) == 0:
            self.last_step = self.last_step.to(teacher[0].device)
            for s, t in zip(student, teacher):
                self.projections.append(projection(s, t))
                self.queues.append(nn.ModuleDict({
                    kind: Queue(self.num_classes, size, t.shape[1], **parameter_options(t))
                    for kind, size in self.sizes.items()}))

    def class_labels(self, batch: KDBatch, size: Tuple[int, int]) -> Tensor:
        """Labels (N, H*W) at feature size, ``num_classes`` where they are ignored."""
        labels = seg_map(batch, size).flatten(1).long()
        ignored = labels == batch.targets.ignore_index
        beyond = ~ignored & (labels >= self.num_classes)
        if bool(beyond.any()):
            raise ValueError(f'CIRKDMemoryLoss: label {int(labels[beyond].max())} with num_classes={self.num_classes}; '
                             'give the number of classes of the data')
        return labels.masked_fill(ignored, self.num_classes)

    @torch.no_grad()
    def remember(self, level: int, rows: Tensor, labels: Tensor, batch: KDBatch) -> None:
        """Add the teacher's rows (N, H*W, C) of this step to the memory, in the order of ranks and images."""
        generator = batch.info.generator(level)
        uniform = torch.rand(labels.shape, generator=generator).to(labels.device)
        cells, counts, place = class_cells(labels, uniform, self.num_classes, self.pixels_per_image)
        if self.fixed_cells is not None:
            cells = self.fixed_cells[level].to(labels.device)
        if self.enqueue == 'published':
            cells = place.gather(1, cells.flatten(1)).view_as(cells)
        picked = rows.gather(1, cells.flatten(1)[:, :, None].expand(-1, -1, rows.shape[2]))
        means, present = class_means(rows, labels, self.num_classes)
        queues: Any = self.queues[level]
        new = {'pixel': (picked.view(*cells.shape, -1), counts), 'region': (means[:, :, None], present)}
        for kind, (values, numbers) in new.items():
            for image, number in zip(distributed.gather(values), distributed.gather(numbers)):
                queues[kind].write(image, number)

    def slots(self, level: int, batch: KDBatch) -> Dict[str, Tensor]:
        """The slots of the memory that are compared with in this step."""
        if self.fixed_slots is not None:
            return self.fixed_slots[level]
        generator = batch.info.generator(level, 1)
        return {kind: torch.randperm(size, generator=generator)[:self.drawn[kind]]
                for kind, size in self.sizes.items()}

    def writes_at(self, batch: KDBatch) -> bool:
        """Whether the memory is to be written now."""
        return self.training and int(self.last_step) != batch.info.step

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The two terms of one level without their weights; the memory is only read."""
        labels = self.class_labels(batch, (student.shape[2], student.shape[3])).to(student.device)
        weights = (labels < self.num_classes).to(student.dtype)
        if mask is not None:
            weights = weights * mask.to(student.dtype).flatten(1)
        weights = (weights / nonzero(weights.sum())).reshape(-1, 1)
        rows_s = rows_of(self.projections[level](student)).flatten(0, 1)
        rows_t = rows_of(teacher).flatten(0, 1)
        queues: Any = self.queues[level]
        found = {}
        for kind, index in self.slots(level, batch).items():
            keys = queues[kind].draw(index.to(student.device)).to(student.dtype)
            found[kind] = self.kd_tau**2 * relation_divergence(
                rows_s, keys, rows_t, keys, weights, self.tau * self.kd_tau, max_block=self.max_block)
        return found

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        if self.writes_at(batch):
            labels = self.class_labels(batch, (teacher.shape[2], teacher.shape[3])).to(teacher.device)
            self.remember(level, rows_of(teacher), labels, batch)
            if level == len(self.queues) - 1:
                self.last_step.fill_(batch.info.step)
        return self.terms(level, student, teacher, batch, mask)
