"""A student that knows more classes than its teacher: MiB, PLOP and ERD in a real Runner, and what is refused."""

import copy

import pytest
import torch
from heads import batch_of, build_head, head_config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS
from stock import detector, distill_hook, hook, make_runner, segmentor, teacher_of, train

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model

NAMES = ('background', *(f'class {number}' for number in range(1, 19)))
LOSSES = dict(
    loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg'),
    loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg'),
    loss_pod=dict(type='LocalPODLoss', at='backbone', loss_weight=1e-3),
    loss_pod_logits=dict(type='LocalPODLoss', at='decode_head.conv_seg', growth=(12, 7)),
    loss_pseudo=dict(type='PLOPPseudoLabelLoss', at='decode_head.conv_seg'))


@DATASETS.register_module(force=True)
class WithBackground(CityscapesDataset):
    METAINFO = dict(classes=NAMES, palette=[[number] * 3 for number in range(19)])


def grown(root, tmp_path, old=12):
    """A segmenter of 19 classes taught by one that knows the first few."""
    cfg = segmentor(root, tmp_path)
    teacher = teacher_of(cfg, decode_head=dict(num_classes=old), auxiliary_head=dict(num_classes=old))
    cfg.train_dataloader.dataset.type = 'WithBackground'
    cfg.custom_hooks = [hook(teacher, LOSSES, task_loss_weight=0.0)]
    return cfg


def test_segmenters(cityscapes_root, tmp_path):
    cfg = grown(cityscapes_root, tmp_path)
    _, recorder = train(cfg, hooks=[hook_of.to_dict() for hook_of in cfg.custom_hooks])
    assert len(recorder.losses) == 2
    for losses in recorder.losses:
        assert all(torch.isfinite(torch.tensor(losses[name])) and losses[name] >= 0 for name in LOSSES)
        assert losses['loss_mib_ce'] > 0 and losses['loss_mib_kd'] > 0 and losses['loss_pod_logits'] > 0
        assert not [name for name in losses if name.startswith('decode.')]  # its own cross-entropy is off


