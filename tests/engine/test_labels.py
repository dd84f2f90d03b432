"""Labels from teachers, in a real Runner: what is added, what stays as it is, what is refused."""

import copy

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from stock import (
    Recorder,
    detector,
    distill_hook,
    labels_hook,
    make_runner,
    retinanet_model,
    same,
    segmentor,
    teacher_of,
    traces,
    train,
    weights,
    wide,
)
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import DistillHook
from kd_mm.hosts.labelled import fault_of
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.ops.boxes import intersection
from kd_mm.registry import MODELS
from kd_mm.teachers.labels.base import Labeller
from kd_mm.types.labels import Detections
from kd_mm.types.targets import input_shape

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=3.0))
SURE = dict(type='PseudoLabels', score=1.0, classes='positional')


class Oracle(nn.Module):
    """A detector of nobody's that sees the same objects in every image.

    Args:
        boxes: rows of x1, y1, x2, y2, label, score.
        classes: their names.
    """

    def __init__(self, boxes):
        super().__init__()
        self.boxes = torch.tensor(boxes)
        self.asked = []

    def forward(self, inputs):
        return inputs

    def predict(self, inputs, samples):
        self.asked.append([dict(sample.metainfo) for sample in samples])
        assert not self.training and not torch.is_grad_enabled()
        for sample in samples:
            sample.pred_instances = InstanceData(
                bboxes=self.boxes[:, :4].clone(), labels=self.boxes[:, 4].long(), scores=self.boxes[:, 5].clone())
        return samples


class OracleMap(nn.Module):
    """A segmentor of nobody's that is sure of one class in every second row of pixels."""

    def __init__(self, label, classes=19, sure=8.0):
        super().__init__()
        self.label, self.classes, self.sure = label, classes, sure

    def forward(self, inputs):
        return inputs

    def predict(self, inputs, samples):
        for sample in samples:
            logits = torch.zeros(self.classes, *inputs.shape[-2:])
            logits[self.label, ::2] = self.sure
            sample.seg_logits = PixelData(data=logits)
        return samples


class Watch(Recorder):
    """Also keeps the data samples that the student's head got."""

    def __init__(self):
        super().__init__()
        self.given, self.packed = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        super().before_train_iter(runner, batch_idx, data_batch)
        self.packed.append((data_batch['data_samples'], copy.deepcopy(data_batch['data_samples'])))
        model, seen = runner.model, self.given
        if 'loss' not in vars(model):
            original = model.loss

            def loss(inputs, data_samples):
                seen.append(copy.deepcopy(data_samples))
                return original(inputs, data_samples)
            model.loss = loss


def run(cfg, hooks):
    """Train with hook objects; the Runner and the watcher."""
    made = [DistillHook(**{key: value for key, value in entry.items() if key != 'type'}) for entry in hooks]
    runner, watch = make_runner(cfg, []), Watch()
    for hook in made:
        runner.register_hook(hook, priority=hook.priority)
    runner.register_hook(watch)
    runner.train()
    return runner, watch


@pytest.fixture
def det(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'det')
    cfg.model.test_cfg.score_thr = 0.0
    return cfg


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'seg')


# ---------------------------------------------------------------------- nothing passes


@pytest.mark.parametrize('losses', [None, CWD])
def test_a_detector_whose_teacher_is_sure_of_nothing_trains_as_ever(det, losses):
    hooks = [] if losses is None else [labels_hook(wide(det), None, losses)]
    stock, stock_record = train(det, hooks)
    runner, record = train(det, [labels_hook(wide(det), SURE, losses)])
    assert record.losses == stock_record.losses
    assert same(weights(runner), weights(stock))
    assert traces(runner.model) == traces(stock.model)
    state = torch.get_rng_state(), np.random.get_state()[1]
    train(det, hooks)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_a_segmentor_whose_teacher_is_sure_of_nothing_trains_as_ever(seg):
    """It draws dropout masks: labels may not shift the random numbers."""
    stock, stock_record = train(seg)
    runner, record = train(seg, [labels_hook(teacher_of(seg), SURE)])
    assert record.losses == stock_record.losses
    assert same(weights(runner), weights(stock))


# ---------------------------------------------------------------------- what is added


