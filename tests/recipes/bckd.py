"""BCKD: class and box terms of a GFL head."""

from kd_mm.ops.boxes import around, centers
from kd_mm.types.dense import DenseView
from recipes.heads import EPS, assignment, class_rows, compare, distribution_rows
from recipes.vector import Vector, recipe


@recipe('bckd')
def bckd(v: Vector) -> None:
    inputs = [tensor.requires_grad_() for tensor in v.series('student_')]
    levels, bins = len(inputs) // 2, v.number('reg_max') + 1
    v.only('loc_loss', 'GIoU eps 1e-6')
    classes, strides = inputs[0].shape[1], v.number('strides')

    def view(maps, host=None):
        distances = distribution_rows(maps[levels:], bins)
        points = [centers(anchors) for anchors in v.series('anchors_')]
        steps = distances[0].new_tensor(range(bins))
        boxes = [around(point, (level.softmax(dim=-1) @ steps) * stride)
                 for point, level, stride in zip(points, distances, strides)]
        return DenseView(class_rows(maps[:levels], classes), boxes, distances, assignment=host)

    host = assignment(v.series('label_weights_'), classes, num_pos=v.number('num_total_samples') + EPS)
    compare(v, dict(type='BCKDLoss', class_weight=v.number('cls_loss_weight'), box_weight=v.number('loc_loss_weight'),
                    beta=v.number('beta')), view(inputs, host), view(v.series('teacher_')), inputs,
            {'class': 'loss_cls_{}', 'box': 'loss_loc_{}'})
