"""Feature richness: the feature term with the teacher-score region, and the class term."""

from kd_mm.regions.teacher_score import TeacherScoreRegion
from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe


@recipe('frs')
def frs(v: Vector) -> None:
    student, teacher = v.series('student_'), v.series('teacher_')
    levels = len(student) // 2  # features first, class logits after
    v.agree('num_classes', teacher[levels].shape[1] // v.number('num_anchors', default=1))
    batch, region = KDBatch(teacher_logits=tuple(teacher[levels:])), TeacherScoreRegion('head')
    features = v.run(
        dict(type='FRSLoss', loss_weight=v.number('distill_feat_weight')), student=student[:levels],
        teacher=teacher[:levels], adapter=v.connector('adapter'), region=region,
        batch=batch, rules=[(r'adapter_(\d)_(\w+)', r'adapter.convs.\1.\2')], prefix='feature_',
        grads=[f'grad_student_{level}' for level in range(levels)])
    classes = v.run(
        dict(type='SigmoidKDLoss', divergence='cross_entropy', reduction='teacher_score',
             loss_weight=v.number('distill_cls_weight')),
        student=student[levels:], teacher=teacher[levels:], batch=batch, prefix='class_')
    v.check('loss_feat', features.loss)
    v.check('loss_cls', classes.loss)
    v.check('loss', features.loss + classes.loss)
    for index, grad in enumerate([*features.grads, *classes.grads]):
        v.check(f'grad_student_{index}', grad)
    for level, mask in enumerate(region(tuple(teacher[:levels]), batch)):
        v.check(f'mask_{level}', mask[:, 0])
    adapter = features.modules['adapter']
    features.modules['loss'](*adapter(tuple(features.student), tuple(features.teacher)), batch, region).backward()
    for name, parameter in adapter.named_parameters():
        _, level, part = name.split('.')
        v.check(f'gradnorm_param_adapter_{level}_{part}', parameter.grad.norm())
