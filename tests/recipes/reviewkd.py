"""Knowledge review."""

from recipes.fbkd import evaluation_norm
from recipes.vector import Vector, recipe


@recipe('reviewkd')
def reviewkd(v: Vector) -> None:
    for name, side in (('in_channels', 'student_'), ('out_channels', 'teacher_')):
        v.agree(name, [tensor.shape[1] for tensor in v.series(side)])
    last = len(v.series('student_')) - 1
    rules = []
    for index in range(last + 1):  # the file counts the blocks from the deepest one
        block = f'loss.blocks.{last - index}'
        rules += [(rf'abf_{index}_conv1_0_(weight)', rf'{block}.reduce.\1'),
                  (rf'abf_{index}_conv1_1_(\w+)', rf'{block}.reduce_norm.\1'),
                  (rf'abf_{index}_conv2_0_(weight)', rf'{block}.expand.\1'),
                  (rf'abf_{index}_conv2_1_(\w+)', rf'{block}.expand_norm.\1'),
                  (rf'abf_{index}_att_conv_0_(\w+)', rf'{block}.attention.\1')]
    loss = dict(type='ReviewKDLoss', channels=v.number('mid_channel'), pools=v.number('hcl_pool'),
                loss_weight=v.number('loss_weight'))
    outcome = v.run(loss, rules=rules)
    method = outcome.modules['loss']
    student, teacher = tuple(outcome.student), tuple(outcome.teacher)
    for level, (output, term) in enumerate(zip(
            method.fuse(student), method.level_terms(student, teacher, [None] * len(student)))):
        v.check(f'out_{level}', output)
        v.check(f'loss_{level}', term)
    v.run(loss, rules=rules, setup=evaluation_norm, prefix='variant_eval_bn_')
