"""Pearson distillation."""

from recipes.vector import Vector, recipe


@recipe('pkd')
def pkd(v: Vector) -> None:
    loss = dict(type='PKDLoss', loss_weight=v.number('loss_weight'))
    outcome = v.run(dict(loss, resize_student=v.number('resize_stu')))
    v.run(dict(loss, resize_student=False), prefix='variant_resize_teacher_')
    for level, term in enumerate(outcome.levels):
        v.check(f'variant_crosskd_{level}_loss', v.number('loss_weight') * term)
