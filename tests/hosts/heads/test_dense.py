"""The dense-head view on every kind of head of mmdet, compared with what the host itself does with its outputs."""

import importlib.util

import pytest
import torch
from heads import CLASSES, CONFIGS, batch_of, build_head, recorded_step

from kd_mm.hosts.heads.assigned import assignment_taps, read_assignment
from kd_mm.hosts.heads.dense import dense_view
from kd_mm.ops.boxes import around
from kd_mm.types.dense import Assignment, DenseView, rows
from kd_mm.types.records import Call

PAIRS = [pytest.param(name, marks=pytest.mark.skipif(
    name == 'paa' and importlib.util.find_spec('sklearn') is None, reason='PAA trains with sklearn only'))
         for name in CONFIGS]


@pytest.fixture(scope='module')
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = build_head(name)
        return built[name]

    return get


@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'paa'])  # PAA gives nothing before its NMS
def test_scores_and_boxes_are_those_of_the_host(models, name):
    """With every threshold off, the host's own detections are the view's boxes and scores, prior by prior."""
    model = models(name).eval()
    data = batch_of(model)
    with torch.no_grad():
        output = model.bbox_head(model.extract_feat(data['inputs']))
        view = dense_view(model.bbox_head, output)
        metas = [sample.metainfo for sample in data['data_samples']]
        cfg = model.bbox_head.test_cfg.copy()
        cfg.update(score_thr=-1.0, nms_pre=10**6, min_bbox_size=-1)
        found = model.bbox_head.predict_by_feat(*output, batch_img_metas=metas, cfg=cfg, with_nms=False)
    model.train()
    height, width = metas[0]['img_shape']
    for image, result in enumerate(found):
        boxes, scores, labels = [], [], []
        for level, logits in enumerate(view.logits):
            score, box = logits[image].sigmoid(), view.boxes[level][image]
            quality = view.quality[level][image].sigmoid()[:, None] if view.quality else 1.0
            order = score.flatten().sort(descending=True).indices
            if name == 'yolox':  # one class a prior, in the order of the priors
                best = score.max(dim=1)
                boxes.append(box)
                scores.append(best.values * quality[:, 0])
                labels.append(best.indices)
                continue
            boxes.append(box[order // CLASSES])
            scores.append((score * quality).flatten()[order])
            labels.append(order % CLASSES)
        boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        assert len(result.bboxes) == len(boxes)
        torch.testing.assert_close(result.scores, scores, rtol=1e-4, atol=1e-6)
        if name not in ('yolox', 'tood'):  # these two do not clip
            limit = 1 if name == 'fovea' else 0
            for axis, size in ((0, width), (1, height)):
                boxes[:, axis::2] = boxes[:, axis::2].clamp(0, size - limit)
        # Equal scores leave the order open: compare where the order is certain.
        certain = (result.labels == labels)
        assert certain.float().mean() > 0.99
        slack = 0.06 if name == 'fsaf' else 0.01  # the host clamps distances at 1e-4 for its loss only
        close = torch.isclose(result.bboxes, boxes, rtol=1e-4, atol=slack).all(dim=1)
        assert close[certain].float().mean() > 0.99


@pytest.mark.parametrize('name', ['fcos', 'fcos_norm', 'vfnet', 'gfl', 'atss'])
def test_boxes_mean_the_same_in_training_and_in_evaluation(models, name):
    """FCOS leaves its strides out and VFNet returns both its boxes only while they train."""
    model = models(name)
    head, features = model.bbox_head, model.eval().extract_feat(batch_of(model)['inputs'])
    evaluating = dense_view(head, head(features)).boxes
    head.train()  # nothing in these heads but the boxes depends on it: their norm is over groups
    training = dense_view(head, head(features)).boxes
    model.train()
    for one, other in zip(evaluating, training):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_the_mode_is_that_of_the_pass(models):
    model = models('fcos_norm')
    features = model.eval().extract_feat(batch_of(model)['inputs'])
    view = dense_view(model.bbox_head, model.bbox_head(features))
    model.train()  # decoding later must not change what the outputs mean
    with torch.no_grad():
        torch.testing.assert_close(view.boxes, dense_view(model.bbox_head, model.bbox_head(features)).boxes,
                                   rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize('name', PAIRS)
def test_assignment_is_the_hosts(models, name):
    model, calls = models(name), []
    data = batch_of(model)
    head = model.bbox_head
    assigner = getattr(head, 'cls_assigner', None) or getattr(head, 'assigner', None)
    if assigner is not None:
        assign = assigner.assign
        assigner.assign = lambda *args, **kwargs: calls.append(1) or assign(*args, **kwargs)
    try:
        losses, records = recorded_step(model, data)
    finally:
        if assigner is not None:
            del assigner.assign
    assert assigner is None or len(calls) == 2  # the host alone, once an image
    view = dense_view(head, records[''].calls[0].output)
    found = read_assignment(head, records[assignment_taps(head)[0]].calls, [level.shape[1] for level in view.logits])
    assert found.background == CLASSES
    counts = torch.zeros(2)
    for level, logits in enumerate(view.logits):
        assert found.labels[level].shape == found.weights[level].shape == logits.shape[:2]
        positive = found.positive(level)
        counts += positive.sum(dim=1)
        assert (found.weights[level][positive] > 0).all()
        if found.objects is None:
            continue
        assert torch.equal(found.objects[level] >= 0, positive)
        for image, sample in enumerate(data['data_samples']):
            chosen = positive[image]
            own = found.objects[level][image][chosen]
            assert torch.equal(found.labels[level][image][chosen], sample.gt_instances.labels[own])
    assert (found.objects is None) == (name == 'fovea')
    assert counts.sum() > 0 and found.num_pos == counts.clamp(min=1).sum()


@pytest.mark.parametrize('name', ['gfl', 'fcos', 'retinanet', 'yolox', 'tood'])
def test_positives_lie_at_their_objects(models, name):
    """Rows are in the host's order: the centre of a positive prior is in (or near) the box it is assigned to."""
    model = models(name)
    data = batch_of(model, seed=5)
    _, records = recorded_step(model, data)
    view = dense_view(model.bbox_head, records[''].calls[0].output)
    found = read_assignment(model.bbox_head, records[assignment_taps(model.bbox_head)[0]].calls,
                            [level.shape[1] for level in view.logits])
    for level, prior in enumerate(view.priors):
        points = prior if prior.shape[1] == 2 else (prior[:, :2] + prior[:, 2:]) / 2
        for image, sample in enumerate(data['data_samples']):
            chosen = found.positive(level)[image]
            boxes = sample.gt_instances.bboxes[found.objects[level][image][chosen]]
            slack = 16 if name in ('yolox', 'retinanet') else 1
            assert (points[chosen] >= boxes[:, :2] - slack).all() and (points[chosen] <= boxes[:, 2:] + slack).all()


def test_images_without_objects(models):
    for name in ('gfl', 'fcos', 'yolox', 'autoassign', 'tood', 'retinanet'):
        model = models(name)
        data = batch_of(model)
        for sample in data['data_samples']:
            sample.gt_instances = sample.gt_instances[:0]
        _, records = recorded_step(model, data)
        view = dense_view(model.bbox_head, records[''].calls[0].output)
        found = read_assignment(model.bbox_head, records[assignment_taps(model.bbox_head)[0]].calls,
                                [level.shape[1] for level in view.logits])
        assert not any(found.positive(level).any() for level in range(len(view))) and found.num_pos == 2


def test_gradient_reaches_the_boxes_and_detach_cuts_it(models):
    model = models('gfl')
    output = model.bbox_head(model.extract_feat(batch_of(model)['inputs']))
    view = dense_view(model.bbox_head, output)
    grads = torch.autograd.grad(sum(level.sum() for level in view.boxes), output[1], retain_graph=True)
    assert all(grad.abs().sum() > 0 for grad in grads)
    cut = view.detach()
    assert not any(level.requires_grad for level in (*cut.logits, *cut.boxes, *cut.distributions))
    assert DenseView([torch.zeros(1, 2, 3)]).detach()._boxes is None


def test_from_where_the_bins_count(models, monkeypatch):
    """A head without distributions says nothing."""
    for name, own in (('gfl', 'distances from the points at 0 of a cell'), ('fcos', None)):
        model = models(name)
        output = model.bbox_head(model.extract_feat(batch_of(model)['inputs']))
        assert dense_view(model.bbox_head, output).measured == own
    head = models('gfl').bbox_head
    output = head(models('gfl').extract_feat(batch_of(models('gfl'))['inputs']))
    monkeypatch.setattr(head.prior_generator, 'center_offset', 0.5)
    assert dense_view(head, output).measured == 'distances from the points at 0.5 of a cell'


def test_half_precision_is_lifted(models):
    model = models('retinanet')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        view = dense_view(model.bbox_head, model.bbox_head(model.extract_feat(batch_of(model)['inputs'])))
        assert all(level.dtype == torch.float32 for level in (*view.logits, *view.boxes))


def test_what_is_no_dense_head(models):
    model = models('gfl')
    with pytest.raises(ValueError, match='FPN is not a dense head'):
        dense_view(model.neck, [[torch.zeros(1, 3, 2, 2)]] * 2)
    with pytest.raises(ValueError, match='does not assign ground truth prior by prior'):
        assignment_taps(model.neck)
    with pytest.raises(ValueError, match='predicts no boxes'):
        DenseView([torch.zeros(1, 2, 3)], name='RepPointsHead').boxes  # noqa: B018
    with pytest.raises(ValueError, match='target assignment is not understood'):
        read_assignment(model.bbox_head, [Call((), {}, (torch.zeros(5), ))], [5])


def test_small_pieces():
    maps = torch.arange(2 * 6 * 2 * 2.0).view(2, 6, 2, 2)
    found = rows([maps], 3)[0]  # two anchors a cell, three numbers each
    assert found.shape == (2, 8, 3)
    assert torch.equal(found[0, 1], maps[0, 3:, 0, 0]) and torch.equal(found[0, 2], maps[0, :3, 0, 1])
    assert around(torch.tensor([5.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4, 3, 8, 9]
    labels = (torch.tensor([[0, 3, 2, -1]]), )
    assert Assignment(labels, (torch.ones(1, 4), ), 3).positive(0).tolist() == [[True, False, True, False]]
