"""The query view: one form for the outputs of every DETR-type detector of mmdet.

A decoder layer is a *level*: class logits (N, Q, K) and boxes (N, Q, 4) of Q object queries, boxes as (cx, cy, w, h) in
parts of the image without its padding, as the host's own losses have them.  The queries are those that are matched with
objects: denoising queries (DINO, DDQ) and DDQ's dense ones, which exist in training only, are left out.

Everything is taken from the recorded calls of one forward pass.  A method may run a
decoder, and nothing else, once more on another model's queries: :attr:`QueryView.decode`.

Nothing of mmdet is imported: a detector is used through its instance.
"""

import functools
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_mm import distributed
from kd_mm.functional import giou_loss, lift
from kd_mm.places import split_levels
from kd_mm.taps import Call, Recorded
from kd_mm.types import Features

#: What a decoder starts from: 'query' (N, Q, C), 'query_pos' (N, Q, C or 4), 'reference_points' (N, Q, 2 or 4), as far
#: as the host's decoder takes them.
Points = Dict[str, Tensor]
POINTS = ('query', 'query_pos', 'reference_points')
#: The methods of a detector whose calls make a view, besides its head's ``forward``.
STEPS = ('pre_transformer', 'forward_encoder', 'forward_decoder')


@dataclass
class QueryAssignment:
    """Which object each query stands for.

    Attributes:
        labels: (L, N, Q), the object's class, ``background`` for a query without.
        objects: (L, N, Q), index of the ground-truth box in its image, -1 for none.
        background: label of everything that is not positive.
        num_pos: (L,), queries with an object, of the batch, at least 1; the mean over the ranks.
    """

    labels: Tensor
    objects: Tensor
    background: int
    num_pos: Tensor


class QueryView:
    """What a DETR-type detector predicted for its queries; float32 or wider.

    Args:
        logits: (L, N, Q, K), the host's sigmoid or softmax not applied; with softmax the last of K is "no object".
        boxes: (L, N, Q, 4) as (cx, cy, w, h) in 0..1; None if a method needs none.
        queries: (L, N, Q, C), what each decoder layer made of the queries; None if not known.
        memory: levels (N, C, H, W): the encoder's output; empty if not known.
        neck: levels (N, C, H, W): the encoder's input.
        points: what the first decoder layer started from; None if not known.
        decode: points -> the view that this detector's decoder makes of them on the same images; None if it cannot.
        assignment: see :class:`QueryAssignment`.
        match: (view, boxes, labels, image shapes, background label) -> the assignment that the host's own assigner of
            this head makes, see :func:`match_truth`; None if it has none.
        sigmoid: whether the classes are independent.
        name: of the head, for messages.

    Example:
        >>> view = QueryView(torch.zeros(6, 2, 100, 80), torch.rand(6, 2, 100, 4))
        >>> len(view), len(view.detach())
        (6, 6)
    """

    def __init__(self, logits: Tensor, boxes: Optional[Tensor] = None, queries: Optional[Tensor] = None,
                 memory: Sequence[Tensor] = (), neck: Sequence[Tensor] = (), points: Optional[Points] = None,
                 decode: Optional[Callable[[Points], 'QueryView']] = None,
                 assignment: Optional[QueryAssignment] = None, sigmoid: bool = True, name: str = 'head',
                 match: Optional[Callable[..., QueryAssignment]] = None):
        self.match = match
        self.logits, self.queries = logits, queries
        self.memory: Features = tuple(memory)
        self.neck: Features = tuple(neck)
        self.points, self.decode, self.assignment, self.sigmoid, self.name = points, decode, assignment, sigmoid, name
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def boxes(self) -> Tensor:
        """(L, N, Q, 4).

        Raises:
            ValueError: the view has none.
        """
        if self._boxes is None:
            raise ValueError(f'{self.name}: this view has no boxes')
        return self._boxes

    def detach(self) -> 'QueryView':
        """The same view without gradient."""

        def cut(tensor: Optional[Tensor]) -> Optional[Tensor]:
            return None if tensor is None else tensor.detach()

        points = None if self.points is None else {name: value.detach() for name, value in self.points.items()}
        return QueryView(self.logits.detach(), cut(self._boxes), cut(self.queries),
                         [level.detach() for level in self.memory], [level.detach() for level in self.neck], points,
                         self.decode, self.assignment, self.sigmoid, self.name, self.match)

    def scores(self) -> Tensor:
        """(L, N, Q, K) probabilities of the classes, without "no object"."""
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(dim=-1)[..., :-1]


