"""Masked generative distillation."""

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from kd_mm.ops.sampling import keep_mask
from recipes.vector import Vector, recipe


def mgd_masks(masks: Sequence[Tensor]) -> Callable[[nn.ModuleDict], None]:
    def setup(modules: nn.ModuleDict) -> None:
        modules['loss'].fixed_masks = list(masks)

    return setup


@recipe('mgd', 'mgd_noalign')
def mgd(v: Vector) -> None:
    loss = dict(type='MGDLoss', loss_weight=v.number('alpha_mgd'), mask_ratio=v.number('lambda_mgd'))
    aligned = dict(type='ConvAdapter') if 'param_0_align_weight' in v else None
    rules = [(r'(\d+)_generation_(\d)_(weight|bias)', r'loss.generators.\1.\2.\3'),
             (r'(\d+)_align_(weight|bias)', r'adapter.convs.\1.\2')]
    outcome = v.run(loss, adapter=aligned, rules=rules, setup=mgd_masks(v.series('mask_')))
    assert len(v.series('mask_')) == len(outcome.student)
    if 'mask_channel_0' in v:
        # The same parameters for level 0 alone.
        v.run(dict(loss, mask_on='channel'), adapter=aligned, student=[v.tensor('student_0')],
              teacher=[v.tensor('teacher_0')], prefix='variant_channel_mask_',
              rules=[(pattern.replace(r'(\d+)', '(0)', 1), target) for pattern, target in rules],
              setup=mgd_masks([v.tensor('mask_channel_0')]))


@recipe('mgd_seg', 'mgd_seg_noalign')
def mgd_segmentation(v: Vector) -> None:
    ratio = v.number('lambda_mgd')
    assert torch.equal(keep_mask(v.tensor('mask_rand'), ratio), v.tensor('mask').double()), 'mask is not that of u'
    outcome = v.run(dict(type='MGDLoss', loss_weight=v.number('alpha_mgd'), mask_ratio=ratio),
                    adapter=dict(type='ConvAdapter') if 'param_align.weight' in v else None,
                    rules=[(r'generation\.(\d)\.(weight|bias)', r'loss.generators.0.\1.\2'),
                           (r'align\.(weight|bias)', r'adapter.convs.0.\1')],
                    setup=mgd_masks([v.tensor('mask')]))
    student = tuple(outcome.student)
    if 'adapter' in outcome.modules:
        student, _ = outcome.modules['adapter'](student, tuple(outcome.teacher))
    v.check('generated', outcome.modules['loss'].generators[0](student[0] * v.tensor('mask')))
