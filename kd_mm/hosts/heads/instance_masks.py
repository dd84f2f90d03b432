"""Masks of one-stage instance segmentors: what two heads make of the same priors.

Such a head has no mask for a class.  For each prior (a point, or a cell of SOLOv2's grid) it predicts a kernel, and
the kernel makes the mask of one object from the image's mask features.  Kernels and mask features of two models mean
nothing to each other, since each model has learned a space of its own; the masks that they make mean the same.

The student's masks are those of the priors that the host has made positive in this step.  The teacher's kernels at the
same priors make the masks that are compared, without gradient, on the teacher's own mask features.

Nothing of mmdet is imported: a head is used through its instance.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_mm.ops.functional import lift
from kd_mm.types.records import Recorded

Records = Mapping[str, Recorded]
#: Where the positive priors of a step are, in the form of the kind of head.
Where = Any


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """L maps (N, C, H, W) as rows (N, P, C), in the order of the priors."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)


def _priors(head: Any, maps: Sequence[Tensor]) -> Tensor:
    """(P, 4): x, y and stride (twice) of every prior."""
    found = head.prior_generator.grid_priors([tuple(level.shape[-2:]) for level in maps], device=maps[0].device,
                                             with_stride=True)
    return torch.cat(list(found)).to(maps[0].dtype)


def _indices(wanted: Tensor, priors: Tensor, head: Any) -> Tensor:
    """Which of ``priors`` (P, 4) are ``wanted`` (M, 3): x, y, stride.

    Raises:
        ValueError: one is missing.
    """
    same = (wanted[:, None].to(priors) == priors[None, :, :3]).all(dim=2)
    if not bool(same.any(dim=1).all()):
        raise ValueError(f'the teacher {type(head).__name__} has no priors at the places of the student\'s: the heads '
                         'must have the same strides')
    return same.to(torch.uint8).argmax(dim=1)


# ------------------------------------------------------------------ RTMDet-Ins


def _rtmdet_student(records: Records) -> Tuple[List[Tensor], Where]:
    calls = records['bbox_head._mask_predict_by_feat_single'].calls
    return [call.output for call in calls], [call.args[2][:, :3] for call in calls]


def _rtmdet_teacher(records: Records, where: Where) -> List[Tensor]:
    record = records['bbox_head']
    head: Any = record.owner
    scores, _, kernels, features = record.calls[-1].output
    priors, rows = _priors(head, scores), _flat(kernels)
    result = []
    for image, wanted in enumerate(where):
        chosen = _indices(wanted, priors, head)
        result.append(head._mask_predict_by_feat_single(features[image], rows[image, chosen], priors[chosen]))
    return result


# ------------------------------------------------------------------ CondInst


def _condinst_student(records: Records) -> Tuple[List[Tensor], Where]:
    call = records['mask_head'].calls[-1]
    infos = call.kwargs.get('positive_infos', call.args[-1])
    return list(call.output[0]), [torch.cat([info.points, info.strides[:, None].to(info.points)], dim=1)
                                  for info in infos]


def _condinst_teacher(records: Records, where: Where) -> List[Tensor]:
    record = records['bbox_head']
    head: Any = record.owner
    model: Any = records['extract_feat'].owner
    scores, _, _, kernels = record.calls[-1].output
    priors, rows, infos = _priors(head, scores), _flat(kernels), []
    for image, wanted in enumerate(where):
        chosen = _indices(wanted, priors, head)
        infos.append(InstanceData(param_preds=rows[image, chosen], points=priors[chosen, :2],
                                  strides=priors[chosen, 2]))
    return list(model.mask_head(records['extract_feat'].calls[-1].output, infos)[0])


# ------------------------------------------------------------------ SOLOv2


def _solo_masks(record: Recorded, where: Where) -> List[Tensor]:
    """As the host's loss makes them, which keeps them to itself."""
    head: Any = record.owner
    kernels, _, features = record.calls[-1].output
    grids = [tuple(level.shape[-2:]) for level in kernels]
    if grids != where[0]:
        raise ValueError(f'the grids of the teacher {type(head).__name__} are {grids} and those of the student '
                         f'{where[0]}: the heads must have the same')
    size, result = int(head.dynamic_conv_size), []
    for image, levels in enumerate(where[1]):
        rows = torch.cat([level[image].flatten(1)[:, list(chosen)].t() for level, chosen in zip(kernels, levels)])
        if len(rows):
            weight = rows.reshape(len(rows), -1, size, size)
            result.append(nn.functional.conv2d(features[[image]], weight)[0])
        else:
            result.append(features[image, :1].expand(-1, *features.shape[-2:])[:0])
    return result


