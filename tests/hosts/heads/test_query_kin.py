"""The query view on detectors that others register under mmdet, known by what they return and not by their names."""

import copy

import pytest
import torch
from detrs import CLASSES, LAYERS, QUERIES, WIDTH, batch_of, recorded_view
from realtime_detrs import BINS, build_realtime, realtime_config
from stock import coco_data, finish, hook, learned, merge, train
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.heads.find import heads, need_head
from kd_mm.hosts.heads.query import predictions, query_taps, query_view
from kd_mm.hosts.taps import Tap
from kd_mm.registry import build
from kd_mm.types.query import QueryView, same_layers

LOSSES = dict(
    logits=dict(type='DETRDistillLogitsLoss', at='bbox_head'),
    feature=dict(type='DETRDistillFeatureLoss', at='bbox_head'),
    prior=dict(type='DETRDistillQueryPriorLoss', at='bbox_head'),
    points=dict(type='KDDETRLoss', at='bbox_head', general=7))


@pytest.fixture(scope='module')
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = build_realtime(name), build_realtime(name, seed=1, base=12, queries=17)
        return built[name]

    return get


def test_the_matched_queries_in_training(models):
    """They are those that the host's own loss matches with objects, layer by layer; denoising ones come before them."""
    model, _ = models('rtdetr')
    view, records = recorded_view(model.train(), batch_of(model), extra=('loss_by_feat_single', ))
    assert records['head'].calls[0].output[0].shape[2] > QUERIES
    assert view.logits.shape == (LAYERS, 2, QUERIES, CLASSES) and view.queries.shape == (LAYERS, 2, QUERIES, WIDTH)
    for layer, call in enumerate(records['loss_by_feat_single'].calls[:LAYERS]):
        assert torch.equal(call.args[0], view.logits[layer]) and torch.equal(call.args[1], view.boxes[layer])
    assert not view.partial and view.distributions is None and len(view.memory) == len(view.neck) == 4
    counts = {name: value.shape[1] for name, value in view.points.items()}
    assert counts == dict(query=QUERIES, reference_points=QUERIES)


@pytest.mark.parametrize('name', ['rtdetr', 'dfine', 'deim'])
def test_in_evaluation_the_last_layer_is_what_it_predicts_from(models, name):
    model = models(name)[0].eval()
    data = batch_of(model)
    model.bbox_head.test_cfg = dict(max_per_img=CLASSES * QUERIES)
    with torch.no_grad():
        view, _ = recorded_view(model, data, mode='tensor')
        found = model.predict(data['inputs'], copy.deepcopy(data['data_samples']), rescale=False)
    assert len(view) == 1 and view.partial
    for image, sample in enumerate(found):
        torch.testing.assert_close(sample.pred_instances.scores,
                                   view.scores()[-1, image].flatten().sort(descending=True).values)


@pytest.mark.parametrize('name', ['dfine', 'deim'])
def test_distributions(models, name):
    """One prediction more than layers, and a distribution for each side of a box of the others."""
    model, _ = models(name)
    view, records = recorded_view(model.train(), batch_of(model))
    logits, (boxes, corners) = records['head'].calls[0].output
    assert view.logits.shape == (LAYERS + 1, 2, QUERIES, CLASSES) and len(logits) == len(boxes) == LAYERS + 1
    assert view.distributions.shape == (LAYERS, 2, QUERIES, 4, BINS)
    assert torch.equal(view.distributions[-1].flatten(2), corners[-1][:, -QUERIES:])
    assert torch.equal(view.logits[-1], logits[-1][:, -QUERIES:]) and torch.equal(view.boxes[0], boxes[0][:, -QUERIES:])


@pytest.mark.parametrize('name', ['rtdetr', 'dfine', 'deim'])
def test_every_loss_on_queries_teaches(models, name):
    """The teacher is in evaluation and shows its last layer: that one is compared."""
    student, teacher = models(name)
    data = batch_of(student)
    losses = copy.deepcopy(LOSSES)
    if name != 'rtdetr':  # the same points with and without the distributions
        losses['points']['points'] = 'specific'
        losses['sides'] = dict(losses['points'], distribution_weight=1.0)
    student.train().zero_grad()
    distiller = Distiller(student, teacher, {f'loss_{key}': value for key, value in losses.items()}, scope='mmdet',
                          speed='exact')
    distiller.attach()
    try:
        found = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
    for key in losses:
        assert torch.isfinite(found[f'loss_{key}']) and found[f'loss_{key}'] > 0, key
    if name != 'rtdetr':
        assert found['loss_sides'] > found['loss_points']
    sum(found[f'loss_{key}'] for key in losses).backward()
    assert any(grad.abs().sum() > 0 for grad in learned(student, teacher).values())


