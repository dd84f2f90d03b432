"""Losses on shared proposals in real training steps of two-stage detectors."""

import copy
import math

import pytest
import torch
from heads import build_head
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import hook, make_runner, same, train, weights
from two_stage import batch_of, build_two_stage, kept_two_stage, two_stage, two_stage_config

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.hosts.zoo import zoo_config
from kd_mm.teachers.base import Teacher

ROWS = dict(
    dkd=dict(type='DKDLoss', at='@roi_logits'),
    kd=dict(type='SoftmaxKDLoss', at='@roi_logits'),
    dist=dict(type='DISTLoss', at='@roi_logits'),
    defeat=dict(type='DeFeatClassLoss', at='@roi_logits'),
    chen=dict(type='ChenClassLoss', at='@roi_logits'),
    bound=dict(type='ChenBoxLoss', at='@roi_boxes', margin=100.0),
    rpn=dict(type='ChenClassLoss', at='@rpn_logits'),
    rpn_bound=dict(type='ChenBoxLoss', at='@rpn_boxes', margin=100.0),
    rkd=dict(type='RKDLoss', at='@roi_features', samples='image', limit=16),
    sp=dict(type='SPLoss', at='@roi_features', samples='image'),
    hint=dict(type='FitNetLoss', at='@roi_features'),
    pkd=dict(type='PKDLoss', at='@roi_features'))
MASK = dict(masks=dict(type='SigmoidKDLoss', at='@roi_masks'))


def losses_of(kind):
    return {f'loss_{name}': dict(cfg) for name, cfg in (ROWS if kind == 'faster' else {**ROWS, **MASK}).items()}


def teacher_config(kind, classes=3, width=24):
    cfg = two_stage_config(kind, width=width, classes=classes)
    return dict(model=cfg.model.to_dict(), default_scope='mmdet')


@pytest.fixture(scope='module')
def models():
    return kept_two_stage()


def step(student, teacher, data=None, backward=True, **losses):
    """The losses of one training step and the norm of the gradient of each distillation term, by top module."""
    data = batch_of(student) if data is None else data
    student.train().zero_grad()
    options = losses.pop('options', {})
    distiller = Distiller(student, teacher, {f'loss_{key}': value for key, value in losses.items()}, scope='mmdet',
                          **options)
    distiller.attach()
    try:
        found = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
    if backward:
        sum(found[f'loss_{key}'] for key in losses).backward()
    grads = {name for name, parameter in student.named_parameters()
             if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters()
               if parameter.grad is not None)
    student.zero_grad()
    return found, grads


class Count:
    """How often the heads of both models run in each training step."""

    def __init__(self):
        self.calls, self.handles = {}, []

    def watch(self, **modules):
        for name, module in modules.items():
            self.calls[name] = 0
            self.handles.append(module.register_forward_hook(
                lambda *_, name=name: self.calls.update({name: self.calls[name] + 1})))

    def remove(self):
        for handle in self.handles:
            handle.remove()


def heads(model, side):
    """Box and mask heads of a detector, stage by stage, and the predictor of its proposal head, once a level."""
    found = {f'{side} rpn': model.rpn_head.rpn_reg}
    for name in ('bbox_head', 'mask_head'):
        head = getattr(model.roi_head, name, None)
        if head is not None:
            parts = list(head) if isinstance(head, torch.nn.ModuleList) else [head]
            found.update({f'{side} {name} {index}': part for index, part in enumerate(parts)})
    return found


