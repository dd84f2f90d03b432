"""Focal and global distillation."""

from typing import Any, Dict

from recipes.vector import Vector, recipe


@recipe('fgd', 'fgd_noalign')
def fgd(v: Vector) -> None:
    loss = dict(type='FGDLoss', tau=v.number('temp'), alpha=v.number('alpha_fgd'), beta=v.number('beta_fgd'),
                gamma=v.number('gamma_fgd'), lambda_=v.number('lambda_fgd'))
    v.agree('num_levels', len(v.series('student_')))
    common: Dict[str, Any] = dict(
        adapter=v.connector('adapter'),
        rules=[(r'(\d+)_align_(weight|bias)', r'adapter.convs.\1.\2'),
               (r'(\d+)_conv_mask_([st])_(weight|bias)', r'loss.context_\2.\1.conv_mask.\3'),
               (r'(\d+)_channel_add_conv_([st])_(\d)_(weight|bias)', r'loss.context_\2.\1.channel_add.\3.\4')])
    outcome = v.run(dict(loss, frame='image'), **common)
    student = tuple(outcome.student)
    if common['adapter'] is not None:
        student, _ = outcome.modules['adapter'](student, tuple(outcome.teacher))
    sums: Dict[str, Any] = {}
    for level, pair in enumerate(zip(student, outcome.teacher)):
        for name, term in outcome.modules['loss'].terms(level, *pair, v.batch()).items():
            v.check(f'loss_{name}_{level}', term)
            sums[name] = sums.get(name, 0) + term
    for name, total in sums.items():
        v.check(f'loss_{name}', total)
    v.run(dict(loss, frame='input'), prefix='variant_padded_frame_', **common)
    empty = v.batch()
    if empty.targets.boxes is not None and len(empty.targets.boxes) > 1:
        empty.targets.boxes[1] = empty.targets.boxes[1][:0]
        v.run(dict(loss, frame='image'), prefix='variant_empty_gt_', batch=empty, **common)
