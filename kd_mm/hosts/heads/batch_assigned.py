"""Assigners that take a whole batch, as those of MMYOLO: their results as :class:`kd_mm.types.dense.Assignment`."""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from kd_mm.ops import distributed
from kd_mm.types.dense import Assignment
from kd_mm.types.records import Call


def assignment_of(labels: Tensor, weights: Tensor, background: int, objects: Optional[Tensor],
                  sizes: Sequence[int]) -> Assignment:
    """The assignment of a batch from flat rows (N, P), split into levels of ``sizes`` rows."""
    counts = ((labels >= 0) & (labels < background)).sum(dim=1).clamp(min=1)
    split = list(sizes)
    return Assignment(labels.split(split, dim=1), weights.split(split, dim=1), background,
                      None if objects is None else objects.split(split, dim=1),
                      distributed.mean(counts.sum().float()).clamp(min=1))


def assigned_batch(head: Any, call: Call, sizes: Sequence[int]) -> Assignment:
    """The assignment of a batch from the dict that an assigner returned.

    Args:
        head: of the student.
        call: of its assigner.
        sizes: P of every level.

    Raises:
        ValueError: the dict is of no known kind.
    """
    background, output = int(head.num_classes), call.output
    if 'mlvl_positive_infos' in output:  # YOLOv7
        labels, objects = _by_cell(call, background), None
    elif 'assigned_labels' in output:
        labels = output['assigned_labels'].long()
        positive = output.get('fg_mask_pre_prior')
        if positive is not None:  # task-aligned ones name a class for every prior
            labels = torch.where(positive.bool(), labels, torch.full_like(labels, background))
        objects = _nearest(output['assigned_bboxes'], call.args[4], labels < background)
    else:
        raise ValueError(f'{type(head).__name__}: its assigner returns {", ".join(output)}, which is not understood. '
                         'Use a loss that needs no assignment')
    if labels.shape[1] != sum(sizes):
        raise ValueError(f'{type(head).__name__}: its assigner tells of {labels.shape[1]} priors, and its maps have '
                         f'{sum(sizes)}. Use a loss that needs no assignment')
    weights = output.get('assigned_labels_weights')
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.float()
    return assignment_of(labels, weights, background, objects, sizes)


def _nearest(assigned: Tensor, truth: Tensor, positive: Tensor) -> Tensor:
    """Index of the assigned box of each prior (N, P), -1 for none.

    Args:
        assigned: the boxes that priors got (N, P, 4).
        truth: all boxes of the images (N, M, 4), filled up with zeros at the end.
        positive: (N, P).
    """
    result = torch.full(positive.shape, -1, dtype=torch.long, device=positive.device)
    if truth.shape[1]:
        closest = torch.cdist(assigned.float(), truth.float(), p=1).argmin(dim=2)
        result = torch.where(positive, closest, result)
    return result


def _by_cell(call: Call, background: int) -> Tensor:
    """Labels (N, P) from the cells (image, anchor, x, y) that YOLOv7's assigner chose in every level."""
    levels = []
    for level, predicted in enumerate(call.args[0]):  # (N, A, H, W, 5 + K)
        images, anchors, height, width = predicted.shape[:4]
        labels = predicted.new_full((images, height * width * anchors), background, dtype=torch.long)
        cells = call.output['mlvl_positive_infos'][level].long()
        if len(cells):
            image, anchor, x, y = cells.T
            labels[image, (y * width + x) * anchors + anchor] = call.output['mlvl_targets_normed'][level][:, 1].long()
        levels.append(labels)
    return torch.cat(levels, dim=1)
