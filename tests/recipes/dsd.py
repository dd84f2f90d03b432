"""Double similarity."""

from recipes.vector import Vector, identical_loss, recipe


@recipe('dsd')
def dsd(v: Vector) -> None:
    loss = dict(type='DSDLoss', psd=v.number('lambda_psd'), csd=v.number('lambda_csd'), tau=v.number('tau'),
                p=v.number('p'))
    outcome = v.run(loss)
    terms = outcome.modules['loss'].terms(tuple(outcome.student), tuple(outcome.teacher), v.batch(), [None] * 3)
    for name, term in terms.items():
        v.check(f'loss_{name}', term)
    v.check('loss_identical', identical_loss(v, loss))
