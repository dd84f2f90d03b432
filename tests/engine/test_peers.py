"""A peer is a second pair of roles: whatever a term gets in one direction its mirror gets in the other."""

import copy

import pytest
import torch
from stock import detector, hook, teacher_of, train
from two_stage import two_stage_config

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.preflight import random_data
from kd_mm.engine.term import STUDENT
from kd_mm.hosts.models import build_model, load_config
from kd_mm.ops.modes import preserved_random_state

LOSSES = {
    'score region': dict(type='FRSLoss', at='neck', region=dict(
        type='TeacherScoreRegion', logits_at='bbox_head.retina_cls')),
    'gap region': dict(type='PFILoss', at='neck', region=dict(
        type='PredictionGapRegion', logits_at='bbox_head.retina_cls')),
    'margins of the norm': dict(type='OFDLoss', at='backbone.layer4.1.bn1', margin='norm', adapter=None),
    'margins by themselves': dict(type='OFDLoss', at='backbone.layer4.1.bn1', margin='auto', adapter=None),
    'instances': dict(type='GIDLoss', at='neck', heads_at='bbox_head', count=3),
    'assignment': dict(type='BCKDLoss', at='bbox_head'),
    'logits': dict(type='SigmoidKDLoss', at='@logits'),
    'two places': dict(type='FitNetLoss', student_at='backbone.layer3', teacher_at='backbone.layer4'),
}


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path)


def two_stage_of(width=16):
    cfg = two_stage_config('faster', width=width, classes=2)
    return dict(model=cfg.model.to_dict(), default_scope='mmdet')


def model_of(cfg, seed):
    with preserved_random_state(seed):
        model = build_model(load_config(cfg)[0], 'mmdet')
        model.init_weights()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # otherwise all margins and scales are alike
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def evaluated(student, config, state, losses, data):
    """(learner, total) of every term in one step of a student with a peer."""
    kd = Distiller(student, dict(type='PeerTeacher', config=config), losses, teacher_ckpt='random', scope='mmdet')
    kd.teacher.model.load_state_dict(state)
    for term in kd.current.terms:  # margins and adapters for these weights
        term.eval()
    student.train()
    for model in (student, kd.teacher.model):
        model.apply(lambda module: setattr(module, 'momentum', 0.0) if hasattr(module, 'momentum') else None)
    with kd.current.open(data['inputs'], copy.deepcopy(data['data_samples'])) as step:
        student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        step.hear()
        return {comparison.term.learner: (step.evaluate(comparison).total.item(), comparison)
                for comparison in step.read()}


@pytest.mark.parametrize('kind', [kind for kind in LOSSES if 'margins' not in kind and kind != 'two places'])
def test_the_mirror_is_the_term_with_the_models_exchanged(det, kind):
    config = teacher_of(det)
    one, two = (model_of(config, seed) for seed in (1, 2))
    states = [copy.deepcopy(model.state_dict()) for model in (one, two)]
    data = random_data(one, (64, 64))
    there = evaluated(one, config, states[1], dict(loss_kd=LOSSES[kind]), data)
    two.load_state_dict(states[1])
    back = evaluated(two, config, states[0], dict(loss_kd=LOSSES[kind]), data)
    assert set(there) == set(back) == {STUDENT, 'teacher'}
    assert there[STUDENT][0] == pytest.approx(back['teacher'][0], rel=1e-5)
    assert there['teacher'][0] == pytest.approx(back[STUDENT][0], rel=1e-5)
    if kind in ('score region', 'assignment', 'logits'):  # the others are symmetric
        assert there[STUDENT][0] != pytest.approx(there['teacher'][0], rel=1e-5)


@pytest.mark.parametrize('kind', LOSSES)
def test_both_learn_in_real_training(det, kind):
    entry = hook(dict(type='PeerTeacher', config=teacher_of(det)), dict(loss_kd=LOSSES[kind]))
    runner, record = train(det, [entry])
    assert all(step['loss_kd'] > 0 and step['peer_total'] > step['peer_task'] > 0 for step in record.losses)


def test_margins_are_those_of_the_side_that_is_learned_from(det):
    student = model_of(teacher_of(det), 1)
    kd = Distiller(student, dict(type='PeerTeacher', config=teacher_of(det)), dict(
        loss_kd=LOSSES['margins by themselves']), teacher_ckpt='random', scope='mmdet')
    mine, mirror = (term.loss for term in kd.current.terms)
    assert hasattr(mine, 'margin_0') and hasattr(mirror, 'margin_0')
    assert not torch.equal(mine.margin_0, mirror.margin_0)


