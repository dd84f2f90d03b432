"""Where a teacher may come from, and pairs that do not match, each on a real Runner."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from stock import coco_data, detector, hook, make_runner, merge, segmentor, teacher_of, train
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import DistillHook
from kd_mm.engine.preflight import random_data
from kd_mm.hosts.models import build_model, load_config
from kd_mm.hosts.zoo import zoo_config

CWD = dict(type='CWDLoss', at='neck')


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path)


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path)


def wide(cfg, neck=24):
    return teacher_of(cfg, neck=dict(out_channels=neck), bbox_head=dict(in_channels=neck, feat_channels=neck))


def distiller_of(runner):
    return next(item for item in runner.hooks if isinstance(item, DistillHook)).distiller


def student_of(cfg):
    model = build_model(load_config(cfg.to_dict())[0], cfg.default_scope)
    model.init_weights()
    return model


# -------------------------------------------------------------------------------------------- several teachers


def test_each_loss_has_its_teacher(det):
    teachers = dict(big=dict(teacher=wide(det), teacher_ckpt='random'),
                    small=dict(teacher=teacher_of(det), teacher_ckpt='random'))
    losses = dict(loss_big=dict(CWD, teacher='big'), loss_small=dict(CWD, teacher='small'),
                  loss_late=dict(CWD, teacher='small', loss_weight=dict(type='WindowSchedule', windows=[(1, None)])))
    entry = dict(type='kd_mm.DistillHook', teachers=teachers, losses=losses)
    runs = []
    runner, record = train(det, [entry], lambda r: runs.append(
        [distiller_of(r).teachers[name].runs for name in teachers]))
    distiller = distiller_of(runner)
    assert runs == [[2, 2], [3, 3]]  # the dry pass, then once a step however many losses ask
    assert distiller.terms['loss_big'].adapter is not None and distiller.terms['loss_small'].adapter is None
    assert all(step['loss_big'] > 0 and step['loss_small'] > 0 for step in record.losses)


def test_averaged_teachers(det):
    model = student_of(det)
    config = teacher_of(det)
    teachers = {name: dict(teacher=config, teacher_ckpt='random') for name in ('a', 'b')}
    logits = dict(type='SigmoidKDLoss', at='@logits')
    distiller = Distiller(model, None, dict(
        loss_both=dict(logits, teacher=['a', 'b']), loss_a=dict(logits, teacher='a')), teachers=teachers)
    with torch.no_grad():
        for parameter in distiller.teachers['b'].model.parameters():
            parameter.mul_(1.5)
    model.train()
    data = random_data(model, (64, 64))
    with distiller.current.open(**data) as step:
        model(**data, mode='loss')
        step.hear()
        outputs = {comparison.term.name[len('loss_'):]: comparison.teacher for comparison in step.read()}
    expected = []
    for teacher in distiller.teachers.values():
        with torch.no_grad():
            features = teacher.model.extract_feat(data['inputs'])
            expected.append(teacher.model.bbox_head(features)[0])
    for got, one, two in zip(outputs['both'], *expected):
        assert torch.allclose(got, (one + two) / 2, atol=1e-6)
        assert not torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize('extra, message', [
    (dict(teachers=dict(a=1)), 'give a dict, teachers=dict'),
    (dict(teachers=dict(a=dict(teacher='no.py'))), r"teacher config 'no.py' does not exist"),
    (dict(teachers=dict(a=dict(config='no.py'))), r"teachers\['a'\]: unknown key 'config'"),
    (dict(teachers=dict(self=dict(teacher='no.py'))), 'choose another name'),
    (dict(teachers=dict(a=dict(teacher='self'))), "losses name it with teacher='self'"),
    (dict(teacher='x', teachers=dict(a=dict(teacher='no.py'))), 'either `teacher` or `teachers`'),
    (dict(teacher='student'), "needs the weights of an earlier training: teacher_ckpt='path'"),
    (dict(teacher=dict(type='EMATeacher', decay=0.9)), "EMATeacher has no argument 'decay'; it takes momentum, share"),
    (dict(teacher=dict(type='EMATeacher', momentum=2)), 'momentum=2 must be above 0'),
    (dict(teacher=dict(type='torchvision.models.nothing')), 'cannot be imported'),
    (dict(teacher=dict(type='torch.nn.Conv2d', in_channels=3, out_channels=4, kernel_size=1)), "teacher_ckpt='own'"),
    (dict(teacher=dict(type='torch.Size'), teacher_ckpt='own'), 'not an nn.Module'),
])
def test_bad_sources(det, extra, message):
    extra.setdefault('teacher', None)
    with pytest.raises(ValueError, match=message):
        Distiller(student_of(det), extra.pop('teacher'), dict(loss_x=CWD), **extra)


def test_which_of_several(det):
    teachers = {name: dict(teacher=teacher_of(det), teacher_ckpt='random') for name in ('a', 'b')}
    with pytest.raises(ValueError, match="loss_x: there are several teachers; say which one.*'a', 'b'"):
        Distiller(student_of(det), None, dict(loss_x=CWD), teachers=teachers)
    teachers['b']['teacher'] = wide(det)
    with pytest.raises(ValueError, match='several teachers are averaged, but they differ in shape'):
        Distiller(student_of(det), None, dict(loss_x=dict(CWD, teacher=['a', 'b'])), teachers=teachers)


# -------------------------------------------------------------------------------------------- the student as teacher


def ema_hook(cfg, **extra):
    return hook(dict(type='EMATeacher', momentum=0.25), dict(loss_cwd=CWD), **extra)


def test_mean_teacher_follows_the_student(det):
    start, seen = {}, []

    class Watch(Hook):
        priority = 'VERY_LOW'

        def before_train(self, runner):
            start.update({name: p.detach().clone() for name, p in runner.model.named_parameters()})

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append({name: p.detach().clone() for name, p in runner.model.named_parameters()})

    runner, _ = train(det, [ema_hook(det), Watch()])
    teacher = distiller_of(runner).teacher
    for name, mean in teacher.model.named_parameters():
        expected = start[name]
        for parameters in seen:
            expected = 0.75 * expected + 0.25 * parameters[name]
        assert torch.allclose(mean, expected, rtol=1e-5, atol=1e-6), name
        assert not mean.requires_grad
    assert not any(module.training for module in teacher.model.modules())
    buffers = dict(runner.model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in teacher.model.named_buffers())


def test_mean_teacher_shares_the_average_of_ema_hook(det):
    runner, record = train(det, [ema_hook(det), dict(type='EMAHook', momentum=0.1)])
    average = next(item for item in runner.hooks if isinstance(item, EMAHook)).ema_model.module
    teacher = distiller_of(runner).teacher
    theirs = dict(average.named_parameters())
    for name, parameter in teacher.model.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
    assert record.losses[1]['loss_cwd'] > 0


@pytest.mark.parametrize('others', [[], [dict(type='EMAHook', momentum=0.1)]], ids=['own', 'shared'])
def test_mean_teacher_resumes(det, tmp_path, others):
    det.train_cfg.max_iters, det.default_hooks.checkpoint.interval = 4, 2
    det.train_dataloader.sampler.shuffle = False
    whole, _ = train(det, [ema_hook(det), *others])
    rest = copy.deepcopy(det)
    rest.work_dir = str(tmp_path / 'rest')
    rest.load_from, rest.resume = str(tmp_path / 'iter_2.pth'), True
    resumed, _ = train(rest, [ema_hook(det), *others])
    for runner in (whole, resumed):
        assert runner.iter == 4
    pairs = zip(distiller_of(whole).teacher.model.state_dict().items(),
                distiller_of(resumed).teacher.model.state_dict().values())
    assert all(torch.equal(one, two) for (_, one), two in pairs)
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    assert all(torch.equal(one, two) for one, two in pairs)


def test_self_distillation(seg):
    """A deeper stage teaches a shallower one in the same pass; no second model."""
    losses = dict(loss_self=dict(type='FitNetLoss', student_at='backbone.layer2', teacher_at='backbone.layer4'))
    runner, record = train(seg, [hook('self', losses)])
    distiller = distiller_of(runner)
    assert distiller.teacher is None and all(step['loss_self'] > 0 for step in record.losses)
    # The target has no gradient: the loss alone reaches layer2 and what is before it, not layer4.
    model = student_of(seg).train()
    alone = Distiller(model, 'self', losses, task_loss_weight=0.0)
    alone.attach()
    result = model(**random_data(model, (64, 64)), mode='loss')
    alone.detach()
    result['loss_self'].backward()
    assert all(p.grad is None for p in model.backbone.layer4.parameters())
    assert all(p.grad is not None for p in model.backbone.layer2.parameters())


def test_self_beside_a_teacher(det):
    losses = dict(loss_cwd=CWD, loss_self=dict(type='FitNetLoss', student_at='backbone.layer2',
                                               teacher_at='backbone.layer3', teacher='self'))
    _, record = train(det, [hook(wide(det), losses)])
    assert all(step['loss_cwd'] > 0 and step['loss_self'] > 0 for step in record.losses)


def test_born_again(det, tmp_path):
    """An earlier checkpoint of the student's own config teaches it."""
    train(det, [])
    path = tmp_path / 'iter_2.pth'
    entry = dict(type='kd_mm.DistillHook', teacher='student', teacher_ckpt=str(path), losses=dict(loss_cwd=CWD))
    again = copy.deepcopy(det)
    again.work_dir = str(tmp_path / 'again')
    runner, record = train(again, [entry])
    saved = torch.load(path, weights_only=False)['state_dict']
    assert all(torch.equal(value, saved[name])
               for name, value in distiller_of(runner).teacher.model.state_dict().items())
    assert all(step['loss_cwd'] > 0 for step in record.losses)