def test_objects_are_added_where_nothing_is_said(det):
    far, sure = [2., 3., 12., 13., 1, 0.9], [20., 20., 40., 40., 0, 0.95]
    oracle = Oracle([far, sure, [50., 50., 60., 60., 0, 0.3], [50., 2., 60., 12., 2, 0.9]])
    runner, watch = run(det, [labels_hook(oracle, dict(
        type='PseudoLabels', score=0.5, iou=0.5, classes={0: 1, 1: 0}))])
    for (samples, before), given in zip(watch.packed, watch.given):
        added = 0
        for sample, old, new in zip(samples, before, given):
            truth, labels = old.gt_instances.bboxes, old.gt_instances.labels
            assert torch.equal(sample.gt_instances.bboxes.tensor, truth.tensor)  # the data are as they were
            count = len(labels)
            assert torch.equal(new.gt_instances.bboxes[:count], truth.tensor)
            assert torch.equal(new.gt_instances.labels[:count], labels)
            more = new.gt_instances[count:]
            assert set(more.keys()) == {'bboxes', 'labels'}
            for box, label in zip(more.bboxes.tolist(), more.labels.tolist()):
                assert (box, label) in ((far[:4], 0), (sure[:4], 1))
            expected = sum(not _overlaps(row[:4], truth.tensor) for row in (far, sure))
            assert len(more) == expected
            added += expected
        assert added
    plain, stock = train(det)
    assert not same(weights(runner), weights(plain))
    meta = oracle.asked[-1][0]
    assert meta['scale_factor'] == (1.0, 1.0) and meta['ori_shape'] == meta['img_shape'] == (64, 64)


def _overlaps(box, boxes):
    overlap, union = intersection(torch.tensor(box)[None], boxes)
    return bool((overlap / union >= 0.5).any())


def test_pixels_are_filled_where_nothing_is_said(seg):
    """Every second row is sure; labels stay where there are some, and so does the padding."""
    seg.model.data_preprocessor.size = (80, 64)  # 16 rows of padding, whose label is the ignored one
    teachers = dict(first=dict(teacher=OracleMap(5), teacher_ckpt='own', classes={5: 5}),
                    second=dict(teacher=OracleMap(2, sure=3.0), teacher_ckpt='own', classes={2: 7}))
    runner, watch = run(seg, [labels_hook(None, dict(type='PseudoLabels', score=0.6, teacher=['first', 'second']),
                                          teachers=teachers)])
    for (samples, before), given in zip(watch.packed, watch.given):
        for sample, old, new in zip(samples, before, given):
            truth, filled = old.gt_sem_seg.data[0], new.gt_sem_seg.data[0]
            assert torch.equal(sample.gt_sem_seg.data[0], truth)
            assert filled.shape == (80, 64) and (filled[64:] == 255).all()
            silent = truth == 255
            assert silent.any() and torch.equal(filled[:64][~silent], truth[~silent])
            rows = silent.clone()
            rows[1::2] = False
            assert (filled[:64][rows] == 5).all() and (filled[:64][silent & ~rows] == 255).all()


def test_counts_are_in_the_log(det):
    hooks = [labels_hook(Oracle([[2., 3., 12., 13., 1, 0.9]]), dict(
        sure=dict(type='PseudoLabels', score=0.5, classes={1: 1}),
        none=dict(type='PseudoLabels', score=0.95, classes={1: 1})))]
    runner, watch = run(det, hooks)
    scalars = runner.message_hub.log_scalars
    assert scalars['train/kd_labels_sure_boxes'].current() > 0
    assert scalars['train/kd_labels_sure_score'].current() == pytest.approx(0.9)
    assert scalars['train/kd_labels_none_boxes'].current() == 0 and 'train/kd_labels_none_score' not in scalars
    assert 'kd_labels_sure_boxes' not in watch.losses[0]


def test_pictures_without_labels(det, seg, tmp_path):
    """Neither host can train on a picture that its pipeline loads no labels for; with labels of a teacher both can."""
    det.train_dataloader.dataset.pipeline = [step for step in det.train_dataloader.dataset.pipeline
                                             if step['type'] != 'LoadAnnotations']
    with pytest.raises(AttributeError):
        train(det)
    _, watch = run(det, [labels_hook(Oracle([[2., 3., 12., 13., 0, 0.9]]), dict(
        type='PseudoLabels', classes={0: 0}))])
    assert all(sample.gt_instances.bboxes.tolist() == [[2., 3., 12., 13.]] for given in watch.given for sample in given)
    seg.train_dataloader.dataset.pipeline = [step for step in seg.train_dataloader.dataset.pipeline
                                             if step['type'] != 'LoadAnnotations']
    _, watch = run(seg, [labels_hook(OracleMap(3), dict(type='PseudoLabels', classes={3: 3}))])
    assert all((sample.gt_sem_seg.data[0, ::2] == 3).all() for given in watch.given for sample in given)


