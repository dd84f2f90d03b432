"""PLOP: features pooled along rows and columns of local cells, and labels of the old model on the background."""

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss, needs_channels
from kd_mm.losses.mib import DIVISORS, SIZES, at_labels, old_class_count
from kd_mm.ops import distributed
from kd_mm.ops.blocks import sum_in_blocks
from kd_mm.ops.checks import boolean, entries, from_zero, one_of, pair, whole
from kd_mm.ops.functional import apply_weights, nonzero, resize, safe_sqrt
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

CELLS = ('both', 'width')
EXTRA = ('sum', 'trim')
ENTROPIES = ('normalised', 'published')
MEDIANS = ('counts', 'published')


def bands(length: int, edge: Optional[int], count: int) -> List[Tuple[int, int]]:
    """``count`` ranges of a side; those that are empty are left out.

    Args:
        length: of the side, in cells of the map.
        edge: length of a range, the rest is in none; None for ranges that cover the side as evenly as they can.
        count: how many.

    Example:
        >>> bands(7, None, 2), bands(7, 3, 2), bands(1, None, 2)
        ([(0, 3), (3, 7)], [(0, 3), (3, 6)], [(0, 1)])
    """
    ends = [index * length // count if edge is None else min(index * edge, length) for index in range(count + 1)]
    return [(start, end) for start, end in zip(ends, ends[1:]) if end > start]


def local_pod(features: Tensor, scales: Sequence[int] = (1, 2, 4), cells: str = 'both') -> List[Tuple[Tensor, Tensor]]:
    """Means along the rows and along the columns of the cells of k x k grids, for each scale k.

    Args:
        features: (N, C, H, W).
        scales: numbers of cells along a side.
        cells: 'both': a grid covers height and width; 'width': the edge of a cell is ``W // k`` in both directions, as
            published: what is below ``k`` edges, and the rest of the division, is in no cell.

    Returns:
        For each scale (N, C, k, Hk), the means along each row of the cells over the columns of each of the k bands, and
        (N, C, k, Wk), the means along each column over the rows of each band.  Each row (column) of a cell is there
        once: together they are the numbers of all cells.

    Example:
        >>> rows, columns = local_pod(torch.tensor([[1., 3.], [5., 7.]]).view(1, 1, 2, 2), [1])[0]
        >>> rows.flatten().tolist(), columns.flatten().tolist()
        ([2.0, 6.0], [3.0, 5.0])
    """
    height, width = features.shape[2:]
    result = []
    for scale in scales:
        edge = max(width // scale, 0) if cells == 'width' else None
        down, across = bands(height, edge, scale), bands(width, edge, scale)
        if not down or not across:
            continue
        inside = features[:, :, :down[-1][1], :across[-1][1]]
        result.append((torch.stack([inside[..., start:end].mean(dim=3) for start, end in across], dim=2),
                       torch.stack([inside[:, :, start:end].mean(dim=2) for start, end in down], dim=2)))
    return result


def folded_logits(logits: Tensor, old: int, extra: str = 'sum') -> Tensor:
    """Logits of the student as the old model would give them: those of new classes added to channel 0, or dropped.

    Example:
        >>> folded_logits(torch.tensor([1., 2., 4.]).view(1, 3, 1, 1), 2).flatten().tolist()
        [5.0, 2.0]
    """
    if extra == 'trim':
        return logits[:, :old]
    return torch.cat([logits[:, :1] + logits[:, old:].sum(dim=1, keepdim=True), logits[:, 1:old]], dim=1)


@MODELS.register_module()
class LocalPODLoss(KDLoss):
    """Local POD of PLOP (Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation, CVPR
    2021), for features of any tap.

    ``mean over images of |e(F_t^2) - e(F_s^2)|_2``: the squared features, averaged along the rows and along the columns
    of the cells of 1x1, 2x2 and 4x4 grids (:func:`local_pod`), all in one vector.  What is where is kept, coarsely;
    where exactly in a row may change.  No labels, no classes: it is a feature loss like others.

    A model that *grows* gives more class logits than its teacher.  With ``growth=(old, new)`` a level with
    ``old + new`` channels of the student and ``old`` of the teacher is made comparable first: the logits of the new
    classes are added to the background's (channel 0).  The loss is then multiplied by ``sqrt((old + new) / new)`` [C]:
    the fewer classes are new, the more is to be kept.

    As published: the mean over M maps (the backbone's four stages before their last ReLU, the head's feature, the
    logits), each with the weight 0.01 and the logits 0.0005; here the levels are summed, so these are
    ``loss_weight=[0.01 / 6] * 5 + [0.0005 / 6]``.  There the edge of a cell is ``W // k`` in both directions: of maps
    higher than wide the lower part is not read, and of wide ones cells are cut short or empty, where the code stops
    with NaN.  Here a grid covers height and width (``cells='width'`` for theirs, without the NaN).

    Args:
        scales: cells along a side of each grid. Default (1, 2, 4) [C].
        cells: 'both' (default) or 'width' [C], see :func:`local_pod`.
        growth: (old, new): classes of the teacher, background included, and how many more the student has. Default
            None: levels have equal channels.
        extra: what becomes of new classes' logits: 'sum' (default [C]) or 'trim'.
        schedule: the factor of ``growth``. Default True [C]; without ``growth`` there is none.
        loss_weight: see :class:`KDLoss`. Default 0.01 [C: VOC, before the mean over maps; 0.001 for ADE20K, 0.0001 for
            Cityscapes].

    A region weights the differences of the squared features.

    Returns:
        Reduction: per level; root of the sum over elements; divided by images
        The root is that of each image. Summed over levels.

    Raises:
        ValueError: an option has a bad value, or the channels do not fit.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='LocalPODLoss', scales=[1], loss_weight=1.0))
        >>> loss(torch.full((1, 1, 2, 2), 2.0), torch.zeros(1, 1, 2, 2)).item()  # four means of 4
        8.0
    """

    takes = (4, )
    def __init__(self, scales: Sequence[int] = (1, 2, 4), cells: str = 'both',
                 growth: Optional[Sequence[int]] = None, extra: str = 'sum', schedule: bool = True,
                 loss_weight: Any = 0.01):
        super().__init__(loss_weight)
        self.scales = entries('LocalPODLoss', 'scales', scales, whole)
        self.cells = one_of('LocalPODLoss', 'cells', cells, CELLS)
        self.growth = None if growth is None else pair('LocalPODLoss', 'growth', growth)
        self.extra = one_of('LocalPODLoss', 'extra', extra, EXTRA)
        self.schedule = boolean('LocalPODLoss', 'schedule', schedule)
        self.same_channels = self.growth is None

    @property
    def scale(self) -> float:
        """The factor of a growing model."""
        if self.growth is None or not self.schedule:
            return 1.0
        return math.sqrt(sum(self.growth) / self.growth[1])

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        for level, (s, t) in enumerate(zip(student, teacher)):
            if s.dim() != 4:
                raise ValueError(f'LocalPODLoss, level {level}: it pools maps (N, C, H, W), not {tuple(s.shape)}')
            if s.shape[1] != t.shape[1] and (s.shape[1], t.shape[1]) != self._grown():
                raise ValueError(
                    f'LocalPODLoss, level {level}: student {tuple(s.shape)} and teacher {tuple(t.shape)} differ in '
                    f'channels and are no logits of growth={self.growth}: give growth=(classes of the teacher, new '
                    'classes), tap features of equal channels, or add adapter=dict(type=\'ConvAdapter\')')

    def _grown(self) -> Optional[Tuple[int, int]]:
        return None if self.growth is None else (sum(self.growth), self.growth[0])

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        if self._grown() == (student.shape[1], teacher.shape[1]):
            student = folded_logits(student, teacher.shape[1], self.extra)
        # Means are linear: one pooling serves both sides.
        gap = apply_weights(teacher.square() - student.square(), mask)
        parts = local_pod(gap, self.scales, self.cells)
        squares = [part.square().flatten(1).sum(dim=1) for both in parts for part in both]
        total = torch.stack(squares).sum(dim=0) if squares else gap.flatten(1).sum(dim=1) * 0
        return self.scale * safe_sqrt(total).mean()


def label_entropy(probabilities: Tensor, classes: int, kind: str = 'normalised') -> Tensor:
    """How unsure a softmax is.

    Args:
        probabilities: (N, K, H, W).
        classes: of the student, for 'published'.
        kind: 'normalised': ``-sum_c p log p / log K``, within 0..1; 'published': the *mean* over the classes of
            ``-p log(p + 1e-8)``, divided by ``log(K + 1e-8)`` and by ``log(classes)``.

    Returns:
        (N, H, W).

    Example:
        >>> round(label_entropy(torch.full((1, 4, 1, 1), 0.25), 6).item(), 4)
        1.0
    """
    old = probabilities.shape[1]
    terms = -probabilities * (probabilities + 1e-8).log()
    if kind == 'published':
        return terms.mean(dim=1) / math.log(old + 1e-8) / math.log(classes)
    return (terms.sum(dim=1) / math.log(old)).clamp(min=0)


def entropy_histogram(entropy: Tensor, predicted: Tensor, counted: Tensor, classes: int, bins: int = 100) -> Tensor:
    """How often each class is predicted with which entropy: (classes, bins), the last bin open.

    Args:
        entropy: any shape, from 0.
        predicted: class indices of the same shape.
        counted: bool of the same shape.
        classes: number of them.
        bins: on 0..1.

    Example:
        >>> entropy_histogram(torch.tensor([0.1, 0.9]), torch.tensor([1, 1]), torch.tensor([True, True]), 2, 2).tolist()
        [[0, 0], [1, 1]]
    """
    place = (entropy * bins).long().clamp(0, bins - 1) + predicted * bins
    return torch.bincount(place[counted], minlength=classes * bins)[:classes * bins].view(classes, bins)


def histogram_medians(histogram: Tensor, kind: str = 'counts') -> Tensor:
    """The median of each row of a histogram on 0..1, interpolated within its bin; 0 for an empty row.

    Args:
        histogram: (K, B) counts.
        kind: 'counts', or 'published': where the authors' code adds up the *numbers* of the bins instead of their
            counts until they reach half of all counts.  Where it finds none, it divides by what is in the last bin:
            minus infinity, or plus infinity, with which all is below the median.

    Returns:
        (K,).

    Example:
        >>> histogram_medians(torch.tensor([[0, 2, 2, 0], [0, 0, 0, 0]]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    counts = histogram.double()
    bins = counts.shape[1]
    half = counts.sum(dim=1, keepdim=True) / 2
    numbers = torch.arange(bins, dtype=torch.float64, device=counts.device)
    if kind == 'counts':
        before = counts.cumsum(dim=1) - counts
        found = (before + counts >= half) & (counts > 0)
    else:
        before = (numbers.cumsum(dim=0) - numbers).expand_as(counts)
        found = (before <= half) & (half <= before + counts)
    first = torch.where(found.any(dim=1), found.to(torch.uint8).argmax(dim=1),
                        torch.full_like(half[:, 0], bins - 1).long())[:, None]
    start, inside = before.gather(1, first), counts.gather(1, first)
    if kind == 'published':
        lost = ~found.any(dim=1, keepdim=True)
        start = torch.where(lost, numbers.sum().expand_as(start), start)
    medians = ((first + (half - start) / inside) / bins)[:, 0]
    return torch.where(half[:, 0] > 0, medians, torch.zeros_like(medians))


def plop_labels(labels: Tensor, probabilities: Tensor, entropy: Tensor, thresholds: Tensor,
                ignore_index: int = 255) -> Tuple[Tensor, Tensor]:
    """The labels of a step with the old model's on what is no new class, and how much of each image got one.

    A pixel whose label is below the number of old classes gets the teacher's best class where its entropy is below that
    class's threshold, else ``ignore_index``.

    Args:
        labels: (N, H, W).
        probabilities: of the teacher, (N, K, H, W).
        entropy: (N, H, W).
        thresholds: (K,).
        ignore_index: label of what is left out.

    Returns:
        New labels, and (N,), the share of the candidates that got a label.

    Example:
        >>> p = torch.tensor([[0.9, 0.5], [0.1, 0.5]]).view(1, 2, 1, 2)
        >>> labels, share = plop_labels(torch.zeros(1, 1, 2).long(), p, p[:, 1], torch.tensor([0.2, 0.2]))
        >>> labels.tolist(), share.round(decimals=4).tolist()
        ([[[0, 255]]], [0.5])
    """
    best = probabilities.argmax(dim=1)
    candidate = (labels >= 0) & (labels < probabilities.shape[1]) & (labels != ignore_index)
    sure = candidate & (entropy < thresholds.to(entropy)[best])
    new = torch.where(sure, best, torch.where(candidate, torch.full_like(labels, ignore_index), labels))
    counts = [part.flatten(1).sum(dim=1).to(entropy.dtype) for part in (sure, candidate)]
    return new, counts[0] / (counts[1] + 1e-6)


@MODELS.register_module()
class PLOPPseudoLabelLoss(KDLoss):
    """Pseudo labels of PLOP (Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation,
    CVPR 2021).

    In a step with new classes the objects of the old ones are labelled as background.  Where a label is none of the new
    classes, the old model's best class takes its place if the model is sure of it, and the pixel is left out if not:

    ``1 / labelled pixels * sum over pixels of r_n * CE(z_s, label)``

    A pixel is sure if its entropy is below the threshold of its class, the larger of ``threshold`` and the median over
    the training data (pixels labelled as background); ``r_n`` is the share of an image's candidates that are.

    The medians are read from a histogram for each class that grows while training (``thresholds=None``), the same on
    all ranks and kept in checkpoints; after an epoch it is that of all data.  The authors run through the data once
    before, which ``thresholds=[...]`` can give.

    It takes the place of the student's own cross-entropy: switch that off with ``task_loss_weight=0`` in the hook.  (An
    auxiliary head then learns from a term of its own, or not at all.)

    Where the published code goes wrong: its "median" adds up bin numbers instead of counts (``median='published'``, see
    :func:`histogram_medians`), and its entropy is a mean over the classes divided by a logarithm twice
    (``entropy='published'``), so that a histogram uses its lowest bins alone.  It divides by all pixels, ignored ones
    too (``divisor='all'``).

    Args:
        thresholds: largest entropy of each class of the teacher. Default None: the medians so far.
        threshold: the least of them, within the entropy's range. Default 0.001 [C].
        bins: of the histograms, from 2. Default 1000 [ours: the median of a sure class is far below 0.01]; 100 [C].
        median: 'counts' (default) or 'published' [C].
        entropy: 'normalised' (default) or 'published' [C], see :func:`label_entropy`.
        adaptive: the factor ``r_n``. Default True [C].
        old_classes: classes of the teacher, background included, from 2. Default None: the teacher's channels.
        size: 'labels': the logits are enlarged to the labels, as hosts do (default [C]), or 'logits'.
        divisor: the number of pixels that were 'labelled' (default) or of 'all' [C].
        loss_weight: see :class:`KDLoss`. Default 1 [C].

    A region weights the pixels.

    Returns:
        Reduction: per level; mean over cells
        Over labelled pixels; summed over levels.

    Raises:
        ValueError: an option has a bad value, the channels do not fit, or the data has no segmentation map.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.tensor([[[0, 2]]]))
        >>> old = torch.tensor([[-9., 0.], [9., 0.]]).view(1, 2, 1, 2)  # sure of class 1
        >>> loss = build(dict(type='PLOPPseudoLabelLoss', thresholds=[0.1, 0.1]))
        >>> round(loss(torch.zeros(1, 3, 1, 2), old, batch).item(), 4)  # log 3
        1.0986
    """

    takes = (4, )
    logits = True
    grows = True
    needs_background = True
    same_channels = False
    needs_seg_map = True

    def __init__(self, thresholds: Optional[Sequence[float]] = None, threshold: float = 0.001, bins: int = 1000,
                 median: str = 'counts', entropy: str = 'normalised', adaptive: bool = True,
                 old_classes: Optional[int] = None, size: str = 'labels', divisor: str = 'labelled',
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        name = 'PLOPPseudoLabelLoss'
        self.thresholds = None if thresholds is None else entries(name, 'thresholds', thresholds, from_zero)
        self.threshold = from_zero(name, 'threshold', threshold)
        self.bins = whole(name, 'bins', bins, 2)
        self.median = one_of(name, 'median', median, MEDIANS)
        self.entropy = one_of(name, 'entropy', entropy, ENTROPIES)
        self.adaptive = boolean(name, 'adaptive', adaptive)
        self.old_classes = None if old_classes is None else whole(name, 'old_classes', old_classes, 2)
        self.size = one_of(name, 'size', size, SIZES)
        self.divisor = one_of(name, 'divisor', divisor, DIVISORS)
        #: one a level, see :class:`EntropyHistogram`.
        self.histograms = nn.ModuleList()

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        old = old_class_count('PLOPPseudoLabelLoss', student, teacher, self.old_classes, False)
        needs_channels('PLOPPseudoLabelLoss', teacher, 2, 'a softmax over one class is always sure. It needs the '
                       'background and an old class', 'teacher')
        if self.thresholds is not None and len(self.thresholds) != old:
            raise ValueError(f'PLOPPseudoLabelLoss: thresholds={self.thresholds!r} must be {old} numbers, one for each '
                             'class of the teacher')

    def prepare(self, student: Features, teacher: Features) -> None:
        for level in range(len(self.histograms), len(teacher)):
            old = teacher[level].shape[1] if self.old_classes is None else self.old_classes
            self.histograms.append(EntropyHistogram(old, self.bins, teacher[level].device))

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        student, labels, known, weights = at_labels(student, batch, mask, self.size)
        old = teacher.shape[1] if self.old_classes is None else self.old_classes
        probabilities = resize(teacher[:, :old], (labels.shape[1], labels.shape[2])).softmax(dim=1)
        entropy = label_entropy(probabilities, student.shape[1], self.entropy)
        histogram: Any = self.histograms[level]
        if self.thresholds is None and self.training:
            histogram.add(entropy, probabilities.argmax(dim=1), labels == 0, batch.info.step)
        new, share = plop_labels(torch.where(known > 0, labels, torch.full_like(labels, -1)), probabilities, entropy,
                                 self.limits(histogram.counts), -1)
        inside = (new >= 0).to(student.dtype) * weights
        if self.adaptive:
            inside = inside * share[:, None, None]

        def total_of(one: Tensor, target: Tensor, part: Tensor) -> Tuple[Tensor]:
            return (-(F.log_softmax(one, dim=1).gather(1, target) * part).sum(), )

        total, = sum_in_blocks(total_of, 'cells', student, new.clamp(min=0)[:, None], inside[:, None])
        return total / nonzero((weights if self.divisor == 'all' else known * weights).sum())

    def limits(self, histogram: Tensor) -> Tensor:
        """The threshold of each class."""
        found = histogram_medians(histogram, self.median) if self.thresholds is None else torch.tensor(
            self.thresholds, dtype=torch.float64, device=histogram.device)
        return found.clamp(min=self.threshold)


class EntropyHistogram(nn.Module):
    """Counts of the teacher's entropy for each of its classes, of all ranks.

    Args:
        classes: of the teacher.
        bins: on 0..1.
        device: of the counts.
    """

    counts: Tensor

    def __init__(self, classes: int, bins: int, device: torch.device):
        super().__init__()
        self.register_buffer('counts', torch.zeros(classes, bins, dtype=torch.long, device=device))
        self._step: Optional[int] = None

    def add(self, entropy: Tensor, predicted: Tensor, counted: Tensor, step: int) -> None:
        """Count a step's pixels, once a step however often the loss is asked."""
        if step == self._step:
            return
        self._step = step
        found = entropy_histogram(entropy, predicted, counted, *self.counts.shape)
        self.counts += distributed.gather(found[None]).sum(dim=0)
