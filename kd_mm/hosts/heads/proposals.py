"""The RoI-head view: what two heads say about the same proposals.

A second stage predicts for proposals, and each model has its own: row 7 refers to a different box in each model.  Both
heads are therefore run on the same proposals, by default on those that the host has sampled for the student in this
step.  The student's predictions, labels and targets are read from the recorded calls of its own head.  The teacher's
RoI head runs once, without gradient, on the features of the teacher's pass.  Both models see the same pixels, so a
proposal is the same place in both, whatever the strides.

The rows of the first stage are the anchors that the host has sampled; nothing runs again.

Nothing of mmdet is imported: a head is used through its instance.
"""

import inspect
from dataclasses import replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_mm.hosts.heads.dense import is_a
from kd_mm.ops.boxes import _tensor
from kd_mm.ops.functional import lift
from kd_mm.types.dense import rows
from kd_mm.types.proposals import RoIView
from kd_mm.types.records import Call, Recorded

Records = Mapping[str, Recorded]


def roi_head(model: nn.Module, side: str) -> Any:
    """The second stage of a detector.

    Raises:
        ValueError: there is none, or it needs more than features and proposals.
    """
    head = getattr(model, 'roi_head', None)
    forward = getattr(type(head), '_bbox_forward', None)
    if not isinstance(head, nn.Module) or forward is None:
        raise ValueError(f'{side} {type(model).__name__} has no RoI head: both models must be two-stage detectors')
    if list(inspect.signature(forward).parameters)[1:] not in (['x', 'rois'], ['stage', 'x', 'rois']):
        raise ValueError(f'{side}: {type(head).__name__} needs more than features and proposals; StandardRoIHead, '
                         'CascadeRoIHead and heads that run like one of them are possible')
    return head


def _staged(head: Any) -> bool:
    return isinstance(head.bbox_head, nn.ModuleList)


def stage_pairs(place: str, student: nn.Module, teacher: nn.Module, student_stages: Optional[Sequence[int]],
                teacher_stages: Optional[Sequence[int]], proposals: str) -> List[Tuple[int, int]]:
    """Which stage of the student's head meets which of the teacher's: by number, as far as both have one.

    The proposals of stage i have been refined i times, as stage i of the teacher expects.

    Args:
        student_stages, teacher_stages: other ones, by index; may be negative.

    Raises:
        ValueError: no such stage, or lists of different lengths.
    """
    if place.startswith('@rpn'):
        if student_stages is not None or teacher_stages is not None:
            raise ValueError(f'{place!r} is one list of rows; remove levels')
        return [(0, 0)]
    counts = [len(head.bbox_head) if _staged(head) else 1 for head in (roi_head(student, 'student'),
                                                                      roi_head(teacher, 'teacher'))]
    both = list(range(1 if proposals == 'teacher' else min(counts)))
    sides = []
    for side, count, stages in (('student', counts[0], student_stages), ('teacher', counts[1], teacher_stages)):
        found = both if stages is None else list(stages)
        if any(not -count <= stage < count for stage in found):
            raise ValueError(f'levels={found}: the RoI head of the {side} has {count} stage(s)')
        sides.append([stage % count for stage in found])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f'{len(sides[0])} stages of the student and {len(sides[1])} of the teacher: give levels='
                         'dict(student=[...], teacher=[...]) of one length')
    if proposals == 'teacher' and any(sides[0]):
        raise ValueError("proposals='teacher' are those of its first stage: the student's first stage takes them")
    return list(zip(*sides))