# -------------------------------------------------------------------------------------------- two students


def peer_hook(cfg, losses=None, **extra):
    return dict(type='kd_mm.DistillHook', teacher=dict(type='PeerTeacher', config=wide(cfg), **extra),
                teacher_ckpt='random', losses=losses or dict(
                    loss_kd=dict(type='SigmoidKDLoss', at='@logits'),
                    loss_hint=dict(type='FitNetLoss', at='neck')))


def test_mutual_learning(det, tmp_path):
    losses = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits'), loss_hint=dict(type='FitNetLoss', at='neck'))
    runner, record = train(det, [peer_hook(det, losses)])
    distiller = distiller_of(runner)
    peer = distiller.teacher
    for step in record.losses:
        assert step['loss_kd'] > 0 and step['loss_hint'] > 0
        assert step['peer_total'] > step['peer_task'] > 0  # it learns from the student too
    assert not any('peer' in key for key in runner.model.state_dict())
    # Widths 16 and 24: each side has an adapter to the other one's.
    assert distiller.terms['loss_hint'].adapter is not None and peer.terms['loss_hint'].adapter is not None
    saved = torch.load(tmp_path / 'peer_teacher.pth', weights_only=False)
    plain = build_model(load_config(wide(det))[0], 'mmdet')
    plain.load_state_dict(saved['state_dict'], strict=True)
    assert all(torch.equal(value, peer.model.state_dict()[key]) for key, value in saved['state_dict'].items())


