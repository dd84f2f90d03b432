"""The RoI-head view on real two-stage detectors, compared with the losses that the host itself computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from two_stage import batch_of, build_two_stage, kept_two_stage, recorded

from kd_mm.hosts.heads.proposals import roi_views, rpn_views, stage_pairs
from kd_mm.types.proposals import RoIView, _recoded, compared, own

KINDS = ('faster', 'mask', 'cascade')


@pytest.fixture(scope='module')
def models():
    return kept_two_stage()


def pairs_of(student, teacher, place, proposals='student', levels=(None, None)):
    """The losses of the student's step and its views, one pair a stage."""
    teacher = teacher.eval()
    data = batch_of(student)
    _, theirs = recorded(teacher, 'teacher', place, data, proposals)
    losses, ours = recorded(student, 'student', place, data, proposals)
    if place.startswith('@rpn'):
        return losses, [rpn_views(ours, theirs)]
    stages = stage_pairs(place, student, teacher, *levels, proposals)
    return losses, roi_views(place, ours, theirs, stages, proposals)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_are_those_of_the_hosts_own_loss(models, kind):
    """Cross-entropy and L1 of the view's rows are the host's class and box losses, stage by stage."""
    student = models(kind)
    losses, pairs = pairs_of(student, models(kind, 1), '@roi_logits')
    weights = getattr(student.roi_head, 'stage_loss_weights', [1.0])
    assert len(pairs) == len(weights) == (3 if kind == 'cascade' else 1)
    for stage, ((view, _), weight) in enumerate(zip(pairs, weights)):
        prefix = f's{stage}.' if kind == 'cascade' else ''
        assert view.positive.any() and not view.positive.all() and set(view.images.tolist()) == {0, 1}
        value = weight * F.cross_entropy(view.logits, view.labels)
        torch.testing.assert_close(value, losses[f'{prefix}loss_cls'])
        head = student.roi_head.bbox_head
        head = head[stage] if kind == 'cascade' else head
        rows = compared('@roi_boxes', view, view)
        value = weight * head.loss_bbox(rows.student, rows.targets, reduction_override='sum') / rows.total
        torch.testing.assert_close(value, losses[f'{prefix}loss_bbox'])
        assert rows.total == len(view) and len(rows.student) == int(view.positive.sum())
        assert torch.equal(rows.student, rows.teacher) and torch.equal(rows.labels, view.labels[view.positive])


def test_anchors_are_those_of_the_hosts_own_loss(models):
    student, teacher = models('faster'), models('faster', 1)
    losses, [(view, other)] = pairs_of(student, teacher, '@rpn_logits')
    assert len(view) == len(view.labels) <= 2 * 256 and view.background == 1
    torch.testing.assert_close(F.cross_entropy(view.logits, view.labels), sum(losses['loss_rpn_cls']))
    rows = compared('@rpn_boxes', view, other)
    value = F.l1_loss(rows.student, rows.targets, reduction='sum') / rows.total
    torch.testing.assert_close(value, sum(losses['loss_rpn_bbox']))
    # The boxes of the anchors are where the head's own coder puts them.
    torch.testing.assert_close(view.boxes, student.rpn_head.bbox_coder.decode(view.rois[:, 1:], view.deltas))


@pytest.mark.parametrize('kind', KINDS)
def test_the_teacher_answers_for_the_same_proposals(models, kind):
    """Its own head, asked by hand at the view's proposals, and nothing of it has a gradient."""
    student, teacher = models(kind), models(kind, 1, width=24)
    _, pairs = pairs_of(student, teacher, '@roi_logits')
    features = teacher.extract_feat(batch_of(student)['inputs'])
    for stage, (view, other) in enumerate(pairs):
        arguments = (stage, features, view.rois) if kind == 'cascade' else (features, view.rois)
        expected = teacher.roi_head._bbox_forward(*arguments)
        torch.testing.assert_close(other.logits, expected['cls_score'])
        torch.testing.assert_close(other.deltas, expected['bbox_pred'])
        torch.testing.assert_close(other.features, expected['bbox_feats'])
        assert torch.equal(other.rois, view.rois) and torch.equal(other.labels, view.labels)
        assert not other.logits.requires_grad and not other.features.requires_grad and view.logits.requires_grad
        assert other.features.shape[1] == 24 and view.features.shape[1] == 16
        head = teacher.roi_head.bbox_head[stage] if kind == 'cascade' else teacher.roi_head.bbox_head
        torch.testing.assert_close(other.boxes, head.bbox_coder.decode(view.rois[:, 1:], expected['bbox_pred']))