# ---------------------------------------------------------------------- the teacher's one pass


@pytest.mark.parametrize('losses', [None, CWD, dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits'))])
@pytest.mark.parametrize('speed', ['exact', 'auto'])
def test_the_teacher_runs_once(det, losses, speed):
    """Trunk and head run once in a step, whether a loss wants the head or not."""
    counts = dict(backbone=0, neck=0, head=0)

    def look(runner):
        teacher = distill_hook(runner).distiller.teacher.model
        if not counts['backbone']:
            for name, module in (('backbone', teacher.backbone), ('neck', teacher.neck),
                                 ('head', teacher.bbox_head.retina_cls)):
                module.register_forward_pre_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
            counts['backbone'] = 1

    det.train_cfg.max_iters = 3
    entry = labels_hook(wide(det), dict(type='PseudoLabels', score=0.005, iou=0.9, classes='positional'), losses,
                        speed=speed)
    train(det, [entry], look)
    assert counts == dict(backbone=3, neck=2, head=10)  # two steps, five levels; the 1 above


def test_labels_are_the_teachers_own_predictions(det):
    """Kept features, re-normalised pictures and a view: what is added is what the model predicts for that batch."""
    student = build_model(det, 'mmdet')
    teacher = teacher_of(det, **retinanet_model(base=12, neck=24))
    teacher['model']['data_preprocessor'] = dict(
        det.model.data_preprocessor, bgr_to_rgb=False, mean=[100.0, 90.0, 80.0])
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 96)), True)
    for view in (None, dict(scale=0.5), dict(size=(128, 192), multiple_of=160, fit='pad')):
        distiller = Distiller(student, teacher, None, teacher_ckpt='random', scope='mmdet', view=view, speed='exact',
                              labels=dict(type='PseudoLabels', score=0.005, iou=1.0, classes='positional'))
        step = distiller.current
        step.begin(**data)
        step.teach(**data)
        assert set(step.records['teacher']) == {'extract_feat'}
        new = step.label(**data)
        assert not step.records['teacher']
        model, batch = distiller.teacher.model, step.batch
        images, samples = distiller.teacher.prepare(data['inputs'], copy.deepcopy(data['data_samples']), batch)
        with torch.no_grad():
            found = model.predict(images, samples, rescale=False)
        scale = 1.0 if view is None else 2.0 if 'scale' in view else 0.5
        for result, old, sample in zip(found, data['data_samples'], new):
            more = sample.gt_instances[len(old.gt_instances):]
            wanted = result.pred_instances[result.pred_instances.scores > 0.005]
            edge = torch.tensor([96., 64., 96., 64.])
            boxes = (wanted.bboxes * scale).clamp(min=0).minimum(edge)
            large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= 1
            assert large.sum() > 5
            torch.testing.assert_close(more.bboxes, boxes[large], rtol=1e-4, atol=1e-3)
            assert torch.equal(more.labels, wanted.labels[large])
        step.clear()


def test_a_map_of_another_size_and_its_padding(seg):
    """A segmentor that sees twice the size, padded: what it says of its padding is nothing that the student has."""
    class Edge(OracleMap):
        def predict(self, inputs, samples):
            assert tuple(inputs.shape[-2:]) == (160, 160)
            for sample in samples:
                logits = torch.zeros(self.classes, *inputs.shape[-2:])
                logits[5, :128, :128] = logits[2, 128:] = logits[2, :, 128:] = self.sure
                sample.seg_logits = PixelData(data=logits)
            return samples

    student = build_model(seg, 'mmseg')
    distiller = Distiller(student, Edge(5), None, teacher_ckpt='own', scope='mmseg',
                          view=dict(scale=2.0, multiple_of=160, fit='pad'),
                          labels=dict(type='PseudoLabels', score=0.6, classes={5: 5, 2: 2}))
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 64)), True)
    for sample in data['data_samples']:
        sample.gt_sem_seg.data[:] = 255
    step = distiller.current
    step.begin(**data)
    step.teach(**data)
    assert all((sample.gt_sem_seg.data == 5).all() for sample in step.label(**data))
    step.clear()


# ---------------------------------------------------------------------- with a peer


def with_a_peer(cfg, labeller, labels, losses=CWD):
    """A hook with a peer and somebody else, who labels."""
    return labels_hook(None, labels, {name: dict(loss, teacher='peer') for name, loss in losses.items()}, teachers=dict(
        peer=dict(teacher=dict(type='PeerTeacher', config=wide(cfg)), teacher_ckpt='random'),
        big=dict(teacher=labeller, teacher_ckpt='own')))