def test_a_peer_without_terms_is_trained_as_if_alone(det, tmp_path):
    """With weight 0 both train on their own: the peer as the plain Runner trains its config."""
    det.train_dataloader.sampler.shuffle = False
    det.param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3)]
    losses = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits', loss_weight=0))
    runner, _ = train(det, [peer_hook(det, losses)])
    peer = distiller_of(runner).teacher
    start = {}

    class Begin(Hook):
        def before_train(self, runner):
            start.update({key: value.clone() for key, value in distiller_of(runner).teacher.model.state_dict().items()})

    train(det, [peer_hook(det, losses), Begin()])
    alone = copy.deepcopy(det)
    alone.model = Config(wide(det)).model
    alone.work_dir, alone.load_from = str(tmp_path / 'alone'), str(tmp_path / 'start.pth')
    torch.save(dict(state_dict=start), alone.load_from)
    plain, _ = train(alone, [])
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(peer.model.state_dict()[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_mutual_learning_resumes(det, tmp_path):
    det.train_cfg.max_iters, det.default_hooks.checkpoint.interval = 4, 2
    det.train_dataloader.sampler.shuffle = False
    whole, _ = train(det, [peer_hook(det)])
    rest = copy.deepcopy(det)
    rest.work_dir = str(tmp_path / 'rest')
    rest.load_from, rest.resume = str(tmp_path / 'iter_2.pth'), True
    resumed, _ = train(rest, [peer_hook(det)])
    for one, two in ((whole.model, resumed.model),
                     (distiller_of(whole).teacher.model, distiller_of(resumed).teacher.model)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_bad_peers(det):
    with pytest.raises(ValueError, match='PeerTeacher needs `config`; it takes config, optim_wrapper'):
        Distiller(student_of(det), dict(type='PeerTeacher'), dict(loss_x=CWD))
    scaled = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(ValueError, match='loss scaling .* is not supported'):
        train(det, [peer_hook(det, optim_wrapper=scaled)])


# -------------------------------------------------------------------------------------------- any other network


class Foundation(nn.Module):
    """Stands for a self-supervised backbone: tokens of 16 x 16 patches with a class token in front."""

    seen = None

    def __init__(self, width=6):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, stride=16)
        self.blocks = nn.Identity()

    def forward(self, images):
        type(self).seen = images
        features = self.patch(images).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([features.mean(dim=1, keepdim=True), features], dim=1))


def test_plain_module_teaches_a_backbone(det):
    entry = dict(type='kd_mm.DistillHook', teacher_ckpt='random', losses=dict(
        loss_hint=dict(type='FitNetLoss', student_at='backbone', levels=dict(student=[2], teacher=[0]),
                       teacher_at='patch')),
                 teacher=dict(type=f'{__name__}.Foundation', width=5, preprocess=dict(
                     mean=[100, 110, 120], std=[50, 50, 50], channels='bgr', size=(96, 96))))
    inputs = []

    class Watch(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            inputs.append((data_batch['inputs'], Foundation.seen))

    det.train_dataloader.sampler.shuffle = False
    runner, record = train(det, [entry, Watch()])
    assert all(step['loss_hint'] > 0 for step in record.losses)
    given, seen = inputs[-1]
    assert seen.shape[-2:] == (96, 96)
    images = torch.stack([image.float() for image in given])  # BGR, 0..255, as it was loaded
    expected = (images - torch.tensor([100., 110., 120.]).view(3, 1, 1)) / 50
    expected = nn.functional.interpolate(expected, size=(96, 96), mode='bilinear')
    assert torch.allclose(seen, expected, atol=1e-4)


def test_bad_preprocess(det):
    for preprocess, message in ((dict(means=[0]), "preprocess has no 'means'"),
                                (dict(channels='gbr'), "channels='gbr' is not one of 'rgb', 'bgr'")):
        with pytest.raises(ValueError, match=message):
            Distiller(student_of(det), dict(type=f'{__name__}.Foundation', preprocess=preprocess),
                      dict(loss_hint=dict(type='FitNetLoss', student_at='backbone.layer4', teacher_at='patch')),
                      teacher_ckpt='random')


@pytest.mark.parametrize('preprocess, told', [
    (dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]), True),
    (dict(mean=[0.0, 0.0, 0.0], std=[0.5, 0.5, 0.5]), True), (dict(mean=[0.485, 0.456, 0.406]), True),
    (dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]), False),
    (dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]), False),
    (dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0]), False), (None, False)])