def test_what_is_refused(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(cfg).model
    small = teacher_of(cfg, decode_head=dict(num_classes=12), auxiliary_head=dict(num_classes=12))

    def refused(names, **losses):
        with pytest.raises(ValueError) as caught:
            Distiller(student, small, losses, scope='mmseg', teacher_ckpt='random', classes=names)
        return str(caught.value)

    roads = ('road', *NAMES[1:])
    text = refused(roads, **{name: loss for name, loss in LOSSES.items() if 'pod' not in name})
    for name in ('MiBCELoss', 'MiBKDLoss', 'PLOPPseudoLabelLoss'):
        assert f'{name} needs the background as first class' in text
    Distiller(student, small, {name: loss for name, loss in LOSSES.items() if 'pod' in name}, scope='mmseg',
              teacher_ckpt='random', classes=roads)
    large = teacher_of(cfg, decode_head=dict(num_classes=21), auxiliary_head=dict(num_classes=21))
    with pytest.raises(ValueError, match='MiBKDLoss, level 0: .* the student needs 21 channels or more'):
        Distiller(student, large, dict(loss_kd=LOSSES['loss_mib_kd']), scope='mmseg', teacher_ckpt='random',
                  classes=NAMES)
    assert 'LocalPODLoss, level 0' in refused(NAMES, loss_pod=dict(
        type='LocalPODLoss', at='decode_head.conv_seg', adapter=None))
    assert 'a teacher trained on these classes' in refused(NAMES, loss_kd=dict(
        type='SoftmaxKDLoss', at='decode_head.conv_seg'))


def test_the_order_of_the_classes_is_checked(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(cfg).model
    teacher = teacher_of(cfg, decode_head=dict(num_classes=12), auxiliary_head=dict(num_classes=12))

    def make(*names):
        known = dict(teacher, train_dataloader=dict(dataset=dict(metainfo=dict(classes=names))))
        return Distiller(student, known, dict(loss_kd=LOSSES['loss_mib_kd']), scope='mmseg', teacher_ckpt='random',
                         classes=NAMES)

    with pytest.raises(ValueError, match="MiBKDLoss needs a student whose classes begin with the teacher's"):
        make('background', 'class 2', 'class 1', *NAMES[3:12])
    make(*NAMES[:12])


def detectors(name, old, new):
    """Two detectors in training mode, and the losses' head."""
    made = []
    for classes in (old + new, old):
        cfg = head_config(name)
        cfg.model.bbox_head.num_classes = classes
        with DefaultScope.overwrite_default_scope('mmdet'):
            made.append(build_model(cfg, 'mmdet').train())
    return made


@pytest.mark.parametrize('name, options', [('gfl', {}), ('retinanet', dict(box_weight=0))])
def test_detectors(name, options):
    student, teacher = detectors(name, 2, 3)
    found = Distiller(student, teacher, dict(loss_erd=dict(type='ERDLoss', at='bbox_head', **options)), scope='mmdet')
    assert found.terms['loss_erd'].loss.grows
    with pytest.raises(ValueError, match='the classes must be the same'):
        Distiller(teacher, student, dict(loss_erd=dict(type='ERDLoss', at='bbox_head', **options)), scope='mmdet')


def test_a_detector_learns(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    teacher = teacher_of(cfg, bbox_head=dict(num_classes=1))
    losses = dict(loss_erd=dict(type='ERDLoss', at='bbox_head', box_weight=0))
    runner, recorder = train(cfg, hooks=[hook(copy.deepcopy(teacher), losses)])
    assert all(step['loss_erd'] >= 0 for step in recorder.losses) and recorder.losses[-1]['loss_erd'] > 0


def named(teacher, *names):
    """A teacher that knows the names of its classes."""
    return dict(copy.deepcopy(teacher), train_dataloader=dict(dataset=dict(metainfo=dict(classes=names))))


def still(cfg):
    """The config with a learning rate of 0: the weights stay as they were at the start."""
    cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)
    return cfg


def test_a_detector_starts_with_the_rows_of_the_old_classes(coco_root, tmp_path):
    cfg = still(detector(coco_root, tmp_path))  # (square, disc)
    teacher = named(teacher_of(cfg, bbox_head=dict(num_classes=1)), 'disc')
    first = make_runner(cfg)
    first.model.init_weights()
    # ERD itself wants the old classes first, so a loss on features shows what the order of the names does.
    losses = dict(loss_pkd=dict(type='PKDLoss', at='neck'))
    runner, _ = train(cfg, [hook(teacher, losses, inherit=dict(neck='copy', bbox_head='grow'))])
    own, other = runner.model.bbox_head, distill_hook(runner).distiller.teacher.model.bbox_head
    weight = own.retina_cls.weight.view(9, 2, -1)
    assert torch.equal(weight[:, 1], other.retina_cls.weight.view(9, -1))
    assert not torch.equal(weight[:, 0], other.retina_cls.weight.view(9, -1))
    assert torch.equal(own.retina_reg.weight, other.retina_reg.weight)
    assert torch.equal(own.retina_cls.bias, first.model.bbox_head.retina_cls.bias)  # the same prior for every class
    with pytest.raises(ValueError, match="a head with more classes grows by name: inherit=dict\\(bbox_head='grow'\\)"):
        train(cfg, [hook(teacher, losses, inherit=('bbox_head', ))])
    with pytest.raises(ValueError, match='those of the teacher are not known'):
        train(cfg, [hook(teacher_of(cfg, bbox_head=dict(num_classes=1)), losses, inherit=dict(bbox_head='grow'))])
    with pytest.raises(ValueError, match="must say for each module path how: 'copy', 'grow', 'grow_from_background'"):
        train(cfg, [hook(teacher, losses, inherit=dict(bbox_head='more'))])


def test_a_segmenter_starts_from_the_background(cityscapes_root, tmp_path):
    cfg = still(grown(cityscapes_root, tmp_path, old=12))
    entry = cfg.custom_hooks[0].to_dict()
    entry.update(teacher=named(entry['teacher'], *NAMES[:12]), inherit=dict(
        backbone='copy', decode_head='grow_from_background', auxiliary_head='grow'))
    runner, recorder = train(cfg, hooks=[entry])
    own, other = (model.decode_head.conv_seg.weight for model in (
        runner.model, distill_hook(runner).distiller.teacher.model))
    assert torch.equal(own[:12], other) and torch.equal(own[12:], other[:1].expand(7, -1, -1, -1))
    assert all(step['loss_mib_ce'] > 0 for step in recorder.losses)


@pytest.mark.parametrize('name', ['gfl', 'retinanet', 'tood', 'rtmdet'])
def test_the_own_loss_teaches_new_classes_alone(name):
    model = build_head(name)
    MessageHub.get_current_instance().update_info('epoch', 0)  # TOOD asks for it
    data = batch_of(model)
    losses = dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=0.0))
    known = named(dict(model=head_config(name).model.to_dict(), default_scope='mmdet'), 'a', 'c', 'd')
    rows = {key: parameter for key, parameter in model.bbox_head.named_parameters()
            if '_cls.' in key and parameter.requires_grad}
    assert rows

    def gradients(**options):
        distiller = Distiller(model, known, losses, scope='mmdet', teacher_ckpt='random', classes=['a', 'b', 'c'],
                              **options)
        distiller.attach()
        try:
            found = model(data['inputs'], data['data_samples'], mode='loss')
        finally:
            distiller.detach()
        model.zero_grad()
        total = sum(sum(value) if isinstance(value, list) else value for key, value in found.items() if 'loss' in key)
        total.backward()
        return float(total), {key: value.grad.reshape(value.shape[0] // 3, 3, -1).abs().sum(dim=(0, 2))
                              for key, value in rows.items()}

    plain, before = gradients()
    kept, after = gradients(task_classes='new')
    assert plain == kept  # the values are those of the stock loss
    assert 'loss_by_feat' not in vars(model.bbox_head)
    for key in rows:
        assert (before[key] > 0).all()
        assert after[key][0] == after[key][2] == 0
        torch.testing.assert_close(after[key][1], before[key][1])


def test_own_loss_that_cannot_be_kept_to_new_classes(coco_root, cityscapes_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    losses = dict(loss_pkd=dict(type='PKDLoss', at='neck'))
    teacher = teacher_of(cfg, bbox_head=dict(num_classes=1))
    for known, options, text in (
            (named(teacher, 'square'), dict(task_classes='old'), "task_classes='old' must be 'all' or 'new'"),
            (teacher, dict(task_classes='new'), 'those of the teacher are not known'),
            (named(teacher_of(cfg), 'disc', 'square'), dict(task_classes='new'), 'knows all classes of the student')):
        with pytest.raises(ValueError, match=text):
            train(cfg, [hook(known, losses, **options)])
    cfg = segmentor(cityscapes_root, tmp_path)
    with pytest.raises(ValueError, match='For a segmenter MiBCELoss takes the place'):
        train(cfg, [hook(teacher_of(cfg), dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg')),
                         task_classes='new')])
