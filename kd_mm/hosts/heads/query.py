"""The query view: one form for the outputs of every DETR-type detector of mmdet, and of those built like them.

A decoder layer is a *level*: class logits (N, Q, K) and boxes (N, Q, 4) of Q object queries, boxes as (cx, cy, w, h) in
parts of the image without its padding, as the host's own losses have them.  The queries are those that are matched with
objects: denoising queries (DINO, DDQ, RT-DETR) and DDQ's dense ones, which exist in training only, are left out.

Nothing is told by the name of a class.  What counts is what a head returns (:func:`predictions`), whether the detector
goes through :data:`STEPS`, and how many queries it says it has; so RT-DETR, D-FINE and DEIM as others have registered
them are read like the host's own.  Of a detector that keeps its transformer inside of its head only the head's outputs
are known: logits, boxes and their distributions.

Everything is taken from the recorded calls of one forward pass.  Only a decoder may run once more, on another model's
queries: :attr:`QueryView.decode`.

Nothing of mmdet is imported: a detector is used through its instance.
"""

import functools
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_mm.hosts.places import split_levels
from kd_mm.ops import distributed
from kd_mm.ops.boxes import frames, to_corners
from kd_mm.ops.functional import lift
from kd_mm.types.query import POINTS, Points, QueryAssignment, QueryView
from kd_mm.types.records import Call, Recorded

#: The methods of a detector whose calls make a view, besides its head's ``forward``.
STEPS = ('pre_transformer', 'forward_encoder', 'forward_decoder')
#: How a detector or its head calls the number of its queries.
COUNTS = ('num_queries', 'num_query')


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


def has_steps(model: nn.Module) -> bool:
    """Whether a detector goes through the steps of the host's transformers, so that more than its head is known."""
    return all(callable(getattr(model, name, None)) for name in STEPS)


def query_count(*owners: Any) -> Optional[int]:
    """How many queries are matched with objects, as a detector or its head says; None where neither does."""
    found = (getattr(owner, name, None) for owner in owners for name in COUNTS)
    return next((value for value in found if isinstance(value, int)), None)


def query_taps(model: nn.Module, at: str) -> Dict[str, str]:
    """What to record of a DETR-type detector: name -> path.

    Args:
        model: the whole detector.
        at: path of its head.

    Raises:
        ValueError: it is none.
    """
    if has_steps(model):
        return {'head': at, **{name: name for name in STEPS}}
    head = dict(model.named_modules()).get(at)
    if head is None or query_count(head) is None:
        missing = [name for name in STEPS if not callable(getattr(model, name, None))]
        raise ValueError(f'{type(model).__name__} is no DETR-type detector: it has no {", ".join(missing)}, and its '
                         f'{at} no {" or ".join(COUNTS)}')
    return {'head': at}


class Predictions(NamedTuple):
    """What a head returned for all queries, layer by layer: logits (L, N, Q, K), boxes (L, N, Q, 4) and distributions
    (L', N, Q, 4, B) of the last L' layers or None."""

    logits: Tensor
    boxes: Tensor
    distributions: Optional[Tensor]


def predictions(head: Any, output: Any) -> Predictions:
    """Logits, boxes and box distributions among the outputs of a head.

    Known are: a tuple that begins with logits and boxes of all layers, as one tensor or a tensor a layer, None for a
    layer that did not predict; boxes as a pair with the logits of their distributions (D-FINE, DEIM); and a dict with
    ``pred_logits``, ``pred_boxes``, ``pred_corners`` of the last layer and ``aux_outputs`` for those before it.

    Raises:
        ValueError: the head returns something else.
    """
    if isinstance(output, Mapping) and {'pred_logits', 'pred_boxes'} <= set(output):
        layers = [*output.get('aux_outputs', ()), output]
        logits, boxes, corners = ([layer.get(name) for layer in layers] for name in (
            'pred_logits', 'pred_boxes', 'pred_corners'))
    elif isinstance(output, (tuple, list)) and len(output) >= 2:
        logits, boxes = output[:2]
        corners = []
        if isinstance(boxes, (tuple, list)) and len(boxes) == 2 and not _is_layer(boxes[0]):
            boxes, corners = boxes
    else:
        logits = boxes = corners = []
    first, second, third = (_stacked(part) for part in (logits, boxes, corners))
    if first is None or second is None or first.shape[:3] != second.shape[:3] or second.shape[3] != 4:
        raise ValueError(f'{type(head).__name__} does not return class logits (L, N, Q, K) and boxes (L, N, Q, 4)')
    if third is not None:
        if third.shape[1:3] != first.shape[1:3] or len(third) > len(first) or third.shape[3] % 4:
            raise ValueError(f'{type(head).__name__} returns {tuple(third.shape)} beside boxes {tuple(second.shape)}: '
                             'box distributions must be (L, N, Q, 4 B)')
        third = third.unflatten(3, (4, -1))
    return Predictions(first, second, third)


