"""DIST."""

import torch

from kd_mm.losses.dist import dist_terms
from recipes.vector import Vector, identical_loss, recipe


def terms(v: Vector, activation: str = 'softmax', tau: float = 1.0) -> None:
    scores = [(tensor / tau).softmax(dim=1) if activation == 'softmax' else tensor.sigmoid()
              for tensor in (v.tensor('student_0'), v.tensor('teacher_0'))]
    inter, intra = dist_terms(*scores)
    v.check('loss_inter', inter)
    v.check('loss_intra', intra)


@recipe('dist', 'dist_sigmoid')
def dist(v: Vector) -> None:
    loss = dict(type='DISTLoss', beta=v.number('beta_inter', 'beta'), gamma=v.number('gamma_intra', 'gamma'),
                tau=v.number('tau', default=1.0), loss_weight=v.number('loss_weight'),
                activation='sigmoid' if v.number('use_sigmoid', default='no') is True else 'softmax')
    first = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    second = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    outcome = v.run(loss, **first)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))  # an input of the variants only
    terms(v, loss['activation'], loss['tau'])
    v.check('variant_authors_loss', outcome.loss / loss['loss_weight'])
    variant = 'variant_seg4d_' if 'variant_seg4d_loss' in v else 'variant_2d_'
    if variant == 'variant_seg4d_':  # the authors' class for segmentation has neither temperature nor factor
        loss.update(tau=1.0, loss_weight=1.0)
    v.run(loss, prefix=variant, grads=['grad_student_1'], **second)
    v.check(f'{variant}grad_student_0', torch.zeros_like(v.tensor('student_0')))
    v.skip('variant_mmrazor4d_loss', 'a map given to code for rows: it is correlated over the images at each pixel')


@recipe('dist_seg')
def dist_segmentation(v: Vector) -> None:
    loss = dict(type='DISTLoss', beta=v.number('beta'), gamma=v.number('gamma'), tau=v.number('tau', default=1.0))
    v.run(loss)
    terms(v, tau=loss['tau'])
    v.check('loss_identical', identical_loss(v, loss))