@pytest.mark.parametrize('kind', ['faster', 'mask', 'cascade'])
def test_training_with_a_runner(coco_root, tmp_path, kind):
    """Every method on proposals at once, two steps of a real Runner; each head of the teacher ran once a step."""
    cfg = two_stage(coco_root, tmp_path, kind)
    count, found = Count(), []

    def look(runner):
        if not count.handles:
            distiller = next(item for item in runner.hooks if type(item).__name__ == 'DistillHook').distiller
            count.watch(**heads(distiller.teacher.model, 'teacher'), **heads(runner.model, 'student'))
        else:
            found.append(dict(count.calls))

    torch.manual_seed(0)
    runner, recorder = train(cfg, [hook(teacher_config(kind, classes=2), losses_of(kind))], look=look)
    count.remove()
    names = list(losses_of(kind))
    for losses in recorder.losses:
        assert all(math.isfinite(value) for value in losses.values()), losses
        assert all(losses[name] > 0 for name in names), losses
    assert found and all(calls == {name: 5 if 'rpn' in name else 1 for name in calls} for calls in found), found
    with DefaultScope.overwrite_default_scope('mmdet'):
        plain = make_runner(two_stage(coco_root, tmp_path / 'plain', kind)).model
    assert list(runner.model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize('kind', ['faster', 'cascade'])
def test_weight_0_equals_no_hook(coco_root, tmp_path, kind):
    off = {name: dict(cfg, loss_weight=0.0) for name, cfg in losses_of(kind).items()}
    plain, first = train(two_stage(coco_root, tmp_path / 'plain', kind))
    zero, second = train(two_stage(coco_root, tmp_path / 'zero', kind), [hook(teacher_config(kind, classes=2), off)])
    assert same(weights(plain), weights(zero))
    assert [{name: value for name, value in step.items() if name in first.losses[0]} for step in second.losses] \
        == first.losses
    on, third = train(two_stage(coco_root, tmp_path / 'on', kind), [
        hook(teacher_config(kind, classes=2), losses_of(kind))])
    # The host's own losses of the first step do not know of the distillation either.
    assert all(third.losses[0][name] == value for name, value in first.losses[0].items() if name not in (
        'loss', 'grad_norm'))
    assert not same(weights(plain), weights(on))


@pytest.mark.parametrize('kind', ['faster', 'mask', 'cascade'])
def test_a_copy_of_the_student_has_nothing_to_teach(models, kind):
    student = models(kind)
    losses = {name: cfg for name, cfg in (ROWS if kind == 'faster' else {**ROWS, **MASK}).items()
              if name not in ('chen', 'rpn', 'bound', 'rpn_bound', 'dist')}
    found, _ = step(student, copy.deepcopy(student), **losses)
    for name in losses:
        assert abs(found[f'loss_{name}']) < 1e-4, (name, found[f'loss_{name}'])
    found, _ = step(student, models(kind, 1), **losses)
    assert all(found[f'loss_{name}'] > 1e-4 for name in losses), found


def test_gradients_go_where_they_should(models):
    student, teacher = models('mask'), models('mask', 1)
    for name, head, others in (('dkd', 'roi_head.bbox_head.fc_cls', ('fc_reg', 'rpn_head', 'mask_head')),
                               ('bound', 'roi_head.bbox_head.fc_reg', ('fc_cls', 'rpn_head', 'mask_head')),
                               ('rpn', 'rpn_head.rpn_cls', ('roi_head', 'rpn_reg')),
                               ('rpn_bound', 'rpn_head.rpn_reg', ('roi_head', 'rpn_cls')),
                               ('rkd', 'neck', ('roi_head', 'rpn_head')),
                               ('masks', 'roi_head.mask_head.conv_logits', ('bbox_head', 'rpn_head'))):
        _, grads = step(student, teacher, **{name: {**ROWS, **MASK}[name]})
        assert any(head in key for key in grads) and any(key.startswith('backbone') for key in grads), name
        assert not any(other in key for key in grads for other in others), name


def test_the_bound_lets_go_of_a_student_that_is_better(models):
    student, teacher = models('faster'), models('faster', 1)
    values = [step(student, teacher, bound=dict(ROWS['bound'], margin=margin), backward=False)[0]['loss_bound'].item()
              for margin in (-1e6, 0.0, 1e6)]
    assert values[0] == 0 and values[0] < values[1] < values[2]


@pytest.mark.parametrize('kind', ['faster', 'cascade'])
def test_proposals_of_the_teacher(models, kind):
    student, teacher = models(kind), models(kind, 1)
    cfg = {name: dict(ROWS[name], proposals='teacher') for name in ('defeat', 'kd', 'bound', 'hint')}
    found, grads = step(student, teacher, **cfg)
    assert all(found[f'loss_{name}'] > 0 for name in cfg)
    assert any('fc_cls' in key for key in grads)
    other, _ = step(student, teacher, defeat=ROWS['defeat'])
    assert found['loss_defeat'] != other['loss_defeat']
    found, _ = step(student, copy.deepcopy(student), kd=dict(ROWS['kd'], proposals='teacher'))
    assert abs(found['loss_kd']) < 1e-5
    # Nothing is drawn: the same step twice is the same loss, whatever the random state.
    first = step(student, teacher, kd=cfg['kd'])[0]['loss_kd']
    torch.rand(1)
    assert torch.equal(first, step(student, teacher, kd=cfg['kd'])[0]['loss_kd'])


def test_stages_of_a_cascade(models):
    student, teacher = models('cascade'), models('cascade', 1)

    def value(**options):
        return step(student, teacher, kd=dict(ROWS['kd'], **options))[0]['loss_kd'].item()

    def seeded(**options):
        torch.manual_seed(0)
        return value(**options)

    stages = [seeded(levels=[stage]) for stage in range(3)]
    assert seeded() == pytest.approx(sum(stages)) and len(set(stages)) == 3
    assert seeded(loss_weight=[1.0, 0.0, 10.0]) == pytest.approx(stages[0] + 10 * stages[2])
    plain = models('faster')
    torch.manual_seed(0)
    found, _ = step(plain, teacher, first=ROWS['kd'], last=dict(ROWS['kd'], levels=dict(student=[0], teacher=[2])))
    assert found['loss_first'] != found['loss_last']


def test_several_teachers_are_averaged(models):
    student = models('faster')
    teachers = dict(teachers={name: dict(teacher=models('faster', seed), teacher_ckpt='random')
                              for name, seed in (('a', 1), ('b', 2))})
    found, _ = step(student, None, options=teachers, both=dict(ROWS['kd'], teacher=['a', 'b']),
                    one=dict(ROWS['kd'], teacher='a'), two=dict(ROWS['kd'], teacher='b'))
    assert found['loss_both'] < max(found['loss_one'], found['loss_two'])
    assert found['loss_one'] != found['loss_two']


def test_a_teacher_of_another_normalisation(models):
    """It sees grey levels of its own, and the same pixels: the proposals are where the student has them."""
    student = models('faster')
    teacher = copy.deepcopy(student)
    teacher.data_preprocessor.std *= 2
    teacher.backbone.conv1.weight.data *= 2
    found, _ = step(student, teacher, kd=ROWS['kd'], hint=ROWS['hint'])
    teacher.backbone.conv1.weight.data /= 2
    other, _ = step(student, teacher, kd=ROWS['kd'], hint=ROWS['hint'])
    assert all(0 <= abs(found[name]) < 1e-2 * other[name] for name in ('loss_kd', 'loss_hint')), (found, other)


def test_a_student_that_teaches_itself(models):
    """teacher='self': its own head, asked again without gradient, agrees."""
    found, grads = step(models('mask'), 'self', kd=ROWS['kd'], masks=MASK['masks'])
    assert abs(found['loss_kd']) < 1e-5 and abs(found['loss_masks']) < 1e-5


def permuted(model, order):
    """The detector with its classes in another order."""
    model = copy.deepcopy(model)
    head = model.roi_head.bbox_head
    index = torch.tensor([*order, len(order)])
    head.fc_cls.weight.data, head.fc_cls.bias.data = head.fc_cls.weight.data[index], head.fc_cls.bias.data[index]
    rows = torch.cat([torch.arange(4) + 4 * position for position in order])
    head.fc_reg.weight.data, head.fc_reg.bias.data = head.fc_reg.weight.data[rows], head.fc_reg.bias.data[rows]
    masks = model.roi_head.mask_head.conv_logits
    masks.weight.data, masks.bias.data = masks.weight.data[order], masks.bias.data[order]
    return model


def test_classes_by_name(models):
    """A copy whose classes come in another order agrees, once the names say so."""
    student, order = models('mask'), [2, 0, 1]
    names = ['car', 'person', 'dog']
    teacher = permuted(student, order)
    options = dict(classes=names)
    for key, cfg in (('kd', ROWS['kd']), ('masks', MASK['masks']), ('bound', dict(type='FitNetLoss', at='@roi_boxes'))):
        for classes, equal in (('common', True), (['dog', 'person'], True), (None, False)):
            data = batch_of(student)
            distiller_options = dict(options)
            if classes is None:
                distiller_options = {}
            value = _with_classes(student, teacher, [names[position] for position in order], data, distiller_options,
                                  dict(cfg, **({} if classes is None else dict(classes=classes))))
            assert (value < 1e-5) == equal, (key, classes, value)


def _with_classes(student, teacher, theirs, data, options, cfg):
    student.train()
    built = Teacher(teacher, student, 'copy', theirs if options else None)
    distiller = Distiller(student, built.model, dict(loss_x={key: value for key, value in cfg.items()
                                                             if key != 'classes'}), scope='mmdet')
    if options:
        term = distiller.terms['loss_x']
        term.classes = cfg.get('classes')
        term.map_classes('teacher', options['classes'], theirs)
    distiller.attach()
    try:
        return student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')['loss_x'].item()
    finally:
        distiller.detach()


@pytest.mark.parametrize('place', ['@roi_logits', '@roi_boxes', '@roi_masks'])
def test_other_classes_are_an_error(models, place):
    loss = dict(type='SoftmaxKDLoss' if place == '@roi_logits' else 'FitNetLoss', at=place)
    teacher = teacher_config('mask', classes=4)
    teacher['train_dataloader'] = dict(dataset=dict(metainfo=dict(classes=('a', 'b', 'c', 'd'))))
    with pytest.raises(ValueError, match=r"same classes in the same order.*Student \(3\): a, b, x.*classes='common'"):
        Distiller(models('mask'), teacher, dict(loss_x=loss), teacher_ckpt='random', scope='mmdet',
                  classes=('a', 'b', 'x'))
    Distiller(models('mask'), teacher, dict(loss_x=dict(loss, classes='common')), teacher_ckpt='random',
              scope='mmdet', classes=('a', 'b', 'x'))
    # Objectness and features know no classes.
    Distiller(models('mask'), teacher, dict(loss_x=dict(type='SoftmaxKDLoss', at='@rpn_logits'),
                                            loss_y=dict(type='FitNetLoss', at='@roi_features')),
              teacher_ckpt='random', scope='mmdet', classes=('a', 'b', 'x'))


def test_images_without_objects(models):
    student, teacher = models('mask'), models('mask', 1)
    data = batch_of(student)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    found, _ = step(student, teacher, data, **ROWS, **MASK)
    assert found['loss_bound'] == found['loss_masks'] == 0 and found['loss_dkd'] > 0 and found['loss_defeat'] > 0
    assert all(torch.isfinite(found[f'loss_{name}']) for name in {**ROWS, **MASK})


def test_without_task_losses(models):
    """task_loss_weight=0: the host samples its proposals all the same."""
    found, grads = step(models('faster'), models('faster', 1), kd=ROWS['kd'], options=dict(task_loss_weight=0))
    assert found['loss_kd'] > 0 and found['loss_cls'] == 0 and any('fc_cls' in key for key in grads)


def test_a_backbone_without_a_neck():
    """As C4 has it: the RoI head takes what the backbone returns."""
    cfg = two_stage_config('faster')
    base = copy.deepcopy(cfg.model.to_dict())
    base.pop('neck')
    base['backbone'].update(num_stages=3, out_indices=(2, ), strides=(1, 2, 2), dilations=(1, 1, 1))
    base['rpn_head'].update(in_channels=32)
    base['rpn_head']['anchor_generator'].update(scales=[2, 4, 8], strides=[16])
    base['roi_head']['bbox_roi_extractor'].update(out_channels=32, featmap_strides=[16])
    base['roi_head']['bbox_head'] = dict(type='BBoxHead', with_avg_pool=True, roi_feat_size=7, in_channels=32,
                                         num_classes=3)
    models = [build_model(Config(dict(model=base, default_scope='mmdet')), 'mmdet').train() for _ in range(2)]
    found, grads = step(*models, kd=ROWS['kd'], hint=ROWS['hint'], rpn=ROWS['rpn'])
    assert all(found[f'loss_{name}'] > 0 for name in ('kd', 'hint', 'rpn'))


@pytest.mark.parametrize('loss, message', [
    (dict(ROWS['kd'], at='@roi_logit'), "'@roi_logit' is no place"),
    (dict(ROWS['kd'], at=['@roi_logits', 'neck']), 'stands alone'),
    (dict(type='SoftmaxKDLoss', student_at='@roi_logits', teacher_at='roi_head.bbox_head.fc_cls'),
     "write at='@roi_logits'"),
    (dict(ROWS['hint'], region=dict(type='GTBoxRegion')), 'GTBoxRegion looks at images'),
    (dict(type='MimicLoss', at='@roi_features'), 'MimicLoss looks at images'),
    (dict(ROWS['kd'], proposals='both'), "'student', 'teacher'"),
    (dict(ROWS['rpn'], proposals='teacher'), 'at a place of RoIs'),
    (dict(type='FitNetLoss', at='neck', proposals='student'), 'at a place of RoIs'),
    (dict(ROWS['kd'], levels=[1]), r'the RoI head of the student has 1 stage'),
    (dict(ROWS['rpn'], levels=[0]), 'remove levels'),
    (dict(ROWS['kd'], levels=dict(student=[0], teacher=[0, 0])), 'of one length'),
    (dict(MASK['masks']), 'StandardRoIHead has no mask head'),
    (dict(ROWS['hint'], classes='common'), 'is for logit losses'),
    (dict(ROWS['chen'], at='neck'), 'rows of proposals are needed'),
    (dict(ROWS['bound'], at='@roi_logits'), 'needs the target of every box')])
def test_bad_configs_say_what_is_wrong(models, loss, message):
    with pytest.raises(ValueError, match=message):
        Distiller(models('faster'), models('faster', 1), dict(loss_x=loss), scope='mmdet')


def test_models_that_do_not_fit(models):
    with pytest.raises(ValueError, match='teacher RetinaNet has no RoI head'):
        Distiller(models('faster'), build_head('retinanet'), dict(loss_x=ROWS['kd']), scope='mmdet')
    with pytest.raises(ValueError, match='student RetinaNet has no RPNHead'):
        Distiller(build_head('retinanet'), models('faster', 1), dict(loss_x=ROWS['rpn']), scope='mmdet')
    other = copy.deepcopy(models('faster', 1))
    other.rpn_head.prior_generator.base_anchors[0] *= 2
    with pytest.raises(ValueError, match='different anchors'):
        Distiller(models('faster'), other, dict(loss_x=ROWS['rpn']), scope='mmdet')
    sparse = build_model(Config.fromfile(str(zoo_config('mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'))), 'mmdet')
    with pytest.raises(ValueError, match='teacher: SparseRoIHead needs more than features and proposals'):
        Distiller(models('faster'), sparse, dict(loss_x=ROWS['kd']), scope='mmdet')
    wide = build_two_stage('faster', classes=5)
    with pytest.raises(ValueError, match='4 logits .* and the teacher 6'):
        Distiller(models('faster'), wide, dict(loss_x=ROWS['kd']), scope='mmdet')


def test_building_leaves_the_random_state_alone(models):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Distiller(models('faster'), models('faster', 1), {f'loss_{name}': cfg for name, cfg in ROWS.items()},
              scope='mmdet')
    assert torch.equal(before, torch.get_rng_state())