@pytest.mark.parametrize('kind', ['mask', 'cascade'])
def test_masks_of_positive_rows(models, kind):
    student, teacher = models(kind), models(kind, 1, width=24)
    _, pairs = pairs_of(student, teacher, '@roi_masks')
    features = teacher.extract_feat(batch_of(student)['inputs'])
    for stage, (view, other) in enumerate(pairs):
        found = compared('@roi_masks', view, other)
        boxes = view.rois[view.positive]
        for result, head, levels in ((found.teacher, teacher.roi_head, features), ):
            arguments = (stage, levels, boxes) if kind == 'cascade' else (levels, boxes)
            masks = head._mask_forward(*arguments)['mask_preds']
            expected = torch.stack([mask[label] for mask, label in zip(masks, found.labels)])[:, None]
            torch.testing.assert_close(result, expected)
        assert found.student.shape == found.teacher.shape == (len(boxes), 1, 28, 28)
        assert found.student.requires_grad and not found.teacher.requires_grad


def test_a_copy_of_the_student_answers_the_same(models):
    student = models('cascade')
    for place in ('@roi_logits', '@roi_boxes', '@roi_masks', '@roi_features', '@rpn_logits', '@rpn_boxes'):
        _, pairs = pairs_of(student, copy.deepcopy(student), place)
        for pair in pairs:
            rows = compared(place, *pair)
            assert len(rows.student) > 0
            torch.testing.assert_close(rows.student, rows.teacher, rtol=1e-4, atol=1e-5)


def test_a_cascade_teaches_a_plain_head(models):
    student, teacher = models('mask'), models('cascade', 1)
    for levels, stage in (((None, None), 0), (([0], [2]), 2), (([0], [-1]), 2)):
        _, [(view, other)] = pairs_of(student, teacher, '@roi_boxes', levels=levels)
        features = teacher.extract_feat(batch_of(student)['inputs'])
        expected = teacher.roi_head._bbox_forward(stage, features, view.rois)
        torch.testing.assert_close(other.logits, expected['cls_score'])
        # Its deltas are in the code of its stage; compared they are in the student's, the box is the same.
        rows = compared('@roi_boxes', view, other)
        coder = student.roi_head.bbox_head.bbox_coder
        boxes = coder.decode(view.rois[view.positive, 1:], rows.teacher)
        torch.testing.assert_close(boxes, other.boxes[view.positive], rtol=1e-4, atol=1e-2)
        assert (stage == 0) == torch.equal(rows.teacher, other.deltas[view.positive])


def test_several_places_ask_the_head_once(models):
    student, teacher = models('mask'), models('mask', 1).eval()
    data = batch_of(student)
    _, theirs = recorded(teacher, 'teacher', '@roi_masks', data)
    _, ours = recorded(student, 'student', '@roi_masks', data)
    calls = dict(bbox_head=0, mask_head=0)
    handles = [getattr(teacher.roi_head, name).register_forward_hook(
        lambda *_, name=name: calls.update({name: calls[name] + 1})) for name in calls]
    for place in ('@roi_logits', '@roi_masks', '@roi_features', '@roi_masks', '@roi_boxes'):
        roi_views(place, ours, theirs, [(0, 0)])
    for handle in handles:
        handle.remove()
    assert calls == dict(bbox_head=1, mask_head=1)


@pytest.mark.parametrize('kind', ['mask', 'cascade'])
def test_proposals_of_the_teacher(models, kind):
    student, teacher = models(kind), models(kind, 1)
    _, [(view, other)] = pairs_of(student, teacher, '@roi_masks', 'teacher')
    features = student.extract_feat(batch_of(student)['inputs'])
    arguments = (0, features, view.rois) if kind == 'cascade' else (features, view.rois)
    # batch norm of the backbone is in eval (norm_eval), so a second pass gives the same features
    torch.testing.assert_close(view.logits, student.roi_head._bbox_forward(*arguments)['cls_score'])
    assert view.logits.requires_grad and view.masks.requires_grad and not other.logits.requires_grad
    assert torch.equal(other.rois, view.rois) and len(view.masks) == len(other.masks) == int(view.positive.sum())
    samples = batch_of(student)['data_samples']
    assert all(int((view.images == image).sum()) <= 32 for image in (0, 1)) and view.positive.any()
    # Positive rows are objects by the student's own rule, and their targets lead there.
    boxes = compared('@roi_boxes', view, view)
    coder = (student.roi_head.bbox_head[0] if kind == 'cascade' else student.roi_head.bbox_head).bbox_coder
    targets = coder.decode(view.rois[view.positive, 1:], boxes.targets)
    for image, label, target in zip(view.images[view.positive], boxes.labels, targets):
        truth = samples[int(image)].gt_instances
        gap = (truth.bboxes - target).abs().amax(dim=1)
        assert gap.min() < 0.1 and label in truth.labels[gap < 0.1]


def test_images_without_objects(models):
    student, teacher = models('mask'), models('mask', 1).eval()
    data = batch_of(student)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    _, theirs = recorded(teacher, 'teacher', '@roi_masks', data)
    _, ours = recorded(student, 'student', '@roi_masks', data)
    [pair] = roi_views('@roi_masks', ours, theirs, [(0, 0)])
    assert not pair[0].positive.any() and len(pair[0]) > 0
    for place, shape in (('@roi_masks', (0, 1, 28, 28)), ('@roi_boxes', (0, 4))):
        rows = compared(place, *pair)
        assert rows.student.shape == rows.teacher.shape == shape and rows.total == len(pair[0])


