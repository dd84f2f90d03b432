"""The dense-head view: one form for the outputs of every anchor-based or point-based head of mmdet and MMYOLO.

Every prior (an anchor, or the point of a cell) is one row.  The rows of a level are in the order of the host's own
losses: rows of the map, columns, anchors of a cell, that is ``map.permute(0, 2, 3, 1).reshape(N, P, -1)``.  The
assignment is the one that the host has computed in this step; it is read from the recorded calls of its own method.

No host is imported: a head is used through its instance.
"""

import functools
import inspect
import itertools
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.paths import expand_paths
from kd_mm.hosts.table import nearest
from kd_mm.ops.boxes import _tensor, around, centers
from kd_mm.types.dense import Assignment, DenseView, Rows, rows


def is_a(head: nn.Module, name: str) -> bool:
    """Whether a class of this name is among a head's base classes."""
    return any(cls.__name__ == name for cls in type(head).__mro__)


def _main(part: Any) -> Any:
    """Levels without the auxiliary branch, which some heads (YOLOv7 P6) return beside the main one in training."""
    levels = part if isinstance(part, (list, tuple)) else ()
    return [level[0] if isinstance(level, (list, tuple)) and level else level for level in levels]


def _maps(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(
        isinstance(item, Tensor) and item.dim() == 4 for item in value)


def class_count(head: Any) -> Any:
    """Class logits of one prior; something else than a number for what is no dense head."""
    # MMYOLO's heads hold their layers in a module of their own, and every class is a sigmoid.
    own = hasattr(head, 'head_module') and hasattr(head, 'prior_generator')
    return getattr(head, 'cls_out_channels', getattr(head, 'num_classes', None) if own else None)


def box_paths(head: Any) -> List[str]:
    """Paths below a head that must be recorded besides its outputs: its box numbers, where it returns others."""
    return [path for pattern in nearest(head, 'boxes') or () for path in expand_paths(head, pattern)]


def dense_view(head: Any, output: Any, assignment: Optional[Assignment] = None,
               numbers: Sequence[Tensor] = ()) -> DenseView:
    """The view of one forward pass of a dense head.

    Args:
        head: an mmdet dense head (RetinaNet, FCOS, ATSS, GFL, PAA, TOOD, RTMDet, YOLOX, VFNet, DDOD, FSAF, FoveaBox,
            AutoAssign, YOLOF, RTMDet-Ins, CondInst and heads built like one of them), or one of MMYOLO.
        output: what its ``forward`` returned: two or three lists of maps, one map a level; what comes after is left.
        assignment: see :func:`read_assignment`.
        numbers: what :func:`box_paths` gave, one map a level; without it a head that has such paths is seen without its
            distributions.

    Raises:
        ValueError: this is no dense head, or its outputs are not understood.

    Example::

        view = dense_view(model.bbox_head, model.bbox_head(features))
        scores = view.logits[0].sigmoid()
    """
    name = type(head).__name__
    classes = class_count(head)
    # Instance heads give their mask features, which are no levels, after the maps (RTMDet-Ins).
    lists = list(itertools.takewhile(_maps, map(_main, output))) if isinstance(output, (list, tuple)) else []
    if not isinstance(classes, int) or len(lists) < 2:
        raise ValueError(f'{name} is not a dense head that gives maps of class scores and boxes. Point `at` to one '
                         "(bbox_head of a one-stage detector, rpn_head of a two-stage one)")
    maps = lists[0]
    if any(level.shape[1] % classes for level in maps):
        raise ValueError(f'{name}: {maps[0].shape[1]} class channels are no multiple of {classes} classes')
    anchors = maps[0].shape[1] // classes
    # VFNet in training returns first boxes and refined boxes, in evaluation the refined ones only.
    third = lists[2] if len(lists) > 2 and lists[2][0].shape[2:] == maps[0].shape[2:] else None
    boxes, extra = lists[1], third
    if numbers:
        boxes, extra = list(numbers), None
    turned = is_rotated(head)
    if turned:  # the angle comes after the boxes, where they do not hold it themselves
        extra = lists[3] if len(lists) > 3 else None
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
        if width > 4 and width % 4 == 0 and (numbers or getattr(head, 'reg_max', None) == width // 4 - 1):
            distances = tuple(level.unflatten(-1, (4, width // 4)) for level in rows(boxes, width))
        if turned and third is not None and has_angle_bins(head):
            count = third[0].shape[1] // anchors
            distances = tuple(level[:, :, None] for level in rows(third, count))
        priors = _priors(head, [(level.shape[2], level.shape[3]) for level in maps], logits[0])
    decode = None
    if not turned and (distances is not None or width == 4):
        # The flag of now: heads scale their outputs by it, and the dry pass sets it for a moment only.
        decode = functools.partial(_decode, head, distances or rows(boxes, 4), priors, head.training)
    return DenseView(logits, decode, distances, quality, priors, assignment,
                     bool(getattr(head, 'use_sigmoid_cls', True)), name,
                     None if distances is None else _measured(head, distances[0].shape[2] == 1))


def is_rotated(head: Any) -> bool:
    """Whether a head predicts rotated boxes, whose numbers are no (x1, y1, x2, y2)."""
    return hasattr(head, 'angle_coder') or getattr(getattr(head, 'bbox_coder', None), 'encode_size', 4) == 5


def has_angle_bins(head: Any) -> bool:
    """Whether a head predicts the angle as a distribution over bins; phases (PSC) and plain angles are none."""
    return type(getattr(head, 'angle_coder', None)).__name__ == 'CSLCoder'


def _measured(head: Any, angle: bool) -> Optional[str]:
    """From where the bins of a head's distributions count, in words."""
    if angle:
        start = -head.angle_coder.angle_offset
        return f'angles from {start} to {start + head.angle_coder.angle_range} degrees'
    generator = head.prior_generator
    place = getattr(generator, 'offset', getattr(generator, 'center_offset', None))
    return None if place is None else f'distances from the points at {float(place):g} of a cell'


def _priors(head: Any, sizes: List[Tuple[int, int]], like: Tensor) -> Rows:
    """Anchors (P, 4) or points (P, 2) of every level; of rotated anchors their centres."""
    found = [_tensor(level).to(like.dtype) for level in head.prior_generator.grid_priors(sizes, device=like.device)]
    return tuple(level[:, :2] if level.shape[-1] == 5 else level for level in found)


def _strides(head: Any) -> List[float]:
    return [float(stride[0] if isinstance(stride, (tuple, list)) else stride)
            for stride in head.prior_generator.strides]


def _takes_stride(head: Any) -> bool:
    """Whether the coder of a head decodes numbers in strides, as those of MMYOLO."""
    coder = getattr(head, 'bbox_coder', None)
    return coder is not None and 'stride' in inspect.signature(coder.decode).parameters


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
            elif _takes_stride(head):
                result.append(head.bbox_coder.decode(prior, value, value.new_full((len(prior), ), stride)))
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
