"""Losses on whole heads in a training step of every kind of dense head that mmdet has."""

import copy

import pytest
import torch
from heads import CONFIGS, batch_of, build_head
from mmengine.logging import MessageHub
from stock import learned, traces, without_objects

from kd_mm.engine.distiller import Distiller
from kd_mm.teachers.base import Teacher

TRAINABLE = [name for name in CONFIGS if name != 'paa']  # PAA needs sklearn to assign
TOWERS = [name for name in TRAINABLE if name != 'tood']
BCKD = dict(type='BCKDLoss', at='bbox_head')
CROSSKD = dict(type='CrossKDLoss', at='bbox_head')
LD = dict(type='LDLoss', at='bbox_head')
RM = dict(type='RMLoss', at='bbox_head')


@pytest.fixture(scope='module')
def models():
    built = {}

    def get(name):
        MessageHub.get_current_instance().update_info('epoch', 0)
        if name not in built:
            built[name] = build_head(name), build_head(name, seed=1), batch_of(build_head(name))
        return built[name]

    return get


def distilled(models, name, **losses):
    """One training step: the losses, the gradient of the distillation terms by parameter, and what was called."""
    student, teacher, data = models(name)
    student.train().zero_grad()
    distiller = Distiller(student, teacher, {f'loss_{key}': value for key, value in losses.items()}, scope='mmdet')
    calls = dict(assign=0, teacher_head=0, student_head=0)
    head = student.bbox_head
    assigner = getattr(head, 'cls_assigner', None) or getattr(head, 'assigner', None)
    before = traces(student)
    handles = [module.register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
               for key, module in (('teacher_head', teacher.bbox_head), ('student_head', head))]
    if assigner is not None:
        original = assigner.assign

        def assign(*args, **kwargs):
            calls['assign'] += 1
            return original(*args, **kwargs)

        assigner.assign = assign
    distiller.attach()
    try:
        found = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
        for handle in handles:
            handle.remove()
        if assigner is not None:
            del assigner.assign
    calls['assigner'] = assigner is not None
    assert traces(student) == before
    total = sum(found[f'loss_{key}'] for key in losses)
    total.backward()
    grads = learned(student, teacher)
    return found, grads, calls


def check(found, grads, calls, passes, losses):
    for name in losses:
        assert torch.isfinite(found[f'loss_{name}']) and found[f'loss_{name}'] > 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert any(key.startswith('backbone') for key in grads) and any(key.startswith('bbox_head') for key in grads)
    # The host assigns once an image, and nobody else does; no head runs twice but in the cross-head pass.
    assert calls['student_head'] == 1 and calls['teacher_head'] == passes
    assert calls['assign'] == (2 if calls['assigner'] else 0)


@pytest.mark.parametrize('name', TRAINABLE)
def test_bckd(models, name):
    found, grads, calls = distilled(models, name, bckd=BCKD)
    check(found, grads, calls, 0, ['bckd'])


@pytest.mark.parametrize('name', TOWERS)
def test_crosskd(models, name):
    found, grads, calls = distilled(models, name, crosskd=CROSSKD)
    check(found, grads, calls, 1, ['crosskd'])
    # The student's predictors hear the ground truth alone, its towers before the crossing the teacher too.
    predictors = [key for key in grads if any(part in key for part in (
        'gfl_', 'retina_', 'conv_cls', 'conv_reg', 'atss_', 'rtm_', 'conv_centerness', 'conv_obj', 'cls_score',
        'bbox_pred', 'object_pred', 'scales', 'vfnet_reg.', 'vfnet_cls.'))]
    assert predictors == []


def test_crosskd_gradient_stops_at_the_crossing(models):
    _, grads, _ = distilled(models, 'gfl', crosskd=CROSSKD)
    convs = {key.split('.')[2] for key in grads if 'cls_convs' in key}
    assert convs == {'0', '1', '2'}
    _, grads, _ = distilled(models, 'gfl', crosskd=dict(CROSSKD, index=1))
    assert {key.split('.')[2] for key in grads if 'reg_convs' in key} == {'0'}


@pytest.mark.parametrize('options', [{}, dict(bins='mean', normalise=False), dict(valuable_weight=0)])
def test_ld(models, options):
    found, grads, calls = distilled(models, 'gfl', ld=dict(LD, **options))
    check(found, grads, calls, 0, ['ld'])
    assert any('gfl_reg' in key for key in grads) and not any('gfl_cls' in key for key in grads)


# RTMDet and YOLOX give an object of an untrained model one prior, and there is no order of one.
@pytest.mark.parametrize('name', [name for name in TRAINABLE if name not in ('fovea', 'rtmdet', 'yolox')])
def test_rank_mimicking(models, name):
    found, grads, calls = distilled(models, name, rm=RM)
    check(found, grads, calls, 0, ['rm'])
    if name != 'vfnet':  # its class branch looks where its boxes say
        assert not any(part in key for key in grads for part in ('_reg.', 'conv_reg'))


def test_several_losses_share_one_pass(models):
    """Also with a plain loss at a tap of the same head, and at the head itself."""
    found, grads, calls = distilled(models, 'gfl', ld=LD, bckd=BCKD, crosskd=CROSSKD, kd=dict(
        type='SigmoidKDLoss', at='bbox_head.gfl_cls'), hint=dict(type='FitNetLoss', at='neck'))
    check(found, grads, calls, 1, ['ld', 'bckd', 'crosskd', 'kd', 'hint'])


def test_weight_of_one_level(models):
    alone = distilled(models, 'gfl', bckd=dict(BCKD, loss_weight=[1, 0, 0, 0, 0]))[0]['loss_bckd']
    both = distilled(models, 'gfl', bckd=dict(BCKD, loss_weight=[1, 0, 0, 0, 1]))[0]['loss_bckd']
    assert 0 < alone < both


