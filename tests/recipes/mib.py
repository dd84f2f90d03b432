"""MiB: unbiased cross-entropy and distillation."""

import torch

from kd_mm.types.batch import KDBatch
from recipes.vector import GivenRegion, Vector, recipe


@recipe('mib_ce')
def mib_ce(v: Vector) -> None:
    v.only('reduction', 'none, then mean over all N*H*W pixels (as the training script)')
    student, old = v.tensor('student_0'), v.number('num_old_classes')
    v.agree('num_new_classes', student.shape[1] - old)
    # The loss asks the teacher for its number of classes alone.
    teacher = [torch.zeros_like(student[:, :old])]
    ignore = v.number('ignore_index')
    labels, clean = (KDBatch(seg_map=v.tensor(name), ignore_index=ignore) for name in (
        'gt_seg_map', 'gt_seg_map_no_ignore'))
    weight = v.number('loss_weight')
    loss = dict(type='MiBCELoss', divisor='all')
    v.run(dict(loss, loss_weight=weight), teacher=teacher, batch=labels)
    v.run(dict(loss, loss_weight=1.0, divisor='labelled'), teacher=teacher, batch=labels, prefix='variant_mean_')
    pixels = float(student[:, 0].numel())
    v.run(dict(loss, loss_weight=pixels), teacher=teacher, batch=labels, prefix='variant_sum_')
    v.run(dict(loss, loss_weight=1.0), teacher=teacher, batch=clean, prefix='variant_no_ignore_')


@recipe('mib_kd')
def mib_kd(v: Vector) -> None:
    v.only('reduction', 'mean')
    v.only('temperature', 'none; alpha multiplies the teacher logits')
    student, teacher = v.tensor('student_0'), v.tensor('teacher_0')
    v.agree('num_old_classes', teacher.shape[1])
    v.agree('num_new_classes', student.shape[1] - teacher.shape[1])
    v.ignore('of which the mask is made', 'gt_seg_map')
    mask = v.tensor('mask_0')[:, None]
    loss = dict(type='MiBKDLoss', alpha=v.number('alpha'), divergence='cross_entropy', mask_ignored=False)
    v.run(dict(loss, loss_weight=v.number('loss_weight')))
    v.run(dict(loss, alpha=1.0, loss_weight=1.0), prefix='variant_alpha1_')
    # There the divisor is all pixels, here the weights of the region.
    v.run(dict(loss, loss_weight=float(mask.mean())), region=GivenRegion([mask]), prefix='variant_mask_')
    v.run(dict(loss, loss_weight=float(mask.numel())), prefix='variant_sum_')
    v.run(dict(loss, loss_weight=1.0, unbiased=False), prefix='variant_plain_')