def _is_layer(value: Any) -> bool:
    """Whether this is the tensor of one layer, (N, Q, ...)."""
    return isinstance(value, Tensor) and value.dim() == 3


def _stacked(value: Any) -> Optional[Tensor]:
    """All layers as one tensor (L, N, Q, ...); None where that is not what it is."""
    if isinstance(value, Tensor):
        return value if value.dim() == 4 else None
    layers: List[Tensor] = [layer for layer in value if layer is not None] if isinstance(value, (tuple, list)) else []
    if not layers or not all(_is_layer(layer) and layer.shape == layers[0].shape for layer in layers):
        return None
    return torch.stack(layers)


def query_view(model: Any, head: Any, records: Mapping[str, Recorded]) -> QueryView:
    """The view of the one forward pass that was recorded.

    Args:
        model: DETR, Conditional DETR, DAB-DETR, Deformable DETR (one or two stages), DINO, DDQ, RT-DETR, D-FINE or one
            built like them.
        head: its head.
        records: by the names of :func:`query_taps`.

    Raises:
        ValueError: something ran more than once, or returned something else.
    """
    calls: Dict[str, Call] = {}
    for name, record in records.items():
        # With several groups of queries (num_group) the decoder runs for each; the first is the one that predicts.
        groups = getattr(model, 'num_group', 1) if name in ('head', 'forward_decoder') and model.training else 1
        if len(record.calls) != groups:
            raise ValueError(f'{type(model).__name__}: {name} ran {len(record.calls)} times in a step; once is needed')
        calls[name] = record.calls[0]
    found = predictions(head, calls['head'].output)
    keep = _matched_queries(model, head, found.logits.shape[2])
    if 'forward_decoder' not in calls:
        return _view(model, head, found, None, keep)
    decoder = calls['forward_decoder']
    points = {name: lift(value)[:, keep] for name, value in decoder.kwargs.items()
              if name in POINTS and isinstance(value, Tensor)}
    neck = [lift(level) for level in _argument(calls['pre_transformer'], 'img_feats', 'mlvl_feats')]
    memory = calls['forward_encoder'].output['memory']
    # DDQ's decoder counts on its dense queries, which only its own forward pass makes.
    decode = None if hasattr(model, 'cache_dict') else functools.partial(_decode, model, head, decoder)
    return _view(model, head, found, decoder.output['hidden_states'], keep, memory=split_levels(lift(memory), neck),
                 neck=neck, points=points, decode=decode)


def _view(model: Any, head: Any, found: Predictions, hidden: Any, keep: slice, **parts: Any) -> QueryView:
    sigmoid = bool(getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True))
    assigner = getattr(head, 'assigner', None)
    parts['match'] = None if assigner is None else functools.partial(match_truth, assigner)
    logits, boxes, corners = (None if value is None else lift(value)[:, :, keep] for value in found)
    assert logits is not None
    queries = _stacked(hidden)  # wide last layers (D-FINE) are of another width: then they are not known
    # RT-DETR's decoders give in evaluation what is predicted from, the last layer alone.
    layers = getattr(getattr(model, 'decoder', None), 'num_layers', len(logits))
    return QueryView(logits, boxes, None if queries is None else lift(queries)[:, :, keep], sigmoid=sigmoid,
                     name=type(head).__name__, distributions=corners, partial=len(logits) < layers, **parts)


def _matched_queries(model: Any, head: Any, total: int) -> slice:
    """Positions of the queries that are matched with objects."""
    count = query_count(model, head)
    if count is None or total <= count:
        return slice(None)
    if hasattr(model, 'cache_dict'):
        start = model.cache_dict['dis_query_info'][0]  # DDQ: dense ones come last
    elif any(_denoises(name) for owner in (model, head) for name in (*vars(owner), *owner._modules)):
        start = total - count  # denoising queries come first
    else:
        raise ValueError(f'{type(head).__name__} predicts {total} queries where {count} are matched with objects, and '
                         'nothing about denoising (dn_..., ...denoising...) is known of it: which ones are they?')
    return slice(start, start + count)


def _denoises(name: str) -> bool:
    return name.startswith('dn_') or 'denois' in name


def _argument(call: Call, *names: str) -> Any:
    """The first argument of a call, by place or by one of its names."""
    return call.args[0] if call.args else next(call.kwargs[name] for name in names if name in call.kwargs)


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
    found = predictions(head, head(**decoded))
    return _view(model, head, found, decoded['hidden_states'], slice(None), points=points)


def _names(points: Mapping[str, Any]) -> str:
    return ' and '.join(name for name in POINTS if name in points) or 'nothing'
