"""Localization distillation: the loss class, and the main region of mmdet's LDHead."""

import torch

from kd_mm.losses.ld import distribution_divergence
from kd_mm.types.dense import DenseView
from recipes.heads import EPS, assignment, class_rows, compare, distribution_rows
from recipes.vector import Vector, recipe

PUBLISHED = dict(type='LDLoss', bins='mean', normalise=False, valuable_weight=0)


@recipe('ld')
def ld(v: Vector) -> None:
    """Rows of positives and their weights; here the weights come from scores."""
    v.only('reduction', 'mean')
    bins, tau, weight = v.number('reg_max') + 1, v.number('T'), v.number('loss_weight')
    student, teacher = v.tensor('student_0').requires_grad_(), v.tensor('teacher_0')
    scores = v.tensor('weight_0').view(-1, 4)[:, :1]
    logits = torch.logit(scores)[None]
    host = assignment([torch.ones(logits.shape[:2])], 1, [torch.zeros(logits.shape[:2], dtype=torch.long)])
    views = [DenseView([logits], distributions=[tensor.view(1, -1, 4, bins)], assignment=host)
             for tensor in (student, teacher)]
    # The published divisor is 4 plus mmdet's epsilon.
    factor = weight * 4 / (v.number('avg_factor') + EPS)
    compare(v, dict(PUBLISHED, tau=tau, loss_weight=factor), views[0], views[1], [student], {})
    each = weight * distribution_divergence(student, teacher, tau, 'mean')
    rows = v.tensor('weight_0')
    for name, value in (('none', each), ('mean_noweight', each.mean()), ('sum_weight', (each * rows).sum())):
        v.check(f'variant_{name}_loss', value)
        v.check(f'variant_{name}_grad_student_0', torch.autograd.grad(value.sum(), student, retain_graph=True)[0])


@recipe('ld_head')
def ld_head(v: Vector) -> None:
    """The head's ``loss_ld`` given the labels; the rest of the head is the host's own."""
    v.ignore('of the assignment, whose labels the file gives', 'assigner', 'octave_base_scale', 'scales_per_octave',
             'ratios', 'strides', 'gt_*', 'img_shape_*', 'batch_input_shape')
    v.ignore('a loss of the host\'s head, not of the distillation', 'loss_cls', 'loss_bbox', 'loss_dfl')
    inputs = [tensor.requires_grad_() for tensor in v.series('student_')]
    levels, classes, bins = len(inputs) // 2, v.number('num_classes'), v.number('reg_max') + 1
    logits = class_rows(inputs[:levels], classes)
    host = assignment([torch.ones(level.shape[:2]) for level in logits], classes, v.series('labels_'))
    for level in range(levels):
        v.check(f'n_pos_{level}', host.positive(level).sum().double())
    student = DenseView(logits, distributions=distribution_rows(inputs[levels:], bins), assignment=host)
    teacher = DenseView(logits, distributions=distribution_rows(v.series('teacher_'), bins))
    compare(v, dict(PUBLISHED, tau=v.number('T'), loss_weight=v.number('ld_loss_weight') * 4 / (4 + EPS)),
            student, teacher, inputs, dict(main='loss_ld_{}'))
    for name in ('cls', 'bbox', 'dfl'):
        v.skip(f'loss_{name}_*', 'a loss of the host\'s head, not of the distillation')