def proposal_taps(place: str, side: str, model: nn.Module, proposals: str = 'student') -> List[str]:
    """Paths of one model to record, with their calls, for a place of :data:`kd_mm.hosts.places.SHARED`.

    The student's are those of a training step.

    Raises:
        ValueError: the model has no such place.
    """
    first: Any = getattr(model, 'rpn_head', None)
    if place.startswith('@rpn'):
        if not is_a(first, 'RPNHead'):
            raise ValueError(f'{side} {type(model).__name__} has no RPNHead, whose sampled anchors {place!r} are')
        return ['rpn_head', 'rpn_head._get_targets_single'] if side == 'student' else ['rpn_head']
    head = roi_head(model, side)
    if place == '@roi_masks' and not head.with_mask:
        raise ValueError(f'{side}: {type(head).__name__} has no mask head')
    if proposals == 'teacher':
        if not is_a(first, 'RPNHead'):
            raise ValueError(f"proposals='teacher' needs an RPNHead in both models; {side} {type(model).__name__} has "
                             'none')
        return ['roi_head.loss'] if side == 'student' else ['extract_feat', 'rpn_head']
    if side == 'teacher':
        return ['extract_feat']
    stages = range(len(head.bbox_head)) if _staged(head) else None
    heads = ['bbox_head'] if stages is None else [f'bbox_head.{stage}' for stage in stages]
    return ['roi_head._bbox_forward', *(f'roi_head.{name}.get_targets' for name in heads),
            *(['roi_head._mask_forward'] if place == '@roi_masks' else [])]


def roi_views(place: str, student: Records, teacher: Records, pairs: Sequence[Tuple[int, int]],
              proposals: str = 'student') -> List[Tuple[RoIView, RoIView]]:
    """The views of both heads of a step, one pair a stage.

    The records remember what was made of them: several losses ask the teacher's head once.

    Args:
        place: one of the second stage.
        student, teacher: what was recorded at :func:`proposal_taps`.
        pairs: see :func:`stage_pairs`.
        proposals: see :data:`PROPOSALS`.
    """
    masks = place == '@roi_masks'
    memo = teacher['extract_feat'].memo
    counts = [len(_features(record)[0]) for record in (
        student['roi_head._bbox_forward' if proposals == 'student' else 'roi_head.loss'], teacher['extract_feat'])]
    if counts[0] != counts[1]:
        raise ValueError(f'the RoI head of the student sees {counts[0]} images and the teacher {counts[1]}')
    result = []
    for stage, other in pairs:
        key = (proposals, stage, other)
        if key not in memo:
            if proposals == 'student':
                own_view = _recorded_view(student, stage)
            else:
                own_view = _student_on(_teacher_proposals(student['roi_head.loss'], teacher['rpn_head']),
                                       student['roi_head.loss'])
            memo[key] = own_view, _teacher_on(own_view, teacher['extract_feat'], other)
        ours, theirs = memo[key]
        if masks and ours.masks is None:
            ours = replace(ours, masks=_recorded_masks(student, ours, stage) if proposals == 'student' else
                           _ask(student['roi_head.loss'].owner, '_mask_forward', _features(student['roi_head.loss']),
                                ours.rois[ours.positive], stage)['mask_preds'])
            with torch.no_grad():
                found = _ask(teacher['extract_feat'].owner.roi_head, '_mask_forward', _features(
                    teacher['extract_feat']), ours.rois[ours.positive], other)
            theirs = replace(theirs, masks=found['mask_preds'])
            memo[key] = ours, theirs
        result.append((ours, theirs))
    return result


def _features(record: Recorded) -> Any:
    """The levels that an RoI head takes: the output of ``extract_feat``, or an argument of the head's own methods."""
    call = record.calls[-1]
    if not isinstance(call.output, dict):
        return call.output
    return next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, (tuple, list)))


def _ask(head: Any, method: str, features: Any, rois: Tensor, stage: int) -> Dict[str, Any]:
    """Run a part of an RoI head on given proposals."""
    arguments = (features, rois)
    return getattr(head, method)(*((stage, *arguments) if _staged(head) else arguments))


def _head_of(head: Any, stage: int) -> Any:
    return head.bbox_head[stage] if _staged(head) else head.bbox_head


def _last(record: Recorded, stage: int, staged: bool, rows_of: str) -> Call:
    """The call of a stage that the host's loss has used: hard mining calls the head once before."""
    found = [call for call in record.calls if not staged or call.args[0] == stage]
    if not found:
        raise ValueError(f'stage {stage} of the RoI head did not run ({rows_of})')
    return found[-1]


