"""Instance-conditional distillation: a decoder that learns to find instances says which cells matter to each."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import from_zero, positive, whole
from kd_mm.ops.functional import nonzero, parameter_options
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import batch_boxes, gt_labels, img_shapes, input_shape

#: sizes of the instance descriptor besides the classes: sines of a point, and five steps of width and of height.
POINT, STEPS = 256, 5


class Instances(NamedTuple):
    """Real and invented instances of a batch, K slots an image.

    Attributes:
        boxes: (N, K, 4) as x1, y1, x2, y2 in parts of the image, 0..1.
        labels: (N, K) class indices.
        points: (N, K, 2) a place near the centre, in parts of the image.
        real: (N, K) whether it is a labelled one.
        used: (N, K) whether the slot holds anything.
        sizes: (N, K, 2) width and height in pixels.
    """

    boxes: Tensor
    labels: Tensor
    points: Tensor
    real: Tensor
    used: Tensor
    sizes: Tensor


def sines(values: Tensor, count: int) -> Tensor:
    """``sin`` and ``cos`` of values in 0..1 at ``count / 2`` frequencies each, alternating: (..., count).

    Example:
        >>> sines(torch.zeros(2), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    """
    steps = torch.arange(count // 2, device=values.device, dtype=values.dtype)
    angles = values[..., None] * 2 * math.pi / 10000**(2 * steps / count)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def position_embedding(inside: Tensor, count: int) -> Tensor:
    """Sines of the row, then of the column, of each cell within the image: (N, count, H, W).

    Args:
        inside: (N, 1, H, W), 1 in the cells of the image, 0 in the padding.
        count: channels, a multiple of 4.

    Example:
        >>> position_embedding(torch.ones(1, 1, 4, 4), 8).shape
        torch.Size([1, 8, 4, 4])
    """
    places = []
    for axis in (2, 3):
        steps = inside.cumsum(dim=axis)
        places.append(sines((steps / (steps.narrow(axis, -1 % inside.shape[axis], 1) + 1e-6))[:, 0], count // 2))
    return torch.cat(places, dim=-1).permute(0, 3, 1, 2)


def image_cells(shapes: Tensor, frame: Tuple[int, int], size: Tuple[int, int]) -> Tensor:
    """1 in the cells that the image reaches, 0 in the padding: (N, 1, H, W).

    Args:
        shapes: (N, 2), height and width of the images in pixels.
        frame: (Hin, Win) of the padded input.
        size: (H, W) of the map.

    Example:
        >>> image_cells(torch.tensor([[16., 32.]]), (32, 32), (4, 4)).sum().item()
        8.0
    """
    edges = [(shapes[:, axis] * size[axis] / frame[axis]).ceil() for axis in (0, 1)]
    rows, columns = (torch.arange(size[axis], device=shapes.device) < edges[axis][:, None] for axis in (0, 1))
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(shapes.dtype)


def value_distance(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """``mean over N, heads, channels of sum_S w (LN(v_s) - LN(v_t))^2 / sum_S w``, LN over the channels of a head.

    Args:
        student: values (N, heads, S, D).
        teacher: values (N, heads, S, D), which get no gradient.
        weights: (N, heads, S), not negative.

    Returns:
        A scalar; an image without weight counts as 0.

    Example:
        >>> v = torch.randn(1, 2, 5, 4)
        >>> value_distance(3 * v + 1, v, torch.ones(1, 2, 5)).item() < 1e-6
        True
    """
    width = (student.shape[-1], )
    gap = (F.layer_norm(student, width) - F.layer_norm(teacher, width).detach()).square()
    return (torch.einsum('nhsd,nhs->nhd', gap, weights) / nonzero(weights.sum(dim=2))[..., None]).mean()


def perceptron(inputs: int, hidden: int, outputs: int, **options: Any) -> nn.Sequential:
    """Three linear layers with ReLUs between them."""
    return nn.Sequential(nn.Linear(inputs, hidden, **options), nn.ReLU(), nn.Linear(hidden, hidden, **options),
                         nn.ReLU(), nn.Linear(hidden, outputs, **options))


@MODELS.register_module()
class ICDLoss(KDLoss):
    """Instance-conditional distillation (Kang et al., Instance-Conditional Knowledge Distillation for Object Detection,
    NeurIPS 2021).

    A decoder on the teacher's features is asked about instances: a class and a place near the centre, in the scale of
    the box.  Its attention says which cells, of all levels, answer; there the student's values are compared, see
    :func:`value_distance`::

        w = sum over the real instances of softmax_S(q k / (tau sqrt(D)))        no gradient
        distill * mean of sum_S w (LN(V F_s) - LN(V F_t))^2 / sum_S w            V: the decoder's value projection

    The decoder is trained jointly on an auxiliary task without the student: is the instance real or invented (binary
    cross entropy), and where are the edges of the real ones (L1 in parts of the box).  The task adds its gradient,
    scaled by ``auxiliary``, but not its value: the reported loss is 0 for equal features.

    Distillation term as published.  Auxiliary task: re-implementation from the description and the released settings.
    Invented instances have uniform classes and sizes around 0.2 of the image, as in the authors' code for data other
    than COCO (for COCO it draws from a file of that data set).  They depend on ``(seed, rank, step)``
    alone.

    Args:
        num_classes: number of classes; labels must be below. Default 80 (COCO).
        heads: attention heads. Default 8 [C]. A head has ceil(C / heads) channels, at least 4.
        tau: temperature of the attention, above 0. Default 1 [C].
        distill: weight of the comparison. Default 8 [C: RetinaNet, FCOS]; 3 for Faster R-CNN [C].
        auxiliary: weight of the auxiliary task, from 0; with 0 the decoder learns from the comparison alone and its
            attention stays random. Default 1 [C].
        negatives: invented instances for each real one. Default 5 [C].
        max_instances: real and invented ones of an image, at most (or all real ones). Default 300 [C]. Memory grows
            with this number times the cells of all levels times the heads.
        loss_weight: see :class:`KDLoss`; one number for all levels. Default 1.

    All levels must have the same channels.  A region weights the attention; the decoder looks at the whole map.

    Returns:
        Reduction: all levels; mean over channels
        Parts: distill, auxiliary
        Channels of each attention head and image; the auxiliary part has a gradient, and the value 0.

    Raises:
        ValueError: an option is out of range, levels differ in channels, a label is too high, or data have no boxes.

    Example:
        >>> from kd_mm.registry import build
        >>> box, label = torch.tensor([[4., 4., 20., 20.]]), torch.tensor([1])
        >>> batch = KDBatch(input_shape=(32, 32), boxes=[box], labels=[label])
        >>> x = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 2))
        >>> build(dict(type='ICDLoss', num_classes=3))(x, x, batch).item() < 1e-6
        True
    """

    takes = (4, )
    joint = True
    needs_boxes = True

    def __init__(self, num_classes: int = 80, heads: int = 8, tau: float = 1.0, distill: float = 8.0,
                 auxiliary: float = 1.0, negatives: float = 5.0, max_instances: int = 300, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.num_classes = whole('ICDLoss', 'num_classes', num_classes)
        self.heads = whole('ICDLoss', 'heads', heads)
        self.tau = positive('ICDLoss', 'tau', tau)
        self.max_instances = whole('ICDLoss', 'max_instances', max_instances)
        self.factors = {'distill': from_zero('ICDLoss', 'distill', distill),
                        'auxiliary': from_zero('ICDLoss', 'auxiliary', auxiliary)}
        self.negatives = from_zero('ICDLoss', 'negatives', negatives)
        self.layers = nn.ModuleDict()
        #: encoded instances (N, K, D), which are real (N, K), embeddings and padding a level, in place of our own.
        self.given: Optional[Dict[str, Any]] = None

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.layers) > 0:
            return
        width, options = teacher[0].shape[1], parameter_options(teacher[0])
        # Values are normalised over the channels of a head: one or two would leave nothing of them.
        hidden = self.heads * max(math.ceil(width / self.heads), 4)
        self.embedding = 4 * math.ceil(width / 4)
        self.layers['query'] = nn.Linear(hidden, hidden, **options)
        self.layers['key'] = nn.Linear(width, hidden, **options)
        self.layers['value'] = nn.Linear(width, hidden, **options)
        self.layers['position'] = nn.Linear(self.embedding, width, **options)
        if self.factors['auxiliary'] > 0:
            self.layers['encode'] = perceptron(self.num_classes + POINT + 2 * STEPS, hidden, hidden, **options)
            self.layers['out'] = nn.Linear(hidden, hidden, **options)
            self.layers['norm_1'] = nn.LayerNorm(hidden, **options)
            self.layers['feed'] = nn.Sequential(
                nn.Linear(hidden, hidden, **options), nn.ReLU(), nn.Linear(hidden, hidden, **options))
            self.layers['norm_2'] = nn.LayerNorm(hidden, **options)
            self.layers['predict'] = perceptron(hidden, hidden, 5, **options)
        elif self.given is None:
            self.layers['encode'] = perceptron(self.num_classes + POINT + 2 * STEPS, hidden, hidden, **options)

    # ------------------------------------------------------------------ instances

    def instances(self, batch: KDBatch, like: Tensor) -> Instances:
        """Labelled instances first, invented ones behind them, empty slots last."""
        boxes, labelled, _ = batch_boxes(batch, 'input', like)
        options = parameter_options(like)
        shapes = torch.tensor(img_shapes(batch) or [input_shape(batch)] * boxes.shape[0], **options)
        counts = [len(labels) for labels in gt_labels(batch)]
        wanted = [min(max(1, int(count * (self.negatives + 1))), max(self.max_instances, count)) for count in counts]
        total = max(wanted)
        draw = batch.info.generator(1)
        shape = (len(counts), total)
        labels = torch.randint(self.num_classes, shape, generator=draw).to(options['device'])
        centres = torch.rand(*shape, 2, generator=draw).clamp(0.03, 0.97)
        sizes = (0.2 + 0.2 * torch.randn(*shape, 2, generator=draw)).clamp(2e-3, 0.6)
        jitter = ((torch.rand(*shape, 2, generator=draw) - 0.5) * 0.6).to(**options)
        places = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1).clamp(0, 1).to(**options)
        extent = shapes.flip(1).repeat(1, 2)[:, None]
        real = torch.zeros(shape, dtype=torch.bool, device=options['device'])
        known = boxes.shape[1]
        real[:, :known] = labelled
        places[:, :known] = torch.where(labelled[..., None], boxes / extent, places[:, :known])
        for index, own in enumerate(gt_labels(batch)):
            if len(own) and int(own.max()) >= self.num_classes:
                raise ValueError(f'ICDLoss: label {int(own.max())}, but num_classes={self.num_classes}')
            labels[index, :len(own)] = own.to(labels)
        used = torch.arange(total, device=options['device'])[None] < torch.tensor(
            wanted, device=options['device'])[:, None]
        edges = places[..., 2:] - places[..., :2]
        points = (places[..., 2:] + places[..., :2]) / 2 + jitter * edges
        return Instances(places, labels, points, real, used, edges * shapes.flip(1)[:, None])

    def descriptors(self, instances: Instances) -> Tensor:
        """(N, K, classes + 256 + 10): one-hot class, sines of the point, one-hot steps of width and height."""
        steps = (instances.sizes.clamp(min=1e-6).log() * 1.44 - 5).clamp(0, STEPS - 1).long()
        points = sines(instances.points, POINT // 2).flatten(2)
        parts = [F.one_hot(instances.labels, self.num_classes), points, F.one_hot(steps, STEPS).flatten(2)]
        return torch.cat([part.to(points.dtype) for part in parts], dim=-1)

    # ------------------------------------------------------------------ decoder

    def split(self, tokens: Tensor) -> Tensor:
        """(N, S, hidden) to (N, heads, S, D)."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attention_logits(self, query: Tensor, teacher: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Scaled products of queries and keys, very negative in the padding: (N, heads, K, S)."""
        q = self.split(self.layers['query'](query))
        k = self.split(self.layers['key'](teacher + self.layers['position'](positions)))
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return logits.masked_fill(padding[:, None, None], -1e30)

    def auxiliary_loss(self, query: Tensor, attended: Tensor, instances: Instances) -> Tensor:
        """Identification of real instances, plus localisation of their edges."""
        layers = self.layers
        hidden = layers['norm_1'](query + layers['out'](attended.transpose(1, 2).flatten(2)))
        hidden = layers['norm_2'](hidden + layers['feed'](hidden))
        found = layers['predict'](hidden)
        used, real = instances.used.to(found.dtype), instances.real.to(found.dtype)
        identity = F.binary_cross_entropy_with_logits(found[..., 0], real, reduction='none')
        wanted = torch.cat([instances.points - instances.boxes[..., :2], instances.boxes[..., 2:] - instances.points],
                           dim=-1)
        edges = (instances.boxes[..., 2:] - instances.boxes[..., :2]).clamp(min=1e-7).repeat(1, 1, 2)
        offsets = ((found[..., 1:].sigmoid() - wanted).abs() / edges).sum(dim=-1)
        return (identity * used).sum() / nonzero(used.sum()) + (offsets * real).sum() / nonzero(real.sum())

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Dict[str, Tensor]:
        if len({tensor.shape[1] for tensor in teacher}) > 1:
            raise ValueError(f'ICDLoss: levels of {[tensor.shape[1] for tensor in teacher]} channels. All levels must '
                             'have the same channels, as in an FPN')
        ours, theirs = (torch.cat([tensor.flatten(2) for tensor in side], dim=2).transpose(1, 2)
                        for side in (student, teacher))
        invented: Optional[Instances] = None
        if self.given is not None:
            query, real = self.given['query'], self.given['real']
            maps, outside = list(self.given['positions']), list(self.given['padding'])
        else:
            invented = self.instances(batch, teacher[0])
            query, real = self.layers['encode'](self.descriptors(invented)), invented.real
            maps, outside = self.places(teacher, batch)
        positions = torch.cat([part.flatten(2) for part in maps], dim=2).transpose(1, 2)
        padding = torch.cat([part.flatten(1) for part in outside], dim=1)
        logits = self.attention_logits(query, theirs, positions, padding)
        values = self.split(self.layers['value'](theirs))

        with torch.no_grad():
            weights = ((logits / self.tau).softmax(dim=3) * real[:, None, :, None].to(logits.dtype)).sum(dim=2)
            if any(mask is not None for mask in masks):
                cells = torch.cat([torch.ones_like(t[:, 0]).flatten(1) if mask is None else mask.flatten(1)
                                   for t, mask in zip(teacher, masks)], dim=1)
                weights = weights * cells[:, None].to(weights.dtype)
        terms = {'distill': value_distance(self.split(self.layers['value'](ours)), values, weights)}
        if self.factors['auxiliary'] > 0 and invented is not None:
            auxiliary = self.auxiliary_loss(query, logits.softmax(dim=3) @ values, invented)
            terms['auxiliary'] = auxiliary - auxiliary.detach()
        return terms

    def places(self, teacher: Features, batch: KDBatch) -> Tuple[List[Tensor], List[Tensor]]:
        """Position embeddings and padding (bool) of every level."""
        frame = input_shape(batch)
        shapes = torch.tensor(img_shapes(batch) or [frame] * teacher[0].shape[0], **parameter_options(teacher[0]))
        inside = [image_cells(shapes, frame, (tensor.shape[2], tensor.shape[3])) for tensor in teacher]
        return [position_embedding(cells, self.embedding) for cells in inside], [cells == 0 for cells in inside]
