"""Intra-class feature variation."""

from kd_mm.losses.ifvd import class_similarity
from kd_mm.types.targets import class_members, seg_map
from recipes.vector import Vector, identical_loss, recipe


@recipe('ifvd_official', 'ifvd_cirkd')
def ifvd(v: Vector) -> None:
    loss = dict(type='IFVDLoss', count_ignored=True, num_classes=v.number('num_classes'),
                loss_weight=v.number('loss_weight'))
    features = v.tensor('student_0')
    v.check('label_at_feature', seg_map(v.batch(), (features.shape[2], features.shape[3])))
    v.run(loss)
    v.check('loss_identical', identical_loss(v, loss))
    for side in ('student', 'teacher'):
        features = v.tensor(f'{side}_0')
        found = class_similarity(features, class_members(v.batch(), features, loss['num_classes']))
        v.check(f'sim_{side}', found.view(features.shape[0], *features.shape[2:]))
    v.check('ext_loss_batch_centres', v.run(dict(loss, centres='batch'), prefix='batch_').loss)