def test_a_peer_learns_the_same_labels(det):
    """A third model labels; without a name it is the one that is no peer."""
    box = [2., 3., 12., 13.]
    seen = []

    def look(runner):
        model = distill_hook(runner).distiller.teachers['peer'].model
        if 'loss' not in vars(model):
            original = model.loss

            def loss(inputs, data_samples):
                seen.append([sample.gt_instances.bboxes.tolist() for sample in data_samples])
                return original(inputs, data_samples)
            model.loss = loss

    det.train_dataloader.dataset.pipeline = [step for step in det.train_dataloader.dataset.pipeline
                                             if step['type'] != 'LoadAnnotations']
    hook = with_a_peer(det, Oracle([[*box, 0, 0.9]]), dict(type='PseudoLabels', classes={0: 0}))
    _, record = train(det, [hook], look)
    assert seen and all(boxes == [box] for batch in seen for boxes in batch)
    assert all(step['peer_task'] > 0 and step['loss_cwd'] > 0 for step in record.losses)


def test_a_peer_whose_labeller_is_sure_of_nothing_trains_as_ever(det):
    _, without = train(det, [with_a_peer(det, Oracle([[0.] * 6]), None)])
    runner, record = train(det, [with_a_peer(det, Oracle([[0.] * 6]), dict(
        type='PseudoLabels', score=1.0, teacher='big', classes={0: 0}))])
    assert record.losses == without.losses


def test_a_peer_does_not_label(det):
    entry = with_a_peer(det, Oracle([[0.] * 6]), dict(type='PseudoLabels', teacher='peer'))
    with pytest.raises(ValueError, match=r"the peer 'peer' is in training like the student, .*one of: 'big'"):
        Distiller(build_model(det, 'mmdet'), None, entry['losses'], teachers=entry['teachers'], scope='mmdet',
                  labels=entry['labels'])


# ---------------------------------------------------------------------- a labeller of one's own


class Middle(Labeller):
    """One object in the middle of every image, whatever the teacher says."""

    def objects(self, batch, predictions):
        height, width = input_shape(batch)
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        self.count('middle', torch.tensor(1.0))
        return [Detections(box, torch.tensor([0]), torch.ones(1)) for _ in next(iter(predictions.values()))]


@pytest.fixture
def middle():
    MODELS.register_module(module=Middle)
    yield
    MODELS.module_dict.pop('Middle')


def test_a_labeller_of_ones_own(det, middle):
    runner, watch = run(det, [labels_hook(wide(det), dict(type='Middle', classes='positional'))])
    assert all(sample.gt_instances.bboxes[-1].tolist() == [16., 16., 48., 48.]
               for given in watch.given for sample in given)
    assert runner.message_hub.log_scalars['train/kd_labels_middle'].current() == 1


# ---------------------------------------------------------------------- what is refused


class Painter(Labeller):
    """Labels pixels alone."""

    def pixels(self, batch, predictions):
        return None


def test_a_labeller_of_the_other_task(det):
    student = build_model(det, 'mmdet')
    MODELS.register_module(module=Painter)
    try:
        with pytest.raises(ValueError, match=r'labels: Painter has no method objects\(\), so it labels nothing of det'):
            Distiller(student, wide(det), {}, teacher_ckpt='random', scope='mmdet', classes=['square', 'disc'],
                      labels=dict(type='Painter', classes='positional'))
    finally:
        MODELS.module_dict.pop('Painter')


REFUSED = [
    (5, r'labels=5: write labels=dict\(type='),
    (dict(loss_a=dict(type='PseudoLabels')), 'a name must be an identifier without `loss`'),
    (dict(type='PseudoLabel'), "unknown labeller type 'PseudoLabel'. Did you mean 'PseudoLabels'"),
    (dict(type='PseudoLabels', score=2), r'PseudoLabels: score=2 must be within 0..1'),
    (dict(type='PseudoLabels', thr=0.5), r"unknown argument\(s\) 'thr'.*score"),
    (dict(type='PseudoLabels', teacher='b'), r"teacher='b' is not among .*'teacher'"),
    (dict(type='PseudoLabels', classes='all'), r"classes='all' must be 'common', 'positional', a list"),
    (dict(type='PseudoLabels', classes=dict(cat='disc')), "the teacher does not know 'cat'; it has square, disc, star"),
    (dict(type='PseudoLabels', classes=dict(square='cat')), "the student does not know 'cat'; it has square, disc"),
    (dict(type='PseudoLabels', classes=['star']), 'the student does not know star'),
]


