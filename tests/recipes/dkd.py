"""Decoupled KD on RoI rows."""

from kd_mm.losses.dkd import decoupled_terms
from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe


@recipe('dkd')
def dkd(v: Vector) -> None:
    labels, tau = v.tensor('labels'), v.number('temperature')
    outcome = v.run(dict(type='DKDLoss', alpha=v.number('alpha'), beta=v.number('beta'), tau=tau),
                    batch=KDBatch(row_labels=labels))
    tckd, nckd = decoupled_terms(v.tensor('student_0'), v.tensor('teacher_0'), labels, tau)
    v.check('loss_tckd', tau**2 * tckd.mean())
    v.check('loss_nckd', tau**2 * nckd.mean())
    v.check('variant_mmrazor_batchmean_loss', outcome.loss)
    v.skip('variant_mmrazor_mean_loss', 'a reduction called mean that runs as a sum, by a deprecated argument')
