"""CrossKD: the losses of GFL, RetinaNet and ATSS heads, the rescaling, and the whole pass through a teacher's head."""

import math
from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.heads.towers import cross_head_outputs, held_features, tower_taps
from kd_mm.hosts.taps import Tap
from kd_mm.ops.functional import align_moments
from kd_mm.types.dense import DenseView, rows
from recipes.heads import EPS, assignment, class_rows, compare, distribution_rows
from recipes.vector import Vector, recipe


def box_coder(v: Vector, name: str) -> Tuple[List[float], float]:
    """Standard deviations and clip ratio of 'DeltaXYWH means 0, stds .1 .1 .2 .2, wh_ratio_clip 16/1000'.

    One deviation is that of all four; means are 0 and the clip is 16/1000, mmdet's default, unless they are named.
    """
    found = v.words(name, r'DeltaXYWH(?: means ([\d. ]+))?,? stds ([\d. ]+?)(?:, wh_ratio_clip (\d+)/(\d+))?')
    if any(float(mean) for mean in (found[0] or '').split()):
        raise ValueError(f'{name}: only means of 0 are implemented')
    deviations = [float(part) for part in found[1].split()]
    return deviations * (4 // len(deviations)), int(found[2] or 16) / int(found[3] or 1000)


def decoded(anchors: Tensor, deltas: Tensor, deviations: Sequence[float], clip: float) -> Tensor:
    """Boxes from centre and size deltas (Faster R-CNN), the size ratio clipped to ``clip`` .. ``1 / clip``."""
    deltas = deltas * deltas.new_tensor(list(deviations))
    centre, size = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    limit = abs(math.log(clip))
    middle, half = centre + deltas[..., :2] * size, size * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    return torch.cat([middle - half, middle + half], dim=-1)


@recipe('crosskd_gfl')
def crosskd_gfl(v: Vector) -> None:
    inputs, teacher = [tensor.requires_grad_() for tensor in v.series('student_')], v.series('teacher_')
    levels, bins, classes = len(inputs) // 2, v.number('reg_max') + 1, v.number('num_classes')
    host = assignment(v.series('label_weights_'), classes, num_pos=v.number('avg_factor') + EPS)
    views = [DenseView(class_rows(maps[:levels], classes), distributions=distribution_rows(maps[levels:], bins),
                       assignment=host) for maps in (inputs, teacher)]
    v.only('reg_class_reduction', 'sum')
    total = sum((level.sigmoid().amax(dim=-1) * weight).sum()
                for level, weight in zip(views[1].logits, v.series('label_weights_')))
    v.check('reg_weight_sum', total)
    compare(v, gfl_config(v), views[0], views[1], inputs, {'class': 'loss_cls_kd_{}', 'box': 'loss_reg_kd_{}'})


def gfl_config(v: Vector, **options: Any) -> dict:
    # mmdet's epsilon sits on the 4 of the box term.
    return dict(type='CrossKDLoss', class_weight=v.number('cls_loss_weight', 'cls_weight'), beta=v.number('cls_beta'),
                tau=v.number('reg_T'), box_weight=v.number('reg_loss_weight', 'reg_weight') * 4 / (4 + EPS), **options)


@recipe('crosskd_retinanet')
def crosskd_retinanet(v: Vector) -> None:
    inputs, teacher = [tensor.requires_grad_() for tensor in v.series('student_')], v.series('teacher_')
    levels, classes, coder = len(inputs) // 2, v.number('num_classes'), box_coder(v, 'bbox_coder')
    v.agree('num_anchors', inputs[0].shape[1] // classes)
    v.only('reg_loss', 'GIoU eps 1e-6')
    host = assignment(v.series('label_weights_'), classes, num_pos=v.number('avg_factor') + EPS)
    views = [DenseView(class_rows(maps[:levels], classes), [
        decoded(anchors, level, *coder) for anchors, level in zip(
            v.series('anchors_'), rows(maps[levels:], 4))], assignment=host) for maps in (inputs, teacher)]
    compare(v, dict(type='CrossKDLoss', class_weight=v.number('cls_loss_weight'), beta=v.number('cls_beta'),
                    box_weight=v.number('reg_loss_weight')), views[0], views[1], inputs,
            {'class': 'loss_cls_kd_{}', 'box': 'loss_reg_kd_{}'})


@recipe('crosskd_atss')
def crosskd_atss(v: Vector) -> None:
    inputs, teacher = [tensor.requires_grad_() for tensor in v.series('student_')], v.series('teacher_')
    classes, coder = inputs[0].shape[1], box_coder(v, 'coder')
    host = assignment(v.series('label_weights_'), classes, v.series('labels_'), v.number('avg_factor') + EPS)
    views = [DenseView(class_rows(maps[:1], classes), [decoded(
        v.tensor('anchors_0'), rows(maps[1:2], 4)[0], *coder)],
        quality=[rows(maps[2:], 1)[0][..., 0]], assignment=host) for maps in (inputs, teacher)]
    compare(v, dict(type='CrossKDLoss', class_weight=v.number('cls_weight'), box_weight=v.number('reg_weight'),
                    quality_weight=v.number('center_weight'), beta=v.number('beta')), views[0], views[1], inputs,
            {'class': 'loss_cls_kd', 'box': 'loss_reg_kd', 'quality': 'loss_center_kd'})


@recipe('crosskd_align_scale')
def crosskd_align_scale(v: Vector) -> None:
    student = v.tensor('student_0').requires_grad_()
    aligned = align_moments(student, v.tensor('teacher_0'), v.number('eps'))
    v.check('aligned', aligned)
    total = (v.tensor('probe') * aligned).sum()
    v.check('loss', total)
    v.check('grad_student_0', torch.autograd.grad(total, student)[0])


class Block(nn.Module):
    """Convolution, group norm and an activation in place, named as the host's block names them."""

    with_norm, with_activation, norm_name, order = True, True, 'gn', ('conv', 'norm', 'act')

    def __init__(self, inside: int, width: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, width, 3, padding=1, bias=False)
        self.gn, self.activate = nn.GroupNorm(groups, width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.gn(self.conv(x)))


class Head(nn.Module):
    """The GFL head of the file: two towers, two predictors, one level."""

    def __init__(self, v: Vector, side: str):
        super().__init__()
        groups, bins = int(v.words('norm', r'GroupNorm groups=(\d+)')[0]), v.number('reg_max') + 1
        for tower in ('cls_convs', 'reg_convs'):
            kernels = [v.tensor(f'param_{side}_{tower}_{index}_conv_weight')
                       for index in range(v.number('stacked_convs'))]
            setattr(self, tower, nn.ModuleList(Block(part.shape[1], part.shape[0], groups) for part in kernels))
            width = kernels[-1].shape[0]
        self.gfl_cls = nn.Conv2d(width, v.number('num_classes'), 3, padding=1)
        self.gfl_reg = nn.Conv2d(width, 4 * bins, 3, padding=1)
        self.double()
        for name, parameter in self.named_parameters():
            parameter.data = v.tensor(f'param_{side}_{name.replace(".", "_")}')
        self.scale = v.tensor(f'param_{side}_scale')

    def forward(self, levels: Sequence[Tensor]) -> Any:
        scores, boxes = [], []
        for x in levels:
            first = second = x
            for conv in self.cls_convs:
                first = conv(first)
            for conv in self.reg_convs:
                second = conv(second)
            scores.append(self.gfl_cls(first))
            boxes.append(self.gfl_reg(second) * self.scale)
        return scores, boxes


@recipe('crosskd_head')
def crosskd_head(v: Vector) -> None:
    """Published (activated before it is held) and as the paper says, gradients down to the student's parameters."""
    index, classes, bins = v.number('reused_teacher_head_idx'), v.number('num_classes'), v.number('reg_max') + 1
    student, teacher = Head(v, 'student'), Head(v, 'teacher')
    teacher.requires_grad_(False)
    x = v.tensor('student_0').requires_grad_()
    for stage, prefix in (('post_activation', ''), ('pre_activation', 'variant_preactivation_')):
        kept = [_record(student, x, index, stage), _record(teacher, v.tensor('teacher_0'), index, stage)]
        v.check(f'{prefix}hold_min', kept[0]['cls_convs'][0].min())
        output = cross_head_outputs(teacher, [x], kept[0], kept[1], index)
        theirs = teacher([v.tensor('teacher_0')])
        if not prefix:
            for name, value in (('reused_cls_0', output[0][0]), ('reused_reg_0', output[1][0]),
                                ('tea_cls_0', theirs[0][0]), ('tea_reg_0', theirs[1][0])):
                v.check(name, value)
        views = [DenseView(class_rows(maps[0], classes), distributions=distribution_rows(maps[1], bins))
                 for maps in (output, theirs)]
        ones = [torch.ones(level.shape[:2], dtype=torch.float64) for level in views[0].logits]
        views[0].assignment = assignment(ones, classes, num_pos=v.number('avg_factor') + EPS)
        total = compare(v, gfl_config(v), views[0], views[1], [x],
                        {'class': 'loss_cls_kd', 'box': 'loss_reg_kd'}, prefix=prefix)
        if not prefix:
            names = [name for name, _ in student.named_parameters()]
            found = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
            for name, grad in zip(names, found):
                v.check(f'gradnorm_param_student_{name.replace(".", "_")}', 0.0 if grad is None else grad.norm())


def _record(head: nn.Module, x: Tensor, index: int, stage: str) -> Any:
    places = tower_taps(head, index, stage)
    taps = [Tap(head, path) for paths in places.values() for path in paths]
    for tap in taps:
        tap.arm()
    head([x])
    return held_features(places, {tap.path: tap.read() for tap in taps})
