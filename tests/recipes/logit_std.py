"""Logit standardisation of softmax KD and of decoupled KD, on rows."""

from kd_mm.ops.divergences import standardise_logits
from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe


@recipe('kd_logit_std')
def kd_logit_std(v: Vector) -> None:
    v.only('std', 'unbiased')
    v.only('std_eps', 1e-7)
    v.agree('num_classes', v.tensor('student_0').shape[1])
    loss = dict(type='SoftmaxKDLoss', tau=v.number('temperature'), loss_weight=v.number('loss_weight'))
    v.run(dict(loss, standardise=True))
    v.run(loss, prefix='variant_plain_')
    for side in ('student', 'teacher'):
        v.check(f'generated_{side}_logits', standardise_logits(v.tensor(f'{side}_0')))


@recipe('dkd_logit_std')
def dkd_logit_std(v: Vector) -> None:
    v.only('std', 'unbiased')
    v.only('std_eps', 1e-7)
    v.agree('num_classes', v.tensor('student_0').shape[1])
    batch = KDBatch(row_labels=v.tensor('gt_labels_0'))
    alpha, beta = v.number('alpha'), v.number('beta')
    loss = dict(type='DKDLoss', tau=v.number('temperature'), loss_weight=v.number('loss_weight', default=1.0))
    v.run(dict(loss, alpha=alpha, beta=beta, standardise=True), batch=batch)
    v.run(dict(loss, alpha=alpha, beta=0.0, standardise=True), batch=batch, prefix='variant_tckd_')
    v.run(dict(loss, alpha=0.0, beta=beta, standardise=True), batch=batch, prefix='variant_nckd_')
    v.run(dict(loss, alpha=alpha, beta=beta), batch=batch, prefix='variant_plain_')
