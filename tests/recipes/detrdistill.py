"""DETRDistill: matched logits, target-aware features, query-prior assignment."""

from typing import Any, List

import torch
from torch import Tensor

from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.query import QueryAssignment, QueryView
from recipes.heads import EPS
from recipes.vector import Vector, recipe


def batch_of(v: Vector) -> KDBatch:
    """Targets of the file; boxes are in pixels of the images themselves."""
    batch = v.batch()
    batch.targets.input_shape = tuple(map(max, zip(*(batch.targets.img_shapes or []))))  # type: ignore[assignment]
    return batch


def gradients(v: Vector, total: Tensor, inputs: List[Tensor]) -> None:
    for index, grad in enumerate(torch.autograd.grad(total, inputs)):
        v.check(f'grad_student_{index}', grad)


@recipe('detrdistill_logits')
def logits(v: Vector) -> None:
    inputs = [tensor.requires_grad_() for tensor in v.series('student_')]
    theirs = v.series('teacher_')
    student, teacher = (QueryView(torch.stack(side[0::2]), torch.stack(side[1::2])) for side in (inputs, theirs))
    # Every query has a partner here; the published divisor is their number plus mmdet's epsilon.
    pairs = inputs[0].shape[0] * inputs[0].shape[1]
    loss: Any = build(dict(
        type='DETRDistillLogitsLoss', class_weight=v.number('cls_weight'), l1_weight=v.number('bbox_l1_weight'),
        giou_weight=v.number('giou_weight'), loss_weight=pairs / (pairs + EPS),
        match_weights=tuple(v.number(f'match_{name}_cost') for name in ('cls', 'l1', 'giou'))))
    batch = batch_of(v)
    for layer, partner in enumerate(loss.match(student, teacher)):
        v.check(f'match_{layer}', partner)
    total = loss(student, teacher, batch)
    v.check('loss', total)
    parts = loss.terms(student, teacher, batch)
    for term, name in (('class', 'cls'), ('l1', 'bbox'), ('giou', 'iou')):
        for layer, value in enumerate(parts[term]):
            v.check(f'loss_{name}_{layer}', value * loss.factors[term] * pairs / (pairs + EPS))
    gradients(v, total, inputs)


@recipe('detrdistill_feature')
def feature(v: Vector) -> None:
    inputs, theirs, stages = [tensor.requires_grad_() for tensor in v.series('student_')], [], v.number('num_stages')
    for index in range(len(inputs)):
        theirs.append(v.tensor(f'teacher_{index}'))
    v.agree('num_stages', len(v.series('query_')))
    scores, boxes, queries = (torch.stack(v.series(name)) for name in ('teacher_logits_', 'teacher_boxes_', 'query_'))

    def views(layers: slice):
        return (QueryView(torch.zeros_like(scores[layers]), memory=inputs),
                QueryView(scores[layers], boxes[layers], queries[layers], memory=theirs))

    loss: Any = build(dict(type='DETRDistillFeatureLoss', top=v.number('max_per_img'),
                           floor=v.number('mask_clamp_min')))
    batch = batch_of(v)
    total = loss(*views(slice(None)), batch)
    v.check('loss', total)
    weights, _ = loss.query_weights(views(slice(None))[1], batch)
    for stage in range(stages):
        v.check(f'loss_{stage}', loss(*views(slice(stage, stage + 1)), batch))
        v.check(f'query_weight_{stage}', weights[stage])
    gradients(v, total, inputs)


@recipe('detrdistill_query_prior')
def query_prior(v: Vector) -> None:
    inputs, theirs = [tensor.requires_grad_() for tensor in v.series('student_')], v.series('teacher_')
    v.ignore('costs of the matching, which the file gives', 'match')
    labels, objects = (torch.stack(v.series(name))[None] for name in ('labels_', 'assigned_gt_'))
    number = (objects >= 0).sum(dim=(1, 2)).double() + EPS
    found = QueryAssignment(labels, objects, inputs[0].shape[2], number)
    student = QueryView(*(tensor[None] for tensor in inputs))
    teacher = QueryView(*(tensor[None] for tensor in theirs), assignment=found)
    kind, _, alpha, _, gamma, _, weight = v.number('cls').split()
    assert kind == 'FocalLoss', kind
    v.only('bg_cls_weight', 0)
    loss: Any = build(dict(
        type='DETRDistillQueryPriorLoss', class_weight=float(weight), alpha=float(alpha), gamma=float(gamma),
        l1_weight=v.number('l1_weight'), giou_weight=v.number('giou_weight')))
    batch = batch_of(v)
    batch.targets.labels = v.series('gt_labels_')
    total = loss(student, teacher, batch)
    v.check('loss', total)
    parts = loss.terms(student, teacher, batch)
    v.check('loss_cls', loss.factors['class'] * parts['class'][0][None])
    v.check('loss_bbox', loss.factors['l1'] * parts['l1'][0])
    v.check('loss_iou', loss.factors['giou'] * parts['giou'][0])
    gradients(v, total, inputs)
