"""Inter-class similarity, as in the released code."""

from recipes.vector import Vector, recipe


@recipe('aicsd')
def aicsd(v: Vector) -> None:
    v.agree('num_classes', v.tensor('student_0').shape[1])
    outcome = v.run(dict(type='AICSDLoss', similarity=v.number('lo_lambda'), pixel=v.number('pi_lambda'),
                         channel=v.number('ic_lambda'), tau=v.number('temperature'), matrix='released',
                         mask_ignored=False))
    loss = outcome.modules['loss']
    terms = loss.terms(outcome.student[0], outcome.teacher[0], v.batch(), None)
    for theirs, ours in (('lo', 'similarity'), ('pi', 'pixel'), ('ic', 'channel')):
        v.check(f'loss_{theirs}', loss.factors[ours] * terms[ours])
