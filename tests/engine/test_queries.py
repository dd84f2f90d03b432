"""Losses on queries in training steps of every DETR-type detector that mmdet has."""

import copy

import pytest
import torch
from conftest import write_coco
from detrs import CONFIGS, LAYERS, batch_of, build_detr, detr_config
from mmengine.config import Config
from stock import coco_data, finish, hook, learned, merge, traces, train, without_objects

from kd_mm.engine.distiller import Distiller

LOGITS = dict(type='DETRDistillLogitsLoss', at='bbox_head')
FEATURE = dict(type='DETRDistillFeatureLoss', at='bbox_head')
PRIOR = dict(type='DETRDistillQueryPriorLoss', at='bbox_head')
POINTS = dict(type='KDDETRLoss', at='bbox_head', general=7)
MEMORY = dict(type='FitNetLoss', at='@memory', region=dict(type='GTBoxRegion'))
SHARING = [name for name in CONFIGS if name not in ('ddq', 'detr')]  # DETR's classes are a softmax


@pytest.fixture(scope='module')
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = build_detr(name), build_detr(name, seed=1, base=12, queries=17), batch_of(build_detr(name))
        return built[name]

    return get


def distilled(models, name, **losses):
    """One training step: the losses, the gradients of the distillation terms, and how often the parts ran."""
    student, teacher, data = models(name)
    student.train().zero_grad()
    distiller = Distiller(student, teacher, {f'loss_{key}': value for key, value in losses.items()}, scope='mmdet',
                          speed='exact')  # another form is compared with this one in its first step: two passes
    before, calls, handles = traces(student), {}, []
    for side, model in (('student', student), ('teacher', teacher)):
        for part in ('backbone', 'encoder', 'decoder', 'bbox_head'):
            key = f'{side}_{part}'
            calls[key] = 0
            handles.append(getattr(model, part).register_forward_hook(
                lambda *_, key=key: calls.update({key: calls[key] + 1})))
    torch.manual_seed(0)
    distiller.attach()
    try:
        found = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
        for handle in handles:
            handle.remove()
    assert traces(student) == before
    sum(found[f'loss_{key}'] for key in losses).backward()
    grads = learned(student, teacher)
    for key in losses:
        assert torch.isfinite(found[f'loss_{key}']) and found[f'loss_{key}'] > 0, key
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert any(key.startswith('backbone') for key in grads) and any(key.startswith('neck') for key in grads)
    return found, grads, calls


def passes(calls, student, teacher):
    """Backbone and encoder run once, decoder and head as often as said."""
    assert calls['student_backbone'] == calls['teacher_backbone'] == 1
    assert calls['student_encoder'] == calls['teacher_encoder'] == 1
    assert (calls['student_decoder'], calls['teacher_decoder']) == (student, teacher)
    # The tensor forward calls the teacher's head past its hooks; a shared pass does not.
    assert (calls['student_bbox_head'], calls['teacher_bbox_head']) == (student, teacher - 1)


@pytest.mark.parametrize('name', CONFIGS)
def test_matched_logits(models, name):
    _, grads, calls = distilled(models, name, logits=LOGITS)
    passes(calls, 1, 1)
    assert any(key.startswith('bbox_head') for key in grads)


@pytest.mark.parametrize('name', ['dab', 'deformable', 'ddq'])
def test_target_aware_features(models, name):
    _, grads, calls = distilled(models, name, feature=FEATURE)
    passes(calls, 1, 1)
    assert any(key.startswith('encoder') for key in grads)
    assert not any(key.startswith(('decoder', 'bbox_head')) for key in grads)


def test_target_aware_features_of_the_neck(models):
    _, grads, calls = distilled(models, 'deformable', feature=dict(FEATURE, features='neck'))
    passes(calls, 1, 1)
    assert {key.split('.')[0] for key in grads} == {'backbone', 'neck'}


@pytest.mark.parametrize('name', ['detr', 'dab', 'dino'])
def test_memory_by_any_feature_loss(models, name):
    _, grads, calls = distilled(models, name, memory=MEMORY)
    # The teacher stops behind its encoder.
    assert calls['teacher_decoder'] == 0 and calls['student_decoder'] == 1
    assert not any(key.startswith(('decoder', 'bbox_head')) for key in grads)


@pytest.mark.parametrize('name', SHARING)
def test_query_prior(models, name):
    _, grads, calls = distilled(models, name, prior=PRIOR)
    passes(calls, 2, 1)
    assert any(key.startswith('decoder') for key in grads)
    # Its queries are the teacher's: the student's own learn nothing from it.
    assert not any(key.startswith(('query_embedding', 'reference_points_fc', 'dn_query_generator')) for key in grads)


@pytest.mark.parametrize('name', [*SHARING, 'detr'])
def test_shared_points(models, name):
    _, grads, calls = distilled(models, name, points=POINTS)
    passes(calls, 3, 2)
    assert not any(key.startswith(('query_embedding', 'reference_points_fc', 'dn_query_generator')) for key in grads)


