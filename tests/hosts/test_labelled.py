"""New data samples with more labels, and predictions in the frame of the batch, with real models of the hosts."""

import copy

import pytest
import torch
from heads import build_head
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from two_stage import build_two_stage

from kd_mm.hosts import labelled
from kd_mm.hosts.predict import predict, prediction_taps, shares, why_not
from kd_mm.hosts.predictions import predicted_labels
from kd_mm.hosts.synthetic import find_num_classes, synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.ops.classes import map_classes
from kd_mm.teachers.view import View
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


class Mapper(torch.nn.Module):
    """A segmentor of nobody's that gives these logits (C, H, W) for every picture."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def predict(self, inputs, samples):
        for sample in samples:
            sample.seg_logits = PixelData(data=self.logits)
        return samples


def pixels_of(logits, classes, shape, seen=None, size=None):
    data = synthetic_batch(build_head('fcos'), 1, shape)['data_samples']
    size, pair = size or shape, map_classes(classes, None, None, (4, max(len(logits), 2)))
    return predict(Mapper(logits), torch.zeros(1, 3, *size), data, {}, pair, shape, [shape], seen, (),
                   False)


def test_what_a_teacher_sees_beyond_the_batch_is_left_out():
    """A view with padding: the pixels that were added say nothing, and the rest comes to the batch's size."""
    view = View(scale=0.5, multiple_of=(32, 32), fit='pad')
    seen = view.of((48, 64))
    assert seen.content == (24, 32) and seen.size == (32, 32)
    logits = torch.zeros(3, *seen.size)
    logits[1, :12], logits[2, 12:24], logits[0, 24:] = 9.0, 9.0, 9.0  # two halves, and the padding
    found = pixels_of(logits, 'positional', (48, 64), seen, seen.size)
    assert (found.labels[0, :22] == 1).all() and (found.labels[0, 26:] == 2).all()
    assert found.scores.shape == (1, 48, 64) and found.scores[0, 0, 0] > 0.99


def test_one_logit_is_that_of_the_second_class():
    """Of two classes; and several classes of a teacher that are one of the student's add up."""
    found = pixels_of(torch.full((1, 32, 32), 2.0), {0: 3, 1: 1}, (32, 32))
    assert (found.labels == 1).all() and found.scores[0, 0, 0] == pytest.approx(0.8808, abs=1e-4)
    found = pixels_of(torch.full((1, 32, 32), -2.0), {0: 3, 1: 1}, (32, 32))
    assert (found.labels == 3).all() and found.scores[0, 0, 0] == pytest.approx(0.8808, abs=1e-4)
    logits = torch.tensor([0.3, 0.3, 0.4]).log()[:, None, None].expand(3, 32, 32)
    found = pixels_of(logits, {0: 2, 1: 2, 2: 0}, (32, 32))
    assert (found.labels == 2).all() and found.scores[0, 0, 0] == pytest.approx(0.6)


def test_scores_of_mask_queries_are_shares_already():
    """They do not add up to 1, and a softmax over them would be almost even."""
    class MaskFormerHead(torch.nn.Module):
        pass

    class Mask2FormerHead(MaskFormerHead):
        pass

    class SideAdapterCLIPHead(torch.nn.Module):
        pass

    model = torch.nn.Module()
    model.decode_head = Mask2FormerHead()
    logits = torch.tensor([1.2, 0.3, -0.1])[:, None, None]
    for head in (Mask2FormerHead(), torch.nn.ModuleList([torch.nn.Identity(), MaskFormerHead()]),
                 SideAdapterCLIPHead()):
        model.decode_head = head
        assert shares(model, logits).flatten().tolist() == pytest.approx([0.8, 0.2, 0.0])
        sample = SegDataSample(pred_sem_seg=PixelData(data=torch.zeros(1, 1, 1, dtype=torch.long)),
                               seg_logits=PixelData(data=logits))  # what a report judges scores by
        assert predicted_labels(sample, model)[1].item() == pytest.approx(0.8)
    model.decode_head = torch.nn.Identity()
    assert shares(model, logits).flatten().tolist() == pytest.approx(logits.softmax(dim=0).flatten().tolist())
    assert predicted_labels(sample, model)[1].item() == pytest.approx(float(logits.softmax(dim=0)[0]))


def test_boxes_stay_in_the_picture_and_proposals_go_along():
    """A detector that takes the proposals of others; the picture is smaller than the padded batch."""
    class Fast(torch.nn.Module):
        def predict(self, inputs, samples):
            for sample in samples:
                sample.pred_instances = InstanceData(bboxes=sample.proposals.bboxes, labels=torch.tensor([0, 5]),
                                                     scores=torch.ones(2))
            return samples

    sample, = synthetic_batch(build_head('fcos'), 1, (64, 64))['data_samples']
    sample.proposals = InstanceData(bboxes=torch.tensor([[-3., -4., 99., 60.], [1., 1., 5., 5.]]))
    found, = predict(Fast(), torch.zeros(1, 3, 64, 64), [sample], {}, map_classes({0: 1}, None, None, (4, 4)), (64, 64),
                     [(50, 40)])
    assert found.boxes.tolist() == [[0., 0., 40., 50.]] and found.labels.tolist() == [1]  # class 5 is beyond the map


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