def test_hard_mining_asks_before_the_loss(models):
    """OHEM runs the student's head on every proposal first; the rows are those of the loss."""
    student = build_two_stage('faster')
    sampler = student.roi_head.bbox_sampler
    from mmdet.models.task_modules.samplers import OHEMSampler
    student.roi_head.bbox_sampler = OHEMSampler(
        num=16, pos_fraction=0.25, context=student.roi_head, neg_pos_ub=sampler.neg_pos_ub, add_gt_as_proposals=True)
    losses, [(view, _)] = pairs_of(student, models('faster', 1), '@roi_logits')
    torch.testing.assert_close(F.cross_entropy(view.logits, view.labels), losses['loss_cls'])


def test_boxes_that_the_host_wants_decoded(models):
    """reg_decoded_bbox: its targets are in pixels, those of the view are deltas."""
    student = build_two_stage('faster')
    student.roi_head.bbox_head.reg_decoded_bbox = True
    student.rpn_head.reg_decoded_bbox = True
    for place in ('@roi_boxes', '@rpn_boxes'):
        _, [(view, other)] = pairs_of(student, models('faster', 1), place)
        rows = compared(place, view, other)
        boxes = view.coder.decode(view.rois[view.positive, 1:], rows.targets)
        truth = torch.cat([sample.gt_instances.bboxes for sample in batch_of(student)['data_samples']])
        assert torch.cdist(boxes, truth).amin(dim=1).max() < 0.1
        assert torch.equal(view.targets[~view.positive], torch.zeros_like(view.targets[~view.positive]))


def view(labels, logits, **more):
    labels = torch.tensor(labels)
    rois = torch.cat([torch.zeros(len(labels), 1), torch.tensor([[0., 0., 10., 10.]] * len(labels))], dim=1)
    return RoIView(rois, labels, torch.ones(len(labels)), logits.shape[1] - 1, logits, **more)


def test_common_classes_by_hand():
    """Student: car, person, dog; teacher: person, car. The row of a dog is none of the teacher's business."""
    ours = view([0, 1, 2, 3], torch.arange(16.).view(4, 4))
    theirs = view([0, 1, 2, 3], 100 + torch.arange(12.).view(4, 3))
    rows = compared('@roi_logits', ours, theirs, (3, ([0, 1], [1, 0])), 2)
    assert rows.student.tolist() == [[0, 1, 3], [4, 5, 7], [12, 13, 15]]
    assert rows.teacher.tolist() == [[101, 100, 102], [104, 103, 105], [110, 109, 111]]
    assert rows.labels.tolist() == [0, 1, 2] and rows.total == 3

    masks = torch.arange(9.).view(3, 3, 1, 1), 100 + torch.arange(6.).view(3, 2, 1, 1)
    ours.masks, theirs.masks = masks
    rows = compared('@roi_masks', ours, theirs, (3, ([0, 1], [1, 0])), 2)
    assert rows.student.flatten().tolist() == [0, 4] and rows.teacher.flatten().tolist() == [101, 102]

    class Coder:
        means, stds = (0, ) * 4, (1, ) * 4

    ours.coder = theirs.coder = Coder()
    ours.deltas, theirs.deltas = torch.arange(48.).view(4, 12), 100 + torch.arange(32.).view(4, 8)
    ours.targets = torch.arange(16.).view(4, 4)
    rows = compared('@roi_boxes', ours, theirs, (3, ([0, 1], [1, 0])), 2)
    assert rows.student.tolist() == [[0, 1, 2, 3], [16, 17, 18, 19]]
    assert rows.teacher.tolist() == [[104, 105, 106, 107], [108, 109, 110, 111]]
    assert rows.targets.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and rows.labels.tolist() == [0, 1]


def test_one_prediction_for_all_classes():
    assert own(torch.ones(2, 1, 3), torch.tensor([4, 9])).shape == (2, 3)
    ours = view([1, 2, 0], torch.zeros(3, 3), deltas=torch.arange(12.).view(3, 4), targets=torch.zeros(3, 4))
    rows = compared('@roi_boxes', ours, ours)
    assert rows.student.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_deltas_of_another_code(models):
    first, second = (models('cascade').roi_head.bbox_head[stage].bbox_coder for stage in (0, 2))
    boxes = torch.tensor([[10., 10., 50., 40.]])
    deltas = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
    scale = torch.tensor(first.stds) / torch.tensor(second.stds)
    assert scale.min() > 2.9
    torch.testing.assert_close(_recoded(deltas, boxes, first, second), deltas * scale, rtol=1e-4, atol=1e-4)
    assert _recoded(deltas, boxes, first, first) is deltas
