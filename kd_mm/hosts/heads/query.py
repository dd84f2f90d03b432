"""The query view: one form for the outputs of every DETR-type detector of mmdet.

A decoder layer is a *level*: class logits (N, Q, K) and boxes (N, Q, 4) of Q object queries, boxes as (cx, cy, w, h) in
parts of the image without its padding, as the host's own losses have them.  The queries are those that are matched with
objects: denoising queries (DINO, DDQ) and DDQ's dense ones, which exist in training only, are left out.

Everything is taken from the recorded calls of one forward pass.  Only a decoder may run once more, on another model's
queries: :attr:`QueryView.decode`.

Nothing of mmdet is imported: a detector is used through its instance.
"""

import functools
from typing import Any, Dict, Mapping, Sequence, Tuple

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
