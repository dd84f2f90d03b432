"""Sigmoid KD: the class terms of BCKD and FRS."""

import torch

from recipes.vector import GivenRegion, Vector, recipe


@recipe('sigmoid_kd_bckd')
def sigmoid_kd_bckd(v: Vector) -> None:
    """The class term of BCKD, which is also CrossKD's; the rest of their vectors is not about this loss."""
    weights = [weight.view(logits.shape[0], 1, *logits.shape[2:])
               for weight, logits in zip(v.series('label_weights_'), v.series('student_'))]
    # mmdet adds float32's epsilon to the number of positives that it divides by.
    divisor = v.number('num_total_samples') + torch.finfo(torch.float32).eps
    v.run(dict(type='SigmoidKDLoss', beta=v.number('beta'), divergence='cross_entropy', reduction='sum',
               loss_weight=v.number('cls_loss_weight') / divisor), region=GivenRegion(weights))


@recipe('sigmoid_kd_frs')
def sigmoid_kd_frs(v: Vector) -> None:
    """The class term of FRS."""
    v.run(dict(type='SigmoidKDLoss', divergence='cross_entropy', reduction='teacher_score',
               loss_weight=v.number('distill_cls_weight')))
