"""Knowledge adaptation: the distances, on codes that the file gives."""

import torch

from kd_mm.losses.ktaad import adaptation_distance, channel_affinity_distance
from recipes.vector import Vector, recipe


@recipe('ktaad', 'ktaad_p2')
def ktaad(v: Vector) -> None:
    v.only('p', 1, 2)
    v.only('q', 2)
    v.only('reduction', 'mean')
    feature, affinity = (tensor.requires_grad_() for tensor in v.series('student_'))
    code = v.tensor('teacher_0')
    kta = adaptation_distance(feature, code, v.number('p'))
    relation = channel_affinity_distance(affinity, code)
    total = v.number('weight_kta') * kta + v.number('weight_affinity') * relation
    v.check('loss', total)
    v.check('loss_kta', kta)
    v.check('loss_affinity', relation)
    for index, grad in enumerate(torch.autograd.grad(total, [feature, affinity])):
        v.check(f'grad_student_{index}', grad)