@pytest.mark.parametrize('labels, message', REFUSED, ids=[str(row[0])[:50] for row in REFUSED])
def test_bad_values(det, labels, message):
    student = build_model(det, 'mmdet')
    teacher = teacher_of(det, **retinanet_model(base=4, classes=3, neck=8))
    teacher['train_dataloader'] = dict(dataset=dict(type='CocoDataset', metainfo=dict(
        classes=('square', 'disc', 'star'))))
    with pytest.raises(ValueError, match=message):
        Distiller(student, teacher, None, teacher_ckpt='random', scope='mmdet', classes=('square', 'disc'),
                  labels=labels)


@pytest.mark.parametrize('source, message', [
    ('self', 'teacher=.* among|which teacher'),
    ('peer', r"the peer 'teacher' is in training like the student, .* one of: none"),
    (nn.Conv2d(3, 3, 1), 'Conv2d predicts nothing')])
def test_teachers_that_cannot_label(det, source, message):
    student = build_model(det, 'mmdet')
    losses = None
    if source == 'peer':
        source = dict(type='PeerTeacher', config=teacher_of(det))
    if source == 'self':
        losses = dict(loss_x=dict(type='FitNetLoss', student_at='neck', teacher_at='backbone'))
    with pytest.raises(ValueError, match=message):
        Distiller(student, source, losses, teacher_ckpt='random' if isinstance(source, dict) else None, scope='mmdet',
                  labels=dict(type='PseudoLabels', classes='positional'))


def test_labels_that_nobody_looks_at(det):
    student = build_model(det, 'mmdet')
    with pytest.raises(ValueError, match='with task_loss_weight=0 nothing looks at labels'):
        Distiller(student, wide(det), CWD, teacher_ckpt='random', scope='mmdet', task_loss_weight=0,
                  labels=dict(type='PseudoLabels', classes='positional'))


def test_objects_with_more_than_a_label_are_refused(det):
    student = build_model(det, 'mmdet')
    sample = synthetic_batch(student, 1, (64, 64))['data_samples'][0]
    assert fault_of(sample, True) is None
    sample.gt_instances.areas = torch.zeros(len(sample.gt_instances))
    assert 'objects of the training data have areas besides' in fault_of(sample, True)


def test_mixed_precision_and_accumulated_gradients(det, monkeypatch):
    """Boxes come in full precision: those of half precision would be off by pixels."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    det.optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', accumulative_counts=2,
                             optimizer=det.optim_wrapper.optimizer)
    labels = dict(type='PseudoLabels', score=0.005, iou=0.9, classes='positional')
    runner, watch = run(det, [labels_hook(wide(det), labels, dict(
        loss_kd=dict(type='SigmoidKDLoss', at='@logits')))])
    for before, given in zip(watch.packed, watch.given):
        for old, new in zip(before[1], given):
            more = new.gt_instances.bboxes[len(old.gt_instances):]
            assert len(more) and more.dtype == torch.float32
            assert not torch.equal(more, more.bfloat16().float())
    assert all(np.isfinite(value) for step in watch.losses for value in step.values())


def test_an_open_vocabulary_teacher_is_asked_for_names(det):
    """Its classes are what it is asked for; others than the student's are left out."""
    class Open(Oracle):
        def predict(self, inputs, samples):
            self.asked.append([(sample.text, sample.custom_entities) for sample in samples])
            for sample in samples:
                rows = torch.tensor([[2. + 20 * index, 3., 14. + 20 * index, 15.] for index in range(3)])
                sample.pred_instances = InstanceData(
                    bboxes=rows, labels=torch.arange(len(sample.text)), scores=torch.full((3, ), 0.9))
            return samples

    oracle = Open([[0.] * 6])
    det.train_dataloader.dataset.pipeline = [step for step in det.train_dataloader.dataset.pipeline
                                             if step['type'] != 'LoadAnnotations']
    labels = dict(type='PseudoLabels', prompts=['a ball', 'star', 'square'],
                  classes={'a ball': 'disc', 'square': 'square'})
    runner, watch = run(det, [labels_hook(oracle, labels)])
    assert oracle.asked[-1][0] == (('a ball', 'star', 'square'), True)
    for given in watch.given:
        for sample in given:
            assert sample.gt_instances.labels.tolist() == [1, 0]
            assert sample.gt_instances.bboxes[:, 0].tolist() == [2., 42.]
