"""Augmentation-free dense contrastive distillation."""

import torch
from torch import nn

from kd_mm.ops.sampling import keep_mask
from recipes.vector import Vector, recipe


@recipe('af_dcd', 'af_dcd_enhanced')
def af_dcd(v: Vector) -> None:
    v.only('rand_mask', True)
    ratio, mask = v.number('mask_ratio'), v.tensor('mask')
    assert torch.equal(keep_mask(v.tensor('mask_rand'), ratio), mask.double()), 'mask is not that of u'
    loss = dict(type='AfDCDLoss', mask_ratio=ratio, enhanced=v.number('enhance_projector'), tau=v.number('tau_ocd'),
                groups=v.number('M_ocd'), pool=v.number('pool_size'), patch=tuple(v.number('patch_size')),
                fd_weight=v.number('lambda_fd'), contrast_weight=v.number('lambda_ctr'))

    def setup(modules: nn.ModuleDict) -> None:
        modules['loss'].fixed_masks = [mask]

    outcome = v.run(loss, setup=setup, adapter=dict(type='ConvAdapter'), rules=[
        (r'align\.(weight|bias)', r'adapter.convs.0.\1'),
        (r'projetor\.(\d)\.(weight|bias)', r'loss.projectors.0.\1.\2'),
        (r'projetor\.(block_\d)\.0\.(weight|bias)', r'loss.projectors.0.\1.0.\2'),
        (r'projetor\.adpator_(\d)\.(weight|bias)', r'loss.projectors.0.end_\1.\2')])
    method = outcome.modules['loss']
    student, teacher = outcome.modules['adapter'](tuple(outcome.student), tuple(outcome.teacher))
    terms = method.terms(0, student[0], teacher[0], v.batch())
    v.check('loss_fd', terms['fd'])
    v.check('loss_ctr', terms['contrast'])
    v.check('generated', method.projectors[0](student[0] * mask))
