"""GO-LSD: one layer of D-FINE as one level of predictions with box distributions."""

import torch

from kd_mm.ops.boxes import to_corners
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import Assignment, DenseView
from recipes.vector import Vector, recipe


@recipe('dfine_golsd')
def dfine_golsd(v: Vector) -> None:
    v.ignore('of the localisation loss against the ground truth', 'num_boxes', 'reg_scale', 'ref_points', 'up')
    v.ignore('it cancels', 'batch_reference')
    v.ignore('a factor that the published code applies to this loss outside', 'loss_weight_outside')
    v.ignore('the union of matchings of several layers is the host\'s', 'go_*')
    student, bins = v.tensor('student_0').requires_grad_(), v.number('reg_max') + 1
    images, queries = student.shape[:2]
    scores = v.tensor('teacher_1')
    objects = torch.full((images, queries), -1)
    for image in range(images):
        objects[image, v.tensor(f'match_src_{image}')] = v.tensor(f'match_tgt_{image}')
    background = scores.shape[2]
    labels = torch.where(objects >= 0, torch.zeros_like(objects), torch.full_like(objects, background))
    host = Assignment((labels, ), (torch.ones(images, queries), ), background, (objects, ))
    # IoU does not change with the size of the image: boxes in parts of it are as good as pixels.
    views = (DenseView([scores], [to_corners(v.tensor('pred_boxes'))], [student.unflatten(-1, (4, bins))],
                       assignment=host),
             DenseView([scores], distributions=[v.tensor('teacher_0').unflatten(-1, (4, bins))]))
    batch = KDBatch(boxes=[to_corners(boxes) for boxes in v.series('target_boxes_')], input_shape=(1, 1))
    total = build(dict(type='GOLSDLoss', tau=v.number('T'), loss_weight=1.0))(*views, batch)
    v.check('loss', total)
    v.check('loss_ddf', total)
    v.check('grad_student_0', torch.autograd.grad(total, student)[0])
    v.skip('loss_fgl', "D-FINE's own localisation loss against the ground truth, no distillation")