def _view(head: Any, found: Mapping[str, Any], stage: int, like: RoIView) -> RoIView:
    """``like`` with the predictions of a head."""
    box_head, logits, deltas = _head_of(head, stage), found['cls_score'], found['bbox_pred']
    name, background = f'{type(head).__name__} ({type(box_head).__name__})', int(box_head.num_classes)
    if not isinstance(logits, Tensor) or logits.shape != (len(like), background + 1):
        raise ValueError(f'{name} gives class scores {_shape(logits)} for {len(like)} proposals: not one softmax over '
                         f'its {background} classes and the background. Use a feature loss')
    deltas = lift(deltas) if isinstance(deltas, Tensor) and deltas.shape[1] in (4, 4 * background) else None
    return replace(like, logits=lift(logits), deltas=deltas, features=found['bbox_feats'], coder=box_head.bbox_coder,
                   background=background, name=name)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _recorded_view(student: Records, stage: int) -> RoIView:
    """The student's own call of this step, with the host's labels and targets."""
    record = student['roi_head._bbox_forward']
    head, staged = record.owner, _staged(record.owner)
    call = _last(record, stage, staged, 'class scores')
    rois = call.kwargs.get('rois', call.args[-1])
    box_head = _head_of(head, stage)
    labels, weights, targets, _ = student[
        f'roi_head.bbox_head.{stage}.get_targets' if staged else 'roi_head.bbox_head.get_targets'].calls[-1].output[:4]
    if rois.shape[1] != 5 or len(labels) != len(rois):
        raise ValueError(f'{type(head).__name__}: {len(labels)} labels for proposals {tuple(rois.shape)} are not '
                         'understood')
    if getattr(box_head, 'reg_decoded_bbox', False) and isinstance(targets, Tensor):
        targets = _encoded(box_head.bbox_coder, rois[:, 1:], targets, labels < box_head.num_classes)
    return _view(head, call.output, stage, RoIView(
        rois.detach(), labels, lift(weights), 0,
        targets=lift(targets) if isinstance(targets, Tensor) and targets.dim() == 2 else None))


