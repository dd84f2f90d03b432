"""The dense-head view: one form for the outputs of every anchor-based or point-based head of mmdet.

Every prior (an anchor, or the point of a cell) is one row.  The rows of a level are in the order of the host's own
losses: rows of the map, columns, anchors of a cell, that is ``map.permute(0, 2, 3, 1).reshape(N, P, -1)``.  The
assignment is the one that the host has computed in this step; it is read from the recorded calls of its own method.

Nothing of mmdet is imported: a head is used through its instance.
"""

import functools
import itertools
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.ops import distributed
from kd_mm.ops.boxes import _tensor, around, centers
from kd_mm.ops.functional import lift
from kd_mm.types.dense import Assignment, DenseView, Rows, rows
from kd_mm.types.records import Call


def is_a(head: nn.Module, name: str) -> bool:
    """Whether a class of this name is among a head's base classes."""
    return any(cls.__name__ == name for cls in type(head).__mro__)


def _maps(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(
        isinstance(item, Tensor) and item.dim() == 4 for item in value)


def dense_view(head: Any, output: Any, assignment: Optional[Assignment] = None) -> DenseView:
    """The view of one forward pass of a dense head.

    Args:
        head: an mmdet dense head (RetinaNet, FCOS, ATSS, GFL, PAA, TOOD, RTMDet, YOLOX, VFNet, DDOD, FSAF, FoveaBox,
            AutoAssign, YOLOF, RTMDet-Ins, CondInst and heads built like one of them).
        output: what its ``forward`` returned: two or three lists of maps, one map a level; what comes after is left.
        assignment: see :func:`read_assignment`.

    Raises:
        ValueError: this is no dense head, or its outputs are not understood.

    Example::

        view = dense_view(model.bbox_head, model.bbox_head(features))
        scores = view.logits[0].sigmoid()
    """
    name = type(head).__name__
    classes = getattr(head, 'cls_out_channels', None)
    # Instance heads give their mask features, which are no levels, after the maps (RTMDet-Ins).
    lists = list(itertools.takewhile(_maps, output)) if isinstance(output, (list, tuple)) else []
    if not isinstance(classes, int) or len(lists) < 2:
        raise ValueError(f'{name} is not a dense head that gives maps of class scores and boxes. Point `at` to one '
                         "(bbox_head of a one-stage detector, rpn_head of a two-stage one)")
    maps = lists[0]
    if any(level.shape[1] % classes for level in maps):
        raise ValueError(f'{name}: {maps[0].shape[1]} class channels are no multiple of {classes} classes')
    anchors = maps[0].shape[1] // classes
    # VFNet in training returns first boxes and refined boxes, in evaluation the refined ones only.
    third = lists[2] if len(lists) > 2 else None
    boxes, extra = lists[1], third
    if third is not None and third[0].shape[1] == boxes[0].shape[1] > anchors:
        boxes, extra = third, None
    width = boxes[0].shape[1] // anchors
    with torch.autocast(maps[0].device.type, enabled=False):
        logits = rows(maps, classes)
        if is_a(head, 'TOODHead'):  # its outputs are the geometric mean of two sigmoids
            logits = tuple(level.logit(eps=1e-6) for level in logits)
        quality = None
        if extra is not None and extra[0].shape[1] == anchors:
            quality = tuple(level[..., 0] for level in rows(extra, 1))
        distances = None
        if width > 4 and width % 4 == 0 and getattr(head, 'reg_max', None) == width // 4 - 1:
            distances = tuple(level.unflatten(-1, (4, width // 4)) for level in rows(boxes, width))
        priors = _priors(head, [(level.shape[2], level.shape[3]) for level in maps], logits[0])
    decode = None
    if distances is not None or width == 4:
        # The flag of now: heads scale their outputs by it, and the dry pass sets it for a moment only.
        decode = functools.partial(_decode, head, distances or rows(boxes, 4), priors, head.training)
    return DenseView(logits, decode, distances, quality, priors, assignment,
                     bool(getattr(head, 'use_sigmoid_cls', True)), name)


def _priors(head: Any, sizes: List[Tuple[int, int]], like: Tensor) -> Rows:
    """Anchors (P, 4) or points (P, 2) of every level."""
    found = head.prior_generator.grid_priors(sizes, device=like.device)
    return tuple(_tensor(level).to(like.dtype) for level in found)


def _strides(head: Any) -> List[float]:
    return [float(stride[0] if isinstance(stride, (tuple, list)) else stride)
            for stride in head.prior_generator.strides]


def _decode(head: Any, values: Rows, priors: Rows, training: bool) -> Rows:
    """Boxes (N, P, 4) in input pixels."""
    result = []
    # FCOS with norm_on_bbox predicts in strides while it trains and in pixels otherwise.
    in_strides = training and bool(getattr(head, 'norm_on_bbox', False)) and not is_a(head, 'AutoAssignHead')
    with torch.autocast(values[0].device.type, enabled=False):
        for level, (value, prior, stride) in enumerate(zip(values, priors, _strides(head))):
            if value.dim() == 4:
                bins = torch.arange(value.shape[-1], device=value.device, dtype=value.dtype)
                result.append(around(centers(prior), value.softmax(dim=-1) @ bins * stride))
            elif is_a(head, 'TOODHead'):
                result.append(value * stride)
            elif is_a(head, 'YOLOXHead'):
                cells = torch.cat([prior[:, :2], torch.full_like(prior[:, :2], stride)], dim=-1)
                result.append(head._bbox_decode(cells, value))
            elif is_a(head, 'FoveaHead'):
                # Not the host's own function, which clips to the image and so cuts the gradient there.
                result.append(around(prior, value.exp() * float(head.base_edge_list[level])))
            else:
                value = value.clamp(min=1e-4) if is_a(head, 'FSAFHead') else value * stride if in_strides else value
                flat = head.bbox_coder.decode(prior.repeat(value.shape[0], 1), value.reshape(-1, 4))
                result.append(_tensor(flat).view_as(value))
    return tuple(result)


def assignment_tap(head: Any) -> str:
    """Name of the method of a head whose calls of a training step give the final assignment.

    Raises:
        ValueError: the head assigns in a way of its own.
    """
    # TOOD calls the image's method of its base class, past the instance, while it warms up.
    for name in ('get_targets', ) if is_a(head, 'TOODHead') else ('paa_reassign', '_get_targets_single'):
        if callable(getattr(head, name, None)):
            return name
    raise ValueError(f'{type(head).__name__} does not assign ground truth prior by prior in a method that could be '
                     'read. Use a loss that needs no assignment')


def read_assignment(head: Any, calls: Sequence[Call], sizes: Sequence[int]) -> Assignment:
    """The assignment of a training step, from the recorded calls of :func:`assignment_tap`: one an image.

    AutoAssign has no hard assignment: every point inside a box counts as positive.  FSAF's is the one before it picks
    levels by the loss.

    Args:
        head: the student's head.
        calls: of this step.
        sizes: P of every level.

    Raises:
        ValueError: a call returned something else.
    """
    if is_a(head, 'TOODHead'):
        calls = _by_image(calls)
    # DDOD assigns twice, for classes and for boxes; the classes' assignment is the one a KD weight is about.
    calls = [call for call in calls if call.kwargs.get('is_cls_assigner', True)]
    background = int(head.num_classes)
    found = [_of_image(head, call, background, sum(sizes)) for call in calls]
    if not found or any(part is None for part in found):
        raise ValueError(f'{type(head).__name__}: its target assignment is not understood (an assignment for each '
                         'prior is). Use a loss that needs no assignment')
    images = [part for part in found if part is not None]
    labels, weights = torch.stack([part[0] for part in images]), torch.stack([part[1] for part in images])
    told = all(part[2] is not None for part in images)  # which box, not only which class
    objects = torch.stack([part[2] for part in images if part[2] is not None]) if told else None
    counts = ((labels >= 0) & (labels < background)).sum(dim=1).clamp(min=1)
    split = list(sizes)
    return Assignment(
        labels.split(split, dim=1), lift(weights).split(split, dim=1), background,
        None if objects is None else objects.split(split, dim=1), distributed.mean(counts.sum().float()).clamp(min=1))


def _by_image(calls: Sequence[Call]) -> List[Call]:
    """TOOD: one call for all images, results by level (N, P_l, ...), as one call an image."""
    result: List[Call] = []
    for call in calls:
        truths = next(value for value in (*call.args, *call.kwargs.values())
                      if isinstance(value, (list, tuple)) and value and hasattr(value[0], 'labels'))
        parts = [torch.cat(list(levels), dim=1) for levels in call.output]
        result.extend(Call((truth, ), {}, tuple(part[index] for part in parts)) for index, truth in enumerate(truths))
    return result


def _of_image(head: Any, call: Call, background: int,
              total: int) -> Optional[Tuple[Tensor, Tensor, Optional[Tensor]]]:
    """Labels, weights and object indices (P,) of one image."""
    output = call.output if isinstance(call.output, (tuple, list)) else ()
    truth = next((value for value in (*call.args, *call.kwargs.values())
                  if hasattr(value, 'bboxes') and hasattr(value, 'labels')), None)
    if is_a(head, 'FoveaHead'):
        every = torch.cat([level.flatten() for level in output[0]])
        return every, torch.ones_like(every, dtype=torch.float32), None
    if is_a(head, 'AutoAssignHead'):
        return _inside(output[0], truth, background)
    if is_a(head, 'YOLOXHead'):
        return _yolox(output, truth, background)
    flat = [value for value in output if isinstance(value, Tensor) and value.shape[:1] == (total, )]
    labels = next((value for value in flat if value.dim() == 1 and not value.is_floating_point()), None)
    if labels is None:
        return None
    after = flat[next(index for index, value in enumerate(flat) if value is labels) + 1:]
    # FCOS has no weights: box targets follow its labels at once.  FSAF has one a class.
    given = bool(after) and (after[0].dim() == 1 or len(after) > 1)
    weights = after[0] if given else torch.ones_like(labels, dtype=torch.float32)
    weights = weights if weights.dim() == 1 else weights.amax(dim=1)
    return labels, weights, _objects(head, call, output, labels, background, truth, after)


def _objects(head: Any, call: Call, output: Sequence[Any], labels: Tensor, background: int, truth: Any,
             after: Sequence[Tensor]) -> Optional[Tensor]:
    """Index of the assigned box of each prior (P,), -1 for none; None where it cannot be told."""
    positive = (labels >= 0) & (labels < background)
    result = torch.full_like(labels, -1)
    if assignment_tap(head) == 'paa_reassign':
        before, boxes = call.args[4], call.args[5]
        result[before] = boxes.to(result.dtype)
        return torch.where(positive, result, torch.full_like(result, -1))
    sampled = next((value for value in output if hasattr(value, 'pos_assigned_gt_inds')), None)
    if sampled is not None:
        # Sampled indices are sorted, and taking out the anchors off the image keeps their order.
        result[positive] = sampled.pos_assigned_gt_inds.to(result.dtype)
        return result
    targets = next((value for value in after if value.dim() == 2 and value.shape[1] == 4), None)
    if truth is None or targets is None:
        return None
    if not len(truth.bboxes):
        return result
    targets = targets[positive]
    if is_a(head, 'FCOSHead'):  # distances from the points
        points = next(value for value in (*call.args, *call.kwargs.values())
                      if isinstance(value, Tensor) and value.shape == (len(labels), 2))
        targets = around(points[positive].to(targets.dtype), targets)
    result[positive] = torch.cdist(targets, _tensor(truth.bboxes).to(targets.dtype), p=1).argmin(dim=1)
    return result


def _inside(inside: Tensor, truth: Any, background: int) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """AutoAssign: (P, M), whether a point lies inside a box; the smallest box counts."""
    labels = torch.full((len(inside), ), background, device=inside.device)
    objects = torch.full_like(labels, -1)
    if inside.shape[1]:
        boxes = _tensor(truth.bboxes)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        smallest = torch.where(inside, areas, torch.full_like(areas, float('inf'))).argmin(dim=1)
        hit = inside.any(dim=1)
        objects = torch.where(hit, smallest, objects)
        labels = torch.where(hit, truth.labels[smallest], labels)
    return labels, torch.ones_like(labels, dtype=torch.float32), objects


def _yolox(output: Sequence[Any], truth: Any, background: int) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """YOLOX: which priors are positive (P,), and the classes and boxes of those."""
    positive, classes, boxes = output[0], output[1], output[3]
    labels = torch.full((len(positive), ), background, device=positive.device)
    objects = torch.full_like(labels, -1)
    if len(classes):
        objects[positive] = torch.cdist(boxes, _tensor(truth.bboxes).to(boxes.dtype), p=1).argmin(dim=1)
        labels[positive] = truth.labels[objects[positive]]
    return labels, torch.ones_like(labels, dtype=torch.float32), objects