# ---------------------------------------------------------------- boxes


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2).

    Example:
        >>> to_corners(torch.tensor([4., 4., 2., 4.]))
        tensor([3., 2., 5., 6.])
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_centre(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) to (cx, cy, w, h).

    Example:
        >>> to_centre(torch.tensor([3., 2., 5., 6.]))
        tensor([4., 4., 2., 4.])
    """
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def frames(shapes: Sequence[Tuple[int, int]], like: Tensor) -> Tensor:
    """(w, h, w, h) of every image, (N, 1, 4): what turns parts of an image into pixels.

    Example:
        >>> frames([(480, 640)], torch.zeros(1)).flatten().tolist()
        [640.0, 480.0, 640.0, 480.0]
    """
    return like.new_tensor([[(w, h, w, h)] for h, w in shapes])


# ---------------------------------------------------------------- matching


def pair_costs(boxes: Tensor, others: Tensor, l1_weight: float, giou_weight: float) -> Tensor:
    """``l1_weight * L1 - giou_weight * GIoU`` of every pair of boxes.

    Args:
        boxes: (..., Q, 4), (cx, cy, w, h) in 0..1.
        others: (..., T, 4).

    Returns:
        (..., Q, T).

    Example:
        >>> box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
        >>> round(pair_costs(box, box, 5.0, 2.0).item(), 4)
        -2.0
    """
    # GIoU is a ratio of areas: the same in pixels.
    near = giou_loss(to_corners(boxes)[..., :, None, :], to_corners(others)[..., None, :, :], eps=1e-12)
    return l1_weight * torch.cdist(boxes, others, p=1) + giou_weight * (near - 1)


def hungarian(costs: Tensor) -> Tensor:
    """The one-to-one matching of least total cost.

    Args:
        costs: (..., Q, T).

    Returns:
        (..., Q), the column of each row, -1 for the rows that are left over (Q > T).

    Raises:
        ImportError: scipy is missing; mmdet's own assigner needs it too.

    Example:
        >>> hungarian(torch.tensor([[1., 0.], [0., 9.], [5., 5.]]))
        tensor([ 1,  0, -1])
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('the matching of queries needs scipy: pip install scipy') from error
    # One transfer for all layers and images. A cost that is not finite says nothing about the best partner; the loss
    # that it leads to is not finite either and is reported as such.
    flat = torch.nan_to_num(costs.detach(), nan=1e4, posinf=1e4, neginf=-1e4).reshape(-1, *costs.shape[-2:]).cpu()
    result = torch.full(flat.shape[:2], -1, dtype=torch.long)
    for index, matrix in enumerate(flat.numpy()):
        rows, columns = linear_sum_assignment(matrix)
        result[index, torch.from_numpy(rows)] = torch.from_numpy(columns)
    return result.view(costs.shape[:-1]).to(costs.device)