def _encoded(coder: Any, boxes: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Targets in pixels as deltas, 0 where there is no object."""
    result = torch.zeros_like(targets)
    result[positive] = coder.encode(boxes[positive], targets[positive]).to(targets.dtype)
    return result


def _recorded_masks(student: Records, view: RoIView, stage: int) -> Tensor:
    """The student's own mask logits of this step: of the positive rows, image by image, as the host orders both."""
    record = student['roi_head._mask_forward']
    masks = _last(record, stage, _staged(record.owner), 'masks').output['mask_preds']
    if len(masks) != int(view.positive.sum()):
        raise ValueError(f'{view.name}: {len(masks)} masks for {int(view.positive.sum())} positive proposals')
    return masks


@torch.no_grad()
def _teacher_on(view: RoIView, record: Recorded, stage: int) -> RoIView:
    """What the teacher's head says about the proposals of a view; its own class count, the student's labels."""
    head = roi_head(record.owner, 'teacher')
    return _view(head, _ask(head, '_bbox_forward', _features(record), view.rois, stage), stage, view)


def _student_on(view: RoIView, record: Recorded) -> RoIView:
    """What the student's head says about other proposals than its own: it runs once more."""
    return _view(record.owner, _ask(record.owner, '_bbox_forward', _features(record), view.rois, 0), 0, view)


@torch.no_grad()
def _teacher_proposals(loss: Recorded, rpn: Recorded) -> RoIView:
    """The teacher's proposals, chosen and labelled by the student's own rules.

    As the host's sampler takes them, but the best ones instead of random ones, so that nothing is drawn: the ground
    truth and then the proposals by the teacher's score, positives up to their share, the rest background.
    """
    head, call = loss.owner, loss.calls[-1]
    samples = call.kwargs.get('batch_data_samples', call.args[-1])
    rpn_head = rpn.owner
    model_cfg = getattr(rpn_head, 'test_cfg', None)
    found = rpn_head.predict_by_feat(*rpn.calls[-1].output, batch_img_metas=[sample.metainfo for sample in samples],
                                     cfg=model_cfg, rescale=False)
    staged = _staged(head)
    assigner, sampler = (part[0] if staged else part for part in (head.bbox_assigner, head.bbox_sampler))
    box_head = _head_of(head, 0)
    parts: List[Tuple[Tensor, Tensor, Tensor]] = []
    for image, (result, sample) in enumerate(zip(found, samples)):
        truth = sample.gt_instances
        truth_boxes = _tensor(truth.bboxes)
        proposals = _tensor(result.bboxes).to(truth_boxes)
        if sampler.add_gt_as_proposals:
            proposals = torch.cat([truth_boxes, proposals])
        assigned = assigner.assign(InstanceData(priors=proposals), truth, sample.get('ignored_instances')).gt_inds
        positive = (assigned > 0).nonzero()[:, 0][:int(sampler.num * sampler.pos_fraction)]
        negative = (assigned == 0).nonzero()[:, 0][:sampler.num - len(positive)]
        kept = torch.cat([positive, negative])
        owners = assigned[kept] - 1
        labels = torch.full_like(owners, int(box_head.num_classes))
        targets = proposals.new_zeros(len(kept), 4)
        hit = owners >= 0
        labels[hit] = truth.labels[owners[hit]]
        targets[hit] = box_head.bbox_coder.encode(proposals[kept][hit], truth_boxes[owners[hit]]).to(targets)
        rois = torch.cat([proposals.new_full((len(kept), 1), float(image)), proposals[kept]], dim=1)
        parts.append((rois, labels, targets))
    rois, labels, targets = (torch.cat(column) for column in zip(*parts))
    return RoIView(rois, labels, torch.ones_like(targets[:, 0]), int(box_head.num_classes), targets=targets)


def rpn_views(student: Records, teacher: Records) -> Tuple[RoIView, RoIView]:
    """The anchors that the host has sampled in this step, in both proposal heads; nothing runs.

    Objectness becomes two logits, object and background, whose softmax is the head's sigmoid.

    Raises:
        ValueError: the anchors are not the same.
    """
    head = student['rpn_head'].owner
    own_scores, own_deltas = _anchor_rows(head, student['rpn_head'])
    their_scores, their_deltas = _anchor_rows(teacher['rpn_head'].owner, teacher['rpn_head'])
    if own_scores.shape != their_scores.shape:
        raise ValueError(f'student and teacher have {own_scores.shape[1]} and {their_scores.shape[1]} anchors an '
                         'image; both need the same strides and anchors')
    outputs = [call.output[:4] for call in student['rpn_head._get_targets_single'].calls]
    labels, weights, targets = (torch.stack([output[index] for output in outputs]) for index in range(3))
    sizes = [(level.shape[2], level.shape[3]) for level in student['rpn_head'].calls[-1].output[0]]
    anchors = torch.cat([_tensor(level) for level in head.prior_generator.grid_priors(sizes, device=labels.device)])
    kept = weights > 0
    image, row = kept.nonzero(as_tuple=True)
    rois = torch.cat([image[:, None].to(anchors.dtype), anchors[row]], dim=1)
    targets = targets[kept]
    if getattr(head, 'reg_decoded_bbox', False):
        targets = _encoded(head.bbox_coder, rois[:, 1:], targets, labels[kept] < head.num_classes)
    view = RoIView(rois, labels[kept], lift(weights[kept]), 1, own_scores[kept], own_deltas[kept], lift(targets),
                   coder=head.bbox_coder, name=type(head).__name__)
    other = teacher['rpn_head'].owner
    return view, replace(view, logits=their_scores[kept].detach(), deltas=their_deltas[kept].detach(),
                         coder=other.bbox_coder, name=type(other).__name__)


def _anchor_rows(head: Any, record: Recorded) -> Tuple[Tensor, Tensor]:
    """(N, P, 2) and (N, P, 4) of all anchors."""
    if len(record.calls) != 1:
        raise ValueError(f'{type(head).__name__} ran {len(record.calls)} times in one step')
    scores, deltas = record.calls[0].output[:2]
    logits = torch.cat(rows(scores, int(head.cls_out_channels)), dim=1)
    if logits.shape[2] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=2)
    return logits, torch.cat(rows(deltas, 4), dim=1)


def same_anchors(student: Any, teacher: Any) -> bool:
    """Whether two proposal heads have the same anchors."""
    ours, theirs = (head.prior_generator for head in (student, teacher))
    return (list(ours.strides) == list(theirs.strides) and len(ours.base_anchors) == len(theirs.base_anchors)
            and all(first.shape == second.shape and torch.equal(first.cpu(), second.cpu())
                    for first, second in zip(ours.base_anchors, theirs.base_anchors)))