@pytest.mark.parametrize('name', ['dfine', 'deim'])
def test_a_real_training(name, coco_root, tmp_path):
    """By `custom_imports`, as others register theirs; DEIM on mosaics."""
    cfg = realtime_config(name, classes=2)
    teacher = realtime_config(name, classes=2, base=12)
    finish(merge(cfg, coco_data(coco_root, batch=2)), tmp_path, 1, False)
    if name == 'deim':
        inner = cfg.train_dataloader.dataset
        load, boxes, resize, pack = inner.pipeline
        inner.pipeline = [load, boxes]
        cfg.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=inner, pipeline=[
            dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0), resize, pack])
    cfg.train_dataloader.batch_sampler = None
    runner, recorder = train(cfg, [hook(dict(model=teacher.model.to_dict(), default_scope='mmdet'), dict(
        loss_points=dict(LOSSES['points'], distribution_weight=0.5), loss_logits=LOSSES['logits']))])
    assert runner.iter == 1 and all(recorder.losses[0][name] > 0 for name in ('loss_points', 'loss_logits', 'loss_cls'))


class OwnHead(nn.Module):
    """Keeps its transformer inside and returns a dict, as the authors of RT-DETR do."""

    def __init__(self, extra=0):
        super().__init__()
        self.num_queries, self.extra, self.loss_cls = 5, extra, nn.Identity()
        if extra:
            self.denoising_class_embed = nn.Embedding(3, 8)
        self.classes, self.boxes, self.corners = nn.Linear(8, 3), nn.Linear(8, 4), nn.Linear(8, 4 * BINS)

    def forward(self, features):
        rows = features.flatten(2).transpose(1, 2)[:, :self.num_queries + self.extra]
        layers = [dict(pred_logits=self.classes(rows * scale), pred_boxes=self.boxes(rows * scale).sigmoid(),
                       pred_corners=self.corners(rows * scale)) for scale in (1, 2)]
        return dict(layers[-1], aux_outputs=layers[:-1])


class OwnDetector(nn.Module):
    def __init__(self, extra=0):
        super().__init__()
        self.bbox_head = OwnHead(extra)

    def forward(self, features):
        return self.bbox_head(features)


def own_view(model, features):
    taps = {name: Tap(model, path, structured=True) for name, path in query_taps(model, 'bbox_head').items()}
    for tap in taps.values():
        tap.arm()
    try:
        output = model(features)
        return output, query_view(model, model.bbox_head, {name: tap.read() for name, tap in taps.items()})
    finally:
        for tap in taps.values():
            tap.clear()


def test_a_transformer_inside_of_the_head():
    model, features = OwnDetector(extra=2), torch.randn(2, 8, 4, 4)
    need_head('KDDETRLoss', 'student', model, 'bbox_head', model.bbox_head, QueryView)
    output, view = own_view(model, features)
    assert view.logits.shape == (2, 2, 5, 3) and view.distributions.shape == (2, 2, 5, 4, BINS)
    assert torch.equal(view.logits[-1], output['pred_logits'][:, 2:])  # denoising queries come first
    assert torch.equal(view.boxes[0], output['aux_outputs'][0]['pred_boxes'][:, 2:])
    assert view.decode is None and view.queries is None and not view.memory
    assert build(dict(type='DETRDistillLogitsLoss'))(view, own_view(OwnDetector(), features)[1]) > 0

    del model.bbox_head.denoising_class_embed
    with pytest.raises(ValueError, match='7 queries where 5 are matched.*which ones'):
        own_view(model, features)
    del model.bbox_head.num_queries
    assert heads(model, QueryView) == []
    with pytest.raises(ValueError, match='no DETR-type detector.*no num_queries or num_query'):
        query_taps(model, 'bbox_head')
    with pytest.raises(ValueError, match='OwnHead.* is none'):
        need_head('KDDETRLoss', 'student', model, 'bbox_head', model.bbox_head, QueryView)


def test_forms_of_outputs():
    logits, boxes, corners = torch.randn(3, 2, 5, 4), torch.rand(3, 2, 5, 4), torch.randn(2, 2, 5, 4 * BINS)
    for output in ((logits, boxes), [list(logits), list(boxes)], ([None, *logits], [None, *boxes], None),
                   (logits, (boxes, corners)), (list(logits), (list(boxes), list(corners)))):
        found = predictions(None, output)
        assert torch.equal(found.logits, logits) and torch.equal(found.boxes, boxes)
        assert (found.distributions is None) == (not isinstance(output[1], tuple))
    for output in (logits, (logits, ), (logits, boxes[:2]), (logits, logits[..., :3]), (logits[0], boxes[0]), {}, None):
        with pytest.raises(ValueError, match='does not return class logits'):
            predictions(None, output)
    with pytest.raises(ValueError, match='box distributions must be'):
        predictions(None, (logits, (boxes, corners[..., :-1])))


def test_layers_of_both_sides():
    whole, last = QueryView(torch.randn(3, 1, 5, 2), torch.rand(3, 1, 5, 4)), QueryView(torch.randn(1, 1, 5, 2))
    assert same_layers(whole, last) == (whole, last)
    last.partial = True
    for own, theirs in (same_layers(whole, last), same_layers(last, whole)[::-1]):
        assert torch.equal(own.logits, whole.logits[-1:]) and torch.equal(own.boxes, whole.boxes[-1:])
        assert torch.equal(theirs.logits, last.logits)