def test_units_of_0_to_1_are_noticed(det, preprocess, told):
    """Before the first step, with the numbers that the first input has by them."""
    kd = Distiller(student_of(det), dict(type=f'{__name__}.Foundation', preprocess=preprocess), dict(
        loss_hint=dict(type='FitNetLoss', student_at='backbone', levels=dict(student=[2], teacher=[0]),
                       teacher_at='patch')), teacher_ckpt='random')
    notes = [note for note in kd.teacher.notes if 'they are 0..255' in note]
    assert len(notes) == told
    if told and preprocess['mean'][0] and 'std' in preprocess:
        assert 'mean=(123.7, 116.3, 103.5), std=(58.4, 57.12, 57.37)' in notes[0]
        deviation = float(re.search('the deviation ([0-9.]+)', notes[0]).group(1))
        assert 200 < deviation < 500


# -------------------------------------------------------------------------------------------- pairs that do not match


def other(name, root, **model):
    cfg = Config.fromfile(str(zoo_config(name)))
    merge(cfg, dict(model=model), coco_data(root))
    return dict(model=cfg.model.to_dict(), default_scope='mmdet')


def faster(root):
    from stock import _backbone, widths
    return other('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', root, backbone=_backbone(8, 18),
                 neck=dict(in_channels=widths(8, 18), out_channels=24), rpn_head=dict(in_channels=24, feat_channels=24),
                 roi_head=dict(bbox_head=dict(in_channels=24, fc_out_channels=32, num_classes=2),
                               bbox_roi_extractor=dict(out_channels=24)))


def test_levels_meet_by_stride(det, coco_root):
    """RetinaNet's P3 to P7 and Faster R-CNN's P2 to P6 have four levels in common."""
    runner, record = train(det, [hook(faster(coco_root), dict(loss_pkd=dict(type='PKDLoss', at='neck')))])
    term = distiller_of(runner).terms['loss_pkd']
    assert term.reader.pairs == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert term.describe_levels() == ('levels by stride: student 0 with teacher 1, student 1 with teacher 2, '
                                      'student 2 with teacher 3, student 3 with teacher 4')
    assert all(step['loss_pkd'] > 0 for step in record.losses)


