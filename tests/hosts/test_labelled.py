"""New data samples with more labels, and predictions in the frame of the batch, with real models of the hosts."""

import copy

import pytest
import torch
from heads import build_head
from mmengine.structures import InstanceData
from two_stage import build_two_stage

from kd_mm.hosts import labelled
from kd_mm.hosts.predict import predict, prediction_taps, why_not
from kd_mm.hosts.synthetic import find_num_classes, synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.ops.classes import map_classes
from kd_mm.types.labels import Detections

SHAPE = (128, 160)


def batch_of(model, size=SHAPE):
    return model.data_preprocessor(synthetic_batch(model, 2, size), True)


def kept_of(model, data, wanted=()):
    taps = [Tap(model, path, structured=True) for path in prediction_taps(model, wanted)]
    for tap in taps:
        tap.arm()
    with torch.no_grad():
        model(data['inputs'], copy.deepcopy(data['data_samples']), mode='tensor')
    return {tap.path: tap.read() for tap in taps if not tap.disarm()}


def test_masks_of_a_mask_rcnn(monkeypatch):
    """Masks are those that the host pastes into the picture; they follow its own bitmaps or polygons."""
    model = build_two_stage('mask').eval()
    model.roi_head.test_cfg.update(score_thr=0.0, mask_thr_binary=0.3)
    data = batch_of(model)
    for sample in data['data_samples']:  # as after a resize and a flip, which the batch has already
        sample.set_metainfo(dict(ori_shape=(64, 80), scale_factor=(2.0, 2.0), flip=True, flip_direction='horizontal'))
    kept = kept_of(model, data)
    count = find_num_classes(model)
    pair = map_classes('positional', None, None, (count, count))
    monkeypatch.setattr(model.backbone, 'forward', None)  # features are kept
    found = predict(model, data['inputs'], data['data_samples'], kept, pair, SHAPE, [SHAPE, SHAPE])
    for part in found:
        assert len(part) > 3 and part.masks.shape == (len(part), *SHAPE) and part.masks.any()
        assert part.boxes.max() <= 160 and part.boxes[:, 3].max() <= 128
    before = copy.deepcopy(data['data_samples'])
    new = labelled.with_objects(data['data_samples'], [found[0], None])
    assert new[1] is data['data_samples'][1]
    old, more = before[0].gt_instances, new[0].gt_instances
    assert torch.equal(data['data_samples'][0].gt_instances.bboxes, old.bboxes)
    assert len(more) == len(old) + len(found[0]) and type(more.masks) is type(old.masks)
    assert (more.masks.masks[:len(old)] == old.masks.masks).all()
    assert (more.masks.masks[len(old):] == found[0].masks.numpy()).all()
    losses = model.train().loss  # the host takes them
    monkeypatch.undo()
    assert torch.isfinite(losses(data['inputs'], new)['loss_mask'])


def test_polygons_become_bitmaps():
    from mmdet.structures.mask import PolygonMasks
    sample = batch_of(build_two_stage('mask'))['data_samples'][0]
    square = [[[4., 4., 20., 4., 20., 20., 4., 20.]]]
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[4., 4., 20., 20.]]), labels=torch.tensor([0]),
                                       masks=PolygonMasks([list(map(torch.Tensor.numpy, map(torch.tensor, part)))
                                                           for part in square], *SHAPE))
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[:, 50:60, 50:60] = True
    one = Detections(torch.tensor([[50., 50., 60., 60.]]), torch.tensor([1]), torch.tensor([0.9]), mask)
    new, = labelled.with_objects([sample], [one])
    assert new.gt_instances.masks.masks.shape == (2, *SHAPE)
    assert new.gt_instances.masks.masks[1].sum() == 100 and new.gt_instances.masks.masks[0].sum() > 200
    assert type(sample.gt_instances.masks).__name__ == 'PolygonMasks'


@pytest.mark.parametrize('name', ['fcos', 'rtmdet', 'yolox'])
def test_heads_whose_outputs_are_kept(name):
    model = build_head(name).eval()
    model.bbox_head.test_cfg.score_thr = 0.0
    data = batch_of(model, (64, 64))
    kept = kept_of(model, data, ['bbox_head.something'])
    assert set(kept) == {'extract_feat', 'bbox_head'}
    count = find_num_classes(model)
    pair = map_classes('positional', None, None, (count, count))
    args = (data['inputs'], data['data_samples'])
    whole = predict(model, *args, {}, pair, (64, 64), [(64, 64)] * 2)
    calls = []
    handle = model.bbox_head.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = [module.register_forward_pre_hook(lambda *_: calls.append(2)) for module in model.bbox_head.children()]
    again = predict(model, *args, kept, pair, (64, 64), [(64, 64)] * 2)
    for hook in (handle, *inner):
        hook.remove()
    assert 2 not in calls
    for one, two in zip(whole, again):
        torch.testing.assert_close(one.boxes, two.boxes)
        torch.testing.assert_close(one.scores, two.scores)
    assert 'forward' not in vars(model.bbox_head) and 'extract_feat' not in vars(model)


def test_what_else_a_sample_holds_goes_with_it():
    """Crowds, proposals and facts of the picture: the host and our own regions read them from the new sample."""
    sample = batch_of(build_two_stage('faster'))['data_samples'][0]
    sample.ignored_instances = InstanceData(bboxes=torch.tensor([[1., 2., 30., 40.]]), labels=torch.tensor([0]))
    sample.proposals = InstanceData(bboxes=torch.zeros(3, 4))
    one = Detections(torch.tensor([[50., 50., 60., 60.]]), torch.tensor([1]), torch.tensor([0.9]))
    new, = labelled.with_objects([sample], [one])
    assert new is not sample and new.ignored_instances is sample.ignored_instances
    assert new.proposals is sample.proposals and new.metainfo == sample.metainfo
    assert len(new.gt_instances) == len(sample.gt_instances) + 1


def test_boxes_of_another_kind_are_refused():
    sample = batch_of(build_two_stage('faster'))['data_samples'][0]
    sample.gt_instances = InstanceData(bboxes=torch.zeros(2, 5), labels=torch.zeros(2, dtype=torch.long))
    assert 'boxes of 5 numbers are not supported, only x1 y1 x2 y2' in labelled.fault_of(sample, True)
    assert labelled.fault_of(sample, False) is None


def test_models_that_predict_nothing():
    assert 'Linear predicts nothing' in why_not(torch.nn.Linear(1, 1))
    assert prediction_taps(torch.nn.Linear(1, 1)) == []


def test_a_picture_without_objects_keeps_its_samples():
    data = batch_of(build_two_stage('faster'))['data_samples']
    data[0].gt_instances = data[0].gt_instances[:0]
    assert labelled.with_room(data, True, SHAPE, 255, 'cpu') is data
    assert labelled.with_objects(data, [None, None]) is data