@pytest.mark.parametrize('place, kind', [
    ('@roi_logits', 'SoftmaxKDLoss'), ('@roi_boxes', 'FitNetLoss'), ('@rpn_logits', 'SoftmaxKDLoss'),
    ('@roi_features', 'FitNetLoss')])
def test_rows_of_proposals_go_both_ways(place, kind):
    """Each side is asked about the proposals of the one that learns, with the labels of its own sampling."""
    config = two_stage_of()
    student = model_of(config, 1)
    kd = Distiller(student, dict(type='PeerTeacher', config=config), dict(loss_kd=dict(type=kind, at=place)),
                   teacher_ckpt='random', scope='mmdet')
    peer = kd.teacher.model
    student.train()
    data = random_data(student, (64, 64))
    before = {name: value.clone() for name, value in peer.named_buffers()}
    with kd.current.open(**data) as step:
        running = {name: value.clone() for name, value in peer.named_buffers()}
        student(**data, mode='loss')
        step.hear()
        comparisons = {comparison.term.learner: comparison for comparison in step.read()}
        for comparison in comparisons.values():
            assert step.evaluate(comparison).total.requires_grad
        # A head that is asked keeps its statistics: it does not train on the other's proposals.
        assert all(torch.equal(value, running[name]) for name, value in peer.named_buffers())
    assert set(comparisons) == {STUDENT, 'teacher'} and before.keys() == running.keys()
    for comparison in comparisons.values():
        assert comparison.student[0].requires_grad and not comparison.teacher[0].requires_grad


def test_what_does_not_go_both_ways_names_the_peer(det):
    def build(**loss):
        return Distiller(model_of(teacher_of(det), 1), dict(type='PeerTeacher', config=teacher_of(det)),
                         dict(loss_kd=loss), teacher_ckpt='random', scope='mmdet')

    with pytest.raises(ValueError, match="CrossKDLoss sends the student through the head .* the peer 'teacher' does"):
        build(type='CrossKDLoss', at='bbox_head')
    with pytest.raises(ValueError, match=r"the peer 'teacher' learning from the student\): student has no module"):
        build(type='FRSLoss', at='neck', region=dict(type='TeacherScoreRegion', logits_at='bbox_head.nothing'))


def test_levels_are_paired_for_the_region_too(det):
    """RetinaNet (strides 8 to 128) from the proposal scores of Faster R-CNN (4 to 64), as its docstring says."""
    student = model_of(teacher_of(det), 1)
    kd = Distiller(student, two_stage_of(), dict(loss_frs=dict(
        type='FRSLoss', at='neck', region=dict(type='TeacherScoreRegion', logits_at='rpn_head.rpn_cls'))),
        teacher_ckpt='random', scope='mmdet')
    student.train()
    data = random_data(student, (64, 64))
    with kd.current.open(**data) as step:
        student(**data, mode='loss')
        step.hear()
        comparison, = step.read()
        assert len(comparison.student) == 4
        for feature, logits in zip(comparison.student, comparison.batch.given.teacher_logits):
            assert logits.shape[2:] == feature.shape[2:] and logits.shape[1] == 3
        assert step.evaluate(comparison).total > 0


def test_a_peer_draws_numbers_of_its_own(det):
    """Two equal models drop different units, and a step draws the same when it is repeated."""
    config = teacher_of(det)
    student = model_of(config, 1)
    kd = Distiller(student, dict(type='PeerTeacher', config=config), dict(loss_kd=LOSSES['logits']),
                   teacher_ckpt='random', scope='mmdet')
    drawn = []
    kd.teacher.model.backbone.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3)))
    student.backbone.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3)))
    student.train()
    data = random_data(student, (64, 64))
    for number in (5, 5, 6):
        kd.step = number
        torch.manual_seed(0)
        with kd.current.open(**data):
            student(**data, mode='loss')
    peer, own = drawn[::2], drawn[1::2]
    assert torch.equal(peer[0], peer[1]) and not torch.equal(peer[0], peer[2])
    assert torch.equal(own[0], own[1]) and torch.equal(own[0], own[2]) and not torch.equal(own[0], peer[0])