@pytest.mark.parametrize('at, levels, said', [
    ('neck', None, 'levels by index'), ('backbone.layer4', None, 'one level'), ('neck', [0], 'one level'),
    ('neck', dict(student=[2], teacher=[0]), 'one level: student 2 with teacher 0'),
    ('neck', [-1], 'one level: student last with teacher last'),
    ('neck', dict(student=[1, 2], teacher=[0, 1]), 'levels as chosen: student 1 with teacher 0, student 2 with '
                                                   'teacher 1')])
def test_the_log_says_which_levels_meet(det, at, levels, said):
    student = build_model(Config(dict(model=det.model, default_scope='mmdet')), 'mmdet')
    found = Distiller(student, wide(det), dict(loss_fit=dict(type='FitNetLoss', at=at, levels=levels)),
                      teacher_ckpt='random', scope='mmdet')
    assert found.terms['loss_fit'].describe_levels() == said


def test_yolox_student_of_retinanet(det, coco_root):
    cfg = Config.fromfile(str(zoo_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')))
    model = cfg.model
    model.data_preprocessor.pop('batch_augments', None)
    model.backbone.update(deepen_factor=0.33, widen_factor=0.125)
    model.neck.update(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1)
    model.bbox_head.update(num_classes=2, in_channels=16, feat_channels=16)
    det.model = model
    runner, record = train(det, [hook(teacher_of(detector(coco_root, det.work_dir)), dict(
        loss_pkd=dict(type='PKDLoss', at='neck')))])
    assert distiller_of(runner).terms['loss_pkd'].reader.pairs == [(0, 0), (1, 1), (2, 2)]
    assert all(step['loss_pkd'] > 0 for step in record.losses)


def test_other_number_of_classes(det):
    teacher = teacher_of(det, bbox_head=dict(num_classes=5))
    teacher['train_dataloader'] = dict(dataset=dict(metainfo=dict(classes=('a', 'disc', 'b', 'square', 'c'))))
    _, record = train(det, [hook(teacher, dict(loss_cwd=CWD))])  # features: no matter
    assert record.losses[0]['loss_cwd'] > 0
    logits = dict(type='SigmoidKDLoss', at='@logits')
    shown = r"Student \(2\): square, disc. Teacher \(5\): a, disc, b, square, c.*'common'"
    with pytest.raises(ValueError, match=shown):
        train(det, [hook(teacher, dict(loss_kd=logits))])
    runner, record = train(det, [hook(teacher, dict(loss_kd=dict(logits, classes='common')))])
    term = distiller_of(runner).terms['loss_kd']
    assert term.chosen == {'teacher': ((2, [0, 1]), (5, [3, 1]))}
    assert record.losses[0]['loss_kd'] > 0
    with pytest.raises(ValueError, match='the student does not know a'):
        train(det, [hook(teacher, dict(loss_kd=dict(logits, classes=['a'])))])


def test_segmentors_of_different_stride(seg):
    """Logits at stride 8 and 4: the student's are resized."""
    teacher = teacher_of(seg, backbone=dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True))
    teacher['model']['backbone']['strides'] = (1, 1, 1, 1)
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits'))
    runner, record = train(seg, [hook(teacher, losses)])
    assert type(distiller_of(runner).terms['loss_kd'].adapter).__name__ == 'ResizeAdapter'
    assert all(step['loss_kd'] > 0 for step in record.losses)


def test_a_head_that_fails_behind_the_taps(det, monkeypatch):
    """The dry pass needs the models as far as the taps only, like the training."""
    losses = dict(loss_cwd=dict(CWD, adapter=dict(type='ConvAdapter', always=True)))
    model = student_of(det)
    monkeypatch.setattr(type(model.bbox_head), 'forward', lambda self, x: 1 / 0)
    distiller = Distiller(model, teacher_of(det), losses, teacher_ckpt='random')
    assert len(distiller.terms['loss_cwd'].adapter.convs) == 5
    with pytest.raises(ValueError, match=r'images fails. at 128x128: ZeroDivisionError: .*zero \(the student\)$'):
        Distiller(model, teacher_of(det), dict(losses, loss_kd=dict(type='SigmoidKDLoss', at='@logits')),
                  teacher_ckpt='random')


# -------------------------------------------------------------------------------------------- without labels


class Unlabelled(Hook):
    """Takes the annotations out of every batch, as a set of plain images has none."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for sample in data_batch['data_samples']:
            for name in ('gt_instances', 'gt_sem_seg', 'ignored_instances'):
                if name in sample:
                    delattr(sample, name)


@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_label_free(kind, det, seg):
    cfg = det if kind == 'det' else seg
    losses = dict(loss_kd=dict(type='SigmoidKDLoss' if kind == 'det' else 'SoftmaxKDLoss', at='@logits'))
    runner, record = train(cfg, [Unlabelled(), hook(teacher_of(cfg), losses, task_loss_weight=0)])
    assert all(step['loss_kd'] > 0 and step['loss'] == step['loss_kd'] for step in record.losses)
    assert 'loss' not in vars(runner.model)
    with pytest.raises(Exception):  # noqa: B017  (whatever the host raises)
        train(cfg, [Unlabelled(), hook(teacher_of(cfg), losses, task_loss_weight=0.5)])


def test_a_failed_step_gives_the_loss_back(det):
    model = student_of(det).train()
    distiller = Distiller(model, teacher_of(det), dict(loss_cwd=CWD), teacher_ckpt='random', task_loss_weight=0)
    distiller.attach()
    distiller.teacher.run = lambda *a, **k: (_ for _ in ()).throw(RuntimeError('broken'))
    with pytest.raises(RuntimeError, match='broken'):
        model(**random_data(model, (64, 64)), mode='loss')
    assert 'loss' not in vars(model)
    distiller.detach()
    make_runner(det)  # nothing global was left behind


# ---------------------------------------------------------------------- maps of classes


def renamed(cfg, *names, **extra):
    """A teacher of these classes."""
    teacher = teacher_of(cfg, bbox_head=dict(num_classes=len(names)))
    teacher['train_dataloader'] = dict(dataset=dict(metainfo=dict(classes=names)))
    return dict(teacher=teacher, teacher_ckpt='random', **extra)


@pytest.mark.parametrize('classes, pair', [
    (dict(blob='square', ball='disc', round='disc'), ((2, [0, 1]), (4, [0, (1, 3)]))),
    ({0: 1, 2: 0}, ((2, [0, 1]), (4, [2, 0]))),
    ('positional', ((2, [0, 1]), (4, [0, 1])))])
def test_maps_of_classes_of_a_loss_and_of_its_teacher(det, classes, pair):
    names = ('blob', 'ball', 'x', 'round')
    loss = dict(type='SigmoidKDLoss', at='@logits')
    found = []
    for teacher, own in ((dict(), dict(classes=classes)), (dict(classes=classes), dict())):
        entry = renamed(det, *names, **teacher)
        distillation = dict(type='kd_mm.DistillHook', teachers=dict(a=entry), losses=dict(loss_kd=dict(loss, **own)))
        runner, record = train(det, [distillation])
        assert distiller_of(runner).terms['loss_kd'].chosen == dict(a=pair)
        found.append(record.losses)
    single = hook(renamed(det, *names)['teacher'], dict(loss_kd=loss), classes=classes)
    found.append(train(det, [single])[1].losses)
    assert found[0] == found[1] == found[2] and found[0][0]['loss_kd'] > 0


def test_teachers_that_know_different_classes_are_united(det):
    """Each class has the mean of the teachers that know it."""
    loss = dict(type='SigmoidKDLoss', at='@logits', teacher=['a', 'b'], classes='common')
    entries = dict(a=renamed(det, 'disc', 'star'), b=renamed(det, 'x', 'square', 'disc'))
    runner, record = train(det, [dict(type='kd_mm.DistillHook', teachers=entries, losses=dict(loss_kd=loss))])
    term = distiller_of(runner).terms['loss_kd']
    assert term.united and term.chosen == dict(
        a=((2, [0, 1]), (2, [(), 0])), b=((2, [0, 1]), (3, [1, 2])))
    assert record.losses[0]['loss_kd'] > 0
    with pytest.raises(ValueError, match='softmax over classes of which its teachers know different ones'):
        train(det, [dict(type='kd_mm.DistillHook', teachers=entries, losses=dict(
            loss_kd=dict(loss, type='SoftmaxKDLoss')))])
    from kd_mm.engine.step import average
    nan = float('nan')
    mean, = average([(torch.tensor([[1.0, nan]]), ), (torch.tensor([[3.0, 5.0]]), )], True)
    assert mean.tolist() == [[2.0, 5.0]]
