"""ERD on two heads of the GFL family."""

from typing import Any, Dict, List

import torch
from torch import Tensor

from kd_mm.losses.erd import ERDLoss, elastic_selection
from kd_mm.ops.boxes import around
from kd_mm.registry import build
from kd_mm.types.dense import DenseView, rows
from recipes.heads import EPS, distribution_rows
from recipes.vector import Vector, recipe


def view(maps: List[Tensor], classes: int, bins: int, strides: List[int]) -> DenseView:
    """A head's view; boxes are decoded with the stride from the corner of each cell."""
    levels = len(strides)
    sides = distribution_rows(maps[levels:], bins)
    points = []
    for level, stride in zip(maps, strides):
        y, x = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing='ij')
        points.append((torch.stack([x, y], dim=-1).view(-1, 2) * stride).to(level.dtype))
    numbers = torch.arange(bins, dtype=maps[0].dtype)
    boxes = [around(point.expand(len(side), *point.shape), (side.softmax(dim=3) @ numbers) * stride)
             for side, point, stride in zip(sides, points, strides)]
    return DenseView(rows(maps[:levels], classes), boxes, sides, priors=points)


@recipe('erd')
def erd(v: Vector) -> None:
    v.only('std', 'unbiased')
    v.only('select', 'strictly greater')
    v.only('avg_factor_eps', EPS)
    strides, old = v.number('strides'), v.number('num_old_classes')
    v.agree('num_levels', len(strides))
    bins, new = v.number('reg_max') + 1, v.number('num_new_classes')
    leaves = [tensor.requires_grad_() for tensor in v.series('student_')]
    views = view(leaves, old + new, bins, strides), view(v.series('teacher_'), old, bins, strides)
    whole, box = v.number('dist_loss_weight'), v.number('ld_loss_weight') * 4 / (v.number('avg_factor') + EPS)
    published: Dict[str, Any] = dict(type='ERDLoss', decode='published', reduction='sum', tau=v.number('T'),
                                     std_factor=v.number('std_factor'), iou=v.number('nms_iou_threshold'),
                                     loss_weight=whole)
    loss = build(dict(published, box_weight=box))
    assert isinstance(loss, ERDLoss)

    def compare(prefix: str, value: Tensor) -> None:
        v.check(f'{prefix}loss', value)
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        for index, grad in enumerate(found):
            v.check(f'{prefix}grad_student_{index}', torch.zeros_like(leaves[index]) if grad is None else grad)

    compare('', loss(*views))
    parts = loss.parts(*views)[0]
    v.check('loss_dist_cls', whole * parts['class'])
    v.check('loss_dist_bbox', whole * parts['box'])
    chosen, sure, kept = loss.selections(views[1])
    images = len(chosen)
    logits = torch.cat(views[1].logits, dim=1).sigmoid().amax(dim=2)
    sides = torch.cat(views[1].distributions, dim=1).flatten(2).amax(dim=2)
    for image in range(images):
        one = [part_of(side, image) for side in views]
        for name, part in loss.parts(*one)[0].items():
            v.check(f'loss_dist_{"cls" if name == "class" else "bbox"}_{image}', whole * part)
        v.check(f'generated_cls_index_{image}', chosen[image])
        v.check(f'generated_box_index_{image}', sure[image])
        v.check(f'generated_keep_{image}', kept[image])
        for name, values in (('cls', logits[image]), ('box', sides[image])):
            v.check(f'generated_{name}_threshold_{image}', values.mean() + loss.std_factor * values.std())
            assert elastic_selection(values, loss.std_factor).sum() == len((chosen if name == 'cls' else sure)[image])
    # An overlap of 1 suppresses nothing, and boxes decoded with the stride are our default.
    compare('variant_no_nms_', build(dict(published, class_weight=0, box_weight=box, iou=1.0))(*views))
    fixed = build(dict(published, class_weight=0, box_weight=box, decode='boxes'))
    assert isinstance(fixed, ERDLoss)
    v.check('fixed_decode_loss', fixed(*views))
    for image, keep in enumerate(fixed.selections(views[1])[2]):
        v.check(f'fixed_decode_keep_{image}', keep)


def part_of(whole: DenseView, image: int) -> DenseView:
    """The view of one image."""
    def cut(levels: Any) -> List[Tensor]:
        return [level[image:image + 1] for level in levels]

    return DenseView(cut(whole.logits), cut(whole.boxes), cut(whole.distributions), priors=whole.priors)