def take_queries(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of (L, N, T, D) by index: (L, N, Q, D); index -1 gives the first row, to be discarded.

    Example:
        >>> take_queries(torch.tensor([[[[1.], [2.]]]]), torch.tensor([[[1, 0, -1]]])).flatten()
        tensor([2., 1., 1.])
    """
    return values.gather(2, chosen.clamp(min=0)[..., None].expand(*chosen.shape, values.shape[-1]))


def match_truth(assigner: Any, view: QueryView, boxes: Sequence[Tensor], labels: Sequence[Tensor],
                shapes: Sequence[Tuple[int, int]], background: int) -> QueryAssignment:
    """The host's own assignment of ground truth to the queries of a view, layer by layer as the host does it.

    Args:
        assigner: mmdet's ``HungarianAssigner`` of a head.
        view: whose queries.
        boxes: N tensors (M, 4), x1 y1 x2 y2 in pixels.
        labels: N tensors (M,).
        shapes: N pairs (h, w).
        background: label of queries without object.
    """
    pixels = to_corners(view.boxes.detach()) * frames(shapes, view.boxes)
    classes = torch.full(view.logits.shape[:3], background, device=view.logits.device)
    objects = torch.full_like(classes, -1)
    for image, (box, label, shape) in enumerate(zip(boxes, labels, shapes)):
        truth = InstanceData(bboxes=box.to(pixels), labels=label.to(classes))
        for layer in range(len(view)):
            guess = InstanceData(scores=view.logits[layer, image].detach(), bboxes=pixels[layer, image])
            found = assigner.assign(pred_instances=guess, gt_instances=truth, img_meta=dict(img_shape=shape)).gt_inds
            positive = found > 0
            objects[layer, image, positive] = found[positive] - 1
            classes[layer, image, positive] = truth.labels[found[positive] - 1]
    return QueryAssignment(classes, objects, background, count_positives(objects))


def count_positives(objects: Tensor) -> Tensor:
    """Queries with an object in each layer of (L, N, Q), the mean over the ranks, at least 1: (L,)."""
    return distributed.mean((objects >= 0).sum(dim=(1, 2)).float()).clamp(min=1)


# ---------------------------------------------------------------- reading a detector


def query_taps(model: nn.Module, at: str) -> Dict[str, str]:
    """What to record of a DETR-type detector: name -> path.

    Args:
        model: the whole detector.
        at: path of its head.

    Raises:
        ValueError: it is none.
    """
    missing = [name for name in STEPS if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(f'{type(model).__name__} is no DETR-type detector: it has no {", ".join(missing)}')
    return {'head': at, **{name: name for name in STEPS}}


def query_view(model: Any, head: Any, records: Mapping[str, Recorded]) -> QueryView:
    """The view of the one forward pass that was recorded.

    Args:
        model: DETR, Conditional DETR, DAB-DETR, Deformable DETR (one or two stages), DINO, DDQ or one built like them.
        head: its head.
        records: by the names of :func:`query_taps`.

    Raises:
        ValueError: something ran more than once, or returned something else.
    """
    calls: Dict[str, Call] = {}
    for name, record in records.items():
        if len(record.calls) != 1:
            raise ValueError(f'{type(model).__name__}: {name} ran {len(record.calls)} times in a step; once is needed')
        calls[name] = record.calls[0]
    decoder, output = calls['forward_decoder'], calls['head'].output
    if not isinstance(output, (tuple, list)) or len(output) < 2 or any(part.dim() != 4 for part in output[:2]):
        raise ValueError(f'{type(head).__name__} does not return class logits (L, N, Q, K) and boxes (L, N, Q, 4)')
    keep = _matched_queries(model, output[0].shape[2])
    points = {name: lift(value)[:, keep] for name, value in decoder.kwargs.items()
              if name in POINTS and isinstance(value, Tensor)}
    neck = [lift(level) for level in _argument(calls['pre_transformer'], 'img_feats', 'mlvl_feats')]
    memory = calls['forward_encoder'].output['memory']
    # DDQ's decoder counts on its dense queries, which only its own forward pass makes.
    decode = None if hasattr(model, 'cache_dict') else functools.partial(_decode, model, head, decoder)
    return _view(head, output, decoder.output['hidden_states'], keep, memory=split_levels(lift(memory), neck),
                 neck=neck, points=points, decode=decode)


def _view(head: Any, output: Sequence[Tensor], hidden: Tensor, keep: slice, **parts: Any) -> QueryView:
    sigmoid = bool(getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True))
    assigner = getattr(head, 'assigner', None)
    parts['match'] = None if assigner is None else functools.partial(match_truth, assigner)
    return QueryView(lift(output[0])[:, :, keep], lift(output[1])[:, :, keep], lift(hidden)[:, :, keep],
                     sigmoid=sigmoid, name=type(head).__name__, **parts)


def _matched_queries(model: Any, total: int) -> slice:
    """Positions of the queries that are matched with objects."""
    count = getattr(model, 'num_queries', total)
    if not hasattr(model, 'dn_query_generator') or total == count:
        return slice(None)
    start = total - count  # DINO: denoising queries come first
    if hasattr(model, 'cache_dict'):
        start = model.cache_dict['dis_query_info'][0]  # DDQ: dense ones come last
    return slice(start, start + count)


def _argument(call: Call, *names: str) -> Any:
    """The first argument of a call, by place or by one of its names."""
    return call.args[0] if call.args else next(call.kwargs[name] for name in names if name in call.kwargs)


# ---------------------------------------------------------------- the shared-query pass


def _decode(model: Any, head: Any, call: Call, points: Points) -> QueryView:
    """What a detector's decoder and head make of given points, on the memory of a recorded call."""
    own = {name: value for name, value in call.kwargs.items() if name in POINTS and isinstance(value, Tensor)}
    if set(own) != set(points):
        raise ValueError(f'{type(model).__name__} decodes from {_names(own)} and the other model from {_names(points)}'
                         ': queries can be shared between detectors of one kind only')
    for name, value in own.items():
        wide, other = value.shape[-1], points[name].shape[-1]
        # Both kinds of reference, a point and a box, are known to every decoder that takes any.
        if wide != other and name != 'reference_points':
            raise ValueError(f'{type(model).__name__}: {name} has {wide} channels and the other model\'s {other}; '
                             'queries can be shared between decoders of one width only')
    inputs = dict(call.kwargs)
    inputs.update({name: value.to(own[name].dtype) for name, value in points.items()})
    if 'dn_mask' in inputs:
        inputs['dn_mask'] = None
    decoded = model.forward_decoder(**inputs)
    return _view(head, head(**decoded), decoded['hidden_states'], slice(None), points=points)


def _names(points: Mapping[str, Any]) -> str:
    return ' and '.join(name for name in POINTS if name in points) or 'nothing'


def random_points(points: Points, count: int, generator: torch.Generator) -> Points:
    """Points drawn at random, of the same kind as given ones, the same for all images.

    Positions (reference points and boxes) are uniform over the image and over all sizes.  Embeddings are drawn from a
    normal distribution with the mean and deviation that the given ones have in each channel; where these do not differ
    (DETR's and DAB-DETR's zeros), neither do those.

    Args:
        points: of a detector, (N, Q, ...).
        count: how many, at least 1.
        generator: a CPU generator.

    Returns:
        The same names, (N, count, ...).

    Example:
        >>> given = dict(query=torch.zeros(2, 5, 8), reference_points=torch.rand(2, 5, 4))
        >>> drawn = random_points(given, 7, torch.Generator().manual_seed(0))
        >>> drawn['query'].abs().sum().item(), drawn['reference_points'].shape
        (0.0, torch.Size([2, 7, 4]))
    """
    result: Points = {}
    for name, value in points.items():
        images, _, width = value.shape
        anchors = name == 'query_pos' and 'query' in points and width != points['query'].shape[-1]
        if name == 'reference_points' or anchors:
            drawn = torch.rand(count, width, generator=generator).clamp(0.01, 0.99).to(value)
            if anchors:  # DAB-DETR's learned anchors are before their sigmoid
                drawn = torch.logit(drawn)
        else:
            drawn = torch.randn(count, width, generator=generator).to(value)
            rows = value.detach().flatten(0, 1)
            drawn = rows.mean(dim=0) + drawn * rows.std(dim=0, unbiased=False)
        result[name] = drawn.expand(images, count, width)
    return result


def join_views(views: Sequence[QueryView]) -> QueryView:
    """Several views of the same images and layers as one, their queries side by side."""
    first = views[0]
    logits, boxes = (torch.cat(parts, dim=2) for parts in zip(*((view.logits, view.boxes) for view in views)))
    return QueryView(logits, boxes, sigmoid=first.sigmoid, name=first.name)

