"""Dense relation KL."""

from kd_mm.ops.functional import resize, unit_vectors
from recipes.dsi import LINEAR, RULES
from recipes.vector import Vector, recipe


@recipe('relation_kl')
def relation_kl(v: Vector) -> None:
    v.only('projector', *LINEAR)
    v.only('resize', 'student to teacher size, bilinear, align_corners False, no antialias')
    v.ignore('a guard against vectors of length 0', 'normalize_eps')
    v.ignore('says what the defaults are', 'released')
    v.as_maps('param_projector_weight', 'grad_param_projector_weight')
    outcome = v.run(dict(type='RelationKLLoss', tau=v.number('temperature'), max_cells=None,
                         loss_weight=v.number('loss_weight')),
                    adapter=dict(type='ConvAdapter', always=True), rules=RULES)
    adapted = outcome.modules['adapter'](tuple(outcome.student), tuple(outcome.teacher))[0][0]
    # The very steps of the loss, up to the matrix that it never holds whole.
    size = outcome.teacher[0].shape[2:]
    resized = resize(adapted, (size[0], size[1]))
    rows = unit_vectors(resized.flatten(2))[0].t()
    v.check('generated_student_relation', rows @ rows.t())