def test_images_without_objects(models):
    student, teacher, data = models('gfl')
    held = dict(gfl=(student, teacher, without_objects(data)))
    found, grads, _ = distilled(held.get, 'gfl', ld=LD, bckd=BCKD, crosskd=CROSSKD)
    assert found['loss_ld'] == 0 and found['loss_bckd'] > 0 and found['loss_crosskd'] > 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_same_weights_give_nothing_to_learn(models):
    """A copy of the student in eval as teacher: cross-head predictions and decoded boxes are the teacher's."""
    student, _, data = models('gfl')
    held = dict(gfl=(student, copy.deepcopy(student), data))
    found, grads, _ = distilled(held.get, 'gfl', ld=LD, bckd=dict(BCKD, divergence='kl'),
                                crosskd=dict(CROSSKD, divergence='kl'))
    # The head has group norm only; the backbone keeps its statistics (norm_eval).
    for name in ('ld', 'bckd', 'crosskd'):
        assert found[f'loss_{name}'] < 1e-4, found


def test_bfloat16(models):
    student, teacher, data = models('gfl')
    plain = distilled(models, 'gfl', ld=LD, bckd=BCKD, crosskd=CROSSKD)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = distilled(models, 'gfl', ld=LD, bckd=BCKD, crosskd=CROSSKD)[0]
    for name in ('loss_ld', 'loss_bckd', 'loss_crosskd'):
        assert half[name].dtype == torch.float32 and half[name].item() == pytest.approx(plain[name].item(), rel=0.2)


@pytest.mark.parametrize('losses, message', [
    (dict(x=dict(LD, at='neck')), "student 'neck'|FPN does not assign"),
    (dict(x=dict(LD, at='@logits')), 'is no path of a head'),
    (dict(x=dict(LD, at='bbox_head.loss')), 'is a method'),
    (dict(x=dict(LD, levels=[0])), 'remove levels'),
    (dict(x=dict(LD, region=dict(type='GTBoxRegion'))), 'remove region'),
    (dict(x=dict(CROSSKD, index=9)), 'index=9 must be from 1'),
    (dict(x=dict(BCKD, student_at='nothing', at=None, teacher_at='bbox_head')), "no module 'nothing'")])
def test_bad_configs_say_what_is_wrong(models, losses, message):
    student, teacher, _ = models('gfl')
    with pytest.raises(ValueError, match=message):
        Distiller(student, teacher, {f'loss_{key}': value for key, value in losses.items()}, scope='mmdet')


def test_heads_that_do_not_fit(models):
    student = models('gfl')[0]
    for name, loss, message in (('retinanet', BCKD, 'same number of anchors'), ('atss', LD, 'no box distributions'),
                                ('retinanet', CROSSKD, 'same kind of head|differ'),
                                ('yolox', BCKD, 'levels of|same strides')):
        with pytest.raises(ValueError, match=message):
            Distiller(student, models(name)[1], dict(loss_x=loss), scope='mmdet')
    with pytest.raises(ValueError, match='does not tell which object'):
        Distiller(models('fovea')[0], models('fovea')[1], dict(loss_x=RM), scope='mmdet')
    with pytest.raises(ValueError, match='TOODHead has no towers'):
        Distiller(models('tood')[0], models('tood')[1], dict(loss_x=CROSSKD), scope='mmdet')


@pytest.mark.parametrize('name', ['retinanet', 'fcos', 'gfl', 'yolox'])
def test_gid_chooses_its_instances(models, name):
    """Where both heads differ, in each step anew and without labels; nothing runs twice."""
    student, teacher, data = models(name)
    data = copy.deepcopy(data)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    held = {name: (student, teacher, data)}
    gid = dict(type='GIDLoss', at='neck', heads_at='bbox_head', count=5)
    found, grads, calls = distilled(held.get, name, gid=gid, kd=dict(type='FitNetLoss', at='neck'))
    assert found['loss_gid'] > 0 and calls['student_head'] == 1 and calls['teacher_head'] == 0
    assert any(key.startswith('neck') for key in grads) and not any(key.startswith('bbox_head') for key in grads)
    truth = distilled(held.get, name, gid=dict(gid, heads_at=None))[0]
    assert truth['loss_gid'] == 0


def test_gid_needs_heads_that_fit(models):
    for other, loss, message in (('gfl', dict(heads_at='bbox_head'), 'have other priors'),
                                 ('retinanet', dict(heads_at='head'), "no module 'head'"),
                                 ('retinanet', dict(heads_at='neck'), "none. In RetinaNet it is 'bbox_head'")):
        with pytest.raises(ValueError, match=message):
            Distiller(models('retinanet')[0], models(other)[1], dict(loss_x=dict(type='GIDLoss', at='neck', **loss)),
                      scope='mmdet')


def test_building_leaves_no_trace_on_the_host(models):
    """DDOD counts its positives in a list; the dry pass must not be counted."""
    student, teacher, _ = models('ddod')
    before = list(student.bbox_head.cls_num_pos_samples_per_level)
    Distiller(student, teacher, dict(loss_x=BCKD), scope='mmdet')
    assert student.bbox_head.cls_num_pos_samples_per_level == before


def test_no_head_in_the_checkpoint(models):
    student, teacher, _ = models('gfl')
    distiller = Distiller(student, teacher, dict(loss_x=CROSSKD, loss_y=LD), scope='mmdet')
    assert list(distiller.parameters()) == [] and distiller.trainable_modules().state_dict() == {}
    assert isinstance(distiller.teacher, Teacher)

