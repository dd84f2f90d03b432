"""What a head of the hosts has assigned in a training step: which ground truth to which prior.

It is read from the recorded calls of the head's own method or assigner; nothing is assigned a second time.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.heads.batch_assigned import assigned_batch, assignment_of
from kd_mm.hosts.heads.dense import is_a
from kd_mm.ops.boxes import _tensor, around
from kd_mm.ops.functional import lift
from kd_mm.types.dense import Assignment
from kd_mm.types.records import Call


def assignment_taps(head: Any) -> List[str]:
    """Names of what a head calls in a training step to assign: methods, or modules of which one is called.

    Raises:
        ValueError: the head assigns in a way of its own.
    """
    # TOOD calls the image's method of its base class, past the instance, while it warms up.
    for name in ('get_targets', ) if is_a(head, 'TOODHead') else ('paa_reassign', '_get_targets_single'):
        if callable(getattr(head, name, None)):
            return [name]
    # MMYOLO's assign whole batches; some have an assigner of their own for the first epochs.
    modules = [name for name in ('initial_assigner', 'assigner') if isinstance(getattr(head, name, None), nn.Module)]
    if modules:
        return modules
    raise ValueError(f'{type(head).__name__} does not assign ground truth prior by prior in a method that could be '
                     'read. Use a loss that needs no assignment')


def read_assignment(head: Any, calls: Sequence[Call], sizes: Sequence[int]) -> Assignment:
    """The assignment of a training step, from the recorded calls of :func:`assignment_taps`: one an image, or one for
    the batch.

    AutoAssign has no hard assignment: every point inside a box counts as positive.  FSAF's is the one before it picks
    levels by the loss.

    Args:
        head: the student's head.
        calls: of this step.
        sizes: P of every level.

    Raises:
        ValueError: a call returned something else.
    """
    if calls and isinstance(calls[0].output, dict):
        return assigned_batch(head, calls[0], sizes)
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
    return assignment_of(labels, lift(weights), background, objects, sizes)


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
    if assignment_taps(head) == ['paa_reassign']:
        before, boxes = call.args[4], call.args[5]
        result[before] = boxes.to(result.dtype)
        return torch.where(positive, result, torch.full_like(result, -1))
    sampled = next((value for value in output if hasattr(value, 'pos_assigned_gt_inds')), None)
    if sampled is not None:
        # Sampled indices are sorted, and taking out the anchors off the image keeps their order.
        result[positive] = sampled.pos_assigned_gt_inds.to(result.dtype)
        return result
    targets = next((value for value in after if value.dim() == 2 and value.shape[1] == 4), None)
    if truth is None or targets is None or _tensor(truth.bboxes).shape[-1] != 4:
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
        labels[positive] = truth.labels[objects[positive]].to(labels.dtype)
    return labels, torch.ones_like(labels, dtype=torch.float32), objects