def _solo_student(records: Records) -> Tuple[List[Tensor], Where]:
    record = records['mask_head']
    calls = records['mask_head._get_targets_single'].calls
    grids = [tuple(level.shape[-2:]) for level in record.calls[-1].output[0]]
    where = grids, [call.output[3] for call in calls]
    return _solo_masks(record, where), where


# ------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Kind:
    """How one kind of head says its masks.

    Attributes:
        student, teacher: paths to tap in a training step of the one that learns, in a plain pass of the other.
        own: what the one that learns said: masks (M, h, w) of every image, and where their priors are.
        asked: the masks of the other one at these priors.
    """

    student: Tuple[str, ...]
    teacher: Tuple[str, ...]
    own: Callable[[Records], Tuple[List[Tensor], Where]]
    asked: Callable[[Records, Where], List[Tensor]]


#: Class of the head that makes the masks (or of a base of it) -> how.
KINDS: Dict[str, Kind] = {
    'RTMDetInsHead': Kind(('bbox_head._mask_predict_by_feat_single', ), ('bbox_head', ), _rtmdet_student,
                          _rtmdet_teacher),
    'CondInstMaskHead': Kind(('mask_head', ), ('extract_feat', 'bbox_head'), _condinst_student, _condinst_teacher),
    'SOLOV2Head': Kind(('mask_head', 'mask_head._get_targets_single'), ('mask_head', ), _solo_student,
                       lambda records, where: _solo_masks(records['mask_head'], where)),
}
#: What to write for a model whose masks are somewhere else: class of its head -> a sentence.
OTHERS = {
    'SOLOHead': "It has a map for each cell of its grids: tap 'mask_head.conv_mask_list.*'",
    'BaseMaskRCNN': "For its masks write at='@roi_masks'",
    'MaskFormerHead': "Its masks belong to queries: use MaskQueryLoss at='panoptic_head'",
}


def _named(model: nn.Module, table: Mapping[str, Any]) -> Any:
    for name in ('mask_head', 'bbox_head', 'panoptic_head'):
        for cls in type(getattr(model, name, None)).__mro__:
            if cls.__name__ in table:
                return cls.__name__
    return None


def kind_of(model: nn.Module, side: str) -> str:
    """The line of :data:`KINDS` for a model.

    Raises:
        ValueError: there is none; the message says where its masks are, if that is known.

    Example:
        >>> kind_of(nn.Linear(1, 1), 'student')  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: student Linear makes no masks from kernels
    """
    found = _named(model, KINDS)
    if found is not None:
        return found
    other = OTHERS.get(_named(model, OTHERS) or '', '')
    if not other and getattr(getattr(model, 'roi_head', None), 'with_mask', False):
        other = OTHERS['BaseMaskRCNN']
    raise ValueError(f"{side} {type(model).__name__} makes no masks from kernels ('@instance_masks'), as RTMDet-Ins, "
                     f"CondInst and SOLOv2 do. {other or 'Tap maps, such as @neck'}")


def instance_mask_taps(side: str, model: nn.Module) -> List[str]:
    """Paths of one model to record, with their calls; the student's are those of a training step.

    Raises:
        ValueError: see :func:`kind_of`.
    """
    kind = KINDS[kind_of(model, side)]
    return list(kind.student if side == 'student' else kind.teacher)


def instance_masks(kind: str, student: Records, teacher: Records) -> Tuple[Tensor, Tensor]:
    """Mask logits (M, 1, h, w) of both models at the student's positive priors, image by image.

    Masks of another size are resized (bilinear) to the student's.  The records remember the result, so that several
    losses ask the teacher once.

    Args:
        kind: of both heads, see :func:`kind_of`.
        student, teacher: what was recorded at :func:`instance_mask_taps`.

    Raises:
        ValueError: the priors of both heads differ.
    """
    memo = teacher[KINDS[kind].teacher[-1]].memo
    if '@instance_masks' not in memo:
        own, where = KINDS[kind].own(student)
        with torch.no_grad():
            theirs = KINDS[kind].asked(teacher, where)
        memo['@instance_masks'] = _joined(own), _joined(theirs)
    ours, others = memo['@instance_masks']
    if others.shape[2:] != ours.shape[2:]:
        others = nn.functional.interpolate(others, size=tuple(ours.shape[2:]), mode='bilinear', align_corners=False)
    return ours, others


def _joined(images: Sequence[Tensor]) -> Tensor:
    """(M, 1, h, w), of images that may have none."""
    # CondInst gives none of another size than some.
    size = next((masks.shape[-2:] for masks in images if len(masks)), images[0].shape[-2:])
    return lift(torch.cat([masks.reshape(len(masks), *size) for masks in images]))[:, None]