def test_the_teacher_does_not_decode_its_own_points_again(models):
    _, _, calls = distilled(models, 'dab', points=dict(POINTS, points='specific'))
    passes(calls, 2, 1)


def test_everything_together(models):
    _, _, calls = distilled(models, 'dino', logits=LOGITS, feature=FEATURE, prior=PRIOR, points=POINTS, memory=MEMORY,
                            hint=dict(type='PKDLoss', at='neck'))
    passes(calls, 4, 2)


def test_a_copy_has_nothing_to_learn(models):
    """A DINO without dropout and its copy: same points, same predictions (but for boxes cut off at the border)."""
    student, _, data = models('dino')
    held = student, copy.deepcopy(student), data
    distiller = Distiller(held[0], held[1], dict(
        loss_points=POINTS, loss_logits=dict(
            LOGITS, divergence='kl', l1_weight=0, giou_weight=0, match_weights=(1, 0, 0)),
        loss_feature=FEATURE), scope='mmdet')
    student.train()
    distiller.attach()
    try:
        found = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
    for name in ('points', 'logits', 'feature'):
        assert found[f'loss_{name}'] < 1e-3, (name, found[f'loss_{name}'])


def test_weight_of_one_layer(models):
    first = distilled(models, 'dab', logits=dict(LOGITS, loss_weight=[1, 0]))[0]['loss_logits']
    both = distilled(models, 'dab', logits=dict(LOGITS, loss_weight=[1, 1]))[0]['loss_logits']
    assert 0 < first < both


def test_images_without_objects(models):
    student, teacher, data = models('dino')
    held = dict(dino=(student, teacher, without_objects(data)))
    distilled(held.get, 'dino', logits=LOGITS, feature=FEATURE, prior=PRIOR, points=POINTS)


def test_bfloat16(models):
    plain = distilled(models, 'dino', logits=LOGITS, feature=FEATURE, points=POINTS)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = distilled(models, 'dino', logits=LOGITS, feature=FEATURE, points=POINTS)[0]
    for name in ('loss_logits', 'loss_feature', 'loss_points'):
        assert half[name].dtype == torch.float32 and half[name].item() == pytest.approx(plain[name].item(), rel=0.3)


@pytest.mark.parametrize('student, teacher, loss, message', [
    ('ddq', 'ddq', POINTS, 'the decoder of the student DDQDETR takes no queries but its own'),
    ('dab', 'dino', PRIOR, 'queries can be shared between detectors of one kind only'),
    ('detr', 'dab', LOGITS, r'4 class logits of DETRHead \(softmax\) and 3 of DABDETRHead \(sigmoid\)'),
    ('detr', 'detr', PRIOR, 'softmax classes'),
    ('dab', 'dino', FEATURE, 'must have the same shapes'),
    ('dab', 'dab', dict(LOGITS, levels=[0]), 'remove levels'),
    ('dab', 'dab', dict(LOGITS, at='neck'), "'neck' .ChannelMapper. is none. In DABDETR it is 'bbox_head'"),
])
def test_what_does_not_fit(models, student, teacher, loss, message):
    with pytest.raises(ValueError, match=message):
        Distiller(models(student)[0], models(teacher)[1], dict(loss_x=loss), scope='mmdet')


# ---------------------------------------------------------------- a Runner


def runner_config(name, root, work_dir, steps=2) -> Config:
    cfg = detr_config(name, classes=2)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.batch_sampler = None
    merge(cfg, coco_data(root, batch=2))
    cfg = finish(cfg, work_dir, steps, by_epoch=False)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4),
                             clip_grad=dict(max_norm=0.1, norm_type=2))
    return cfg


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('coco'), images=4)


@pytest.mark.parametrize('name', ['deformable', 'dab', 'dino'])
def test_training_by_a_runner(root, tmp_path, name):
    cfg = runner_config(name, root, tmp_path)
    teacher = dict(model=detr_config(name, base=12, classes=2, queries=17).model.to_dict(), default_scope='mmdet')
    losses = dict(loss_logits=LOGITS, loss_feature=FEATURE, loss_prior=PRIOR, loss_points=POINTS, loss_memory=MEMORY)
    plain, _ = train(cfg)
    runner, recorder = train(cfg, [hook(teacher, losses)])
    assert len(recorder.losses) == 2
    for step in recorder.losses:
        assert all(step[key] > 0 and step[key] < float('inf') for key in losses), step
        assert f'd{LAYERS - 2}.loss_cls' in step
    assert list(runner.model.state_dict()) == list(plain.model.state_dict())
    changed = [key for key, value in runner.model.state_dict().items()
               if not torch.equal(value, plain.model.state_dict()[key])]
    assert any('backbone' in key for key in changed) and any('encoder' in key for key in changed)
