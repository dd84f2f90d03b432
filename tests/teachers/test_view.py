"""A teacher that sees the batch at another size: exact, right for its own head, compared at the student's grid."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detrs import detr_config
from heads import head_config
from stock import detector, hook, make_runner, segmentor, teacher_of, train

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.levels import at_grid
from kd_mm.hosts.models import build_model
from kd_mm.hosts.samples import samples_seen
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.teachers.view import View, view_of
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Seen

HALF = dict(scale=0.5)


def batch_of(student, shape=(64, 64), count=2):
    return student.data_preprocessor(synthetic_batch(student, count, shape), False)


def compared(distiller, student, data):
    """The comparisons of one training forward."""
    student.train()
    with distiller.current.open(data['inputs'], data['data_samples']) as step:
        student(data['inputs'], data['data_samples'], mode='loss')
        step.hear()
        return step.read()


def test_a_view_of_the_same_size_changes_nothing(coco_root, tmp_path):
    losses = dict(loss_fit=dict(type='FitNetLoss', at='neck', region=dict(type='GTBoxRegion')),
                  loss_kd=dict(type='SigmoidKDLoss', at='@logits'))
    det = detector(coco_root, tmp_path)
    views = None, dict(scale=1.0), dict(multiple_of=16), dict(size=(64, 64))
    found = [train(det, [hook(teacher_of(det), losses, view=view)])[1].losses for view in views]
    assert all(losses == found[0] for losses in found)


def test_a_detector_at_half_the_size(coco_root, tmp_path):
    """Levels meet by their stride in the student's pixels; the region is the student's, the values the teacher's."""
    det = detector(coco_root, tmp_path)
    student = make_runner(det).model
    losses = dict(loss_fit=dict(type='FitNetLoss', at='neck', region=dict(type='GTBoxRegion')),
                  loss_kd=dict(type='SigmoidKDLoss', at='@logits'),
                  loss_score=dict(type='FitNetLoss', at='neck', region=dict(
                      type='TeacherScoreRegion', logits_at='@logits')))
    distiller = Distiller(student, teacher_of(det), losses, teacher_ckpt='random', view=HALF)
    term = distiller.terms['loss_fit']
    assert term.describe_levels().startswith('levels by stride: student 1 with teacher 0, student 2 with teacher 1')
    data = batch_of(student, (128, 128))
    teacher = distiller.teacher.model
    feature, logits, score = compared(distiller, student, data)
    half = F.interpolate(data['inputs'], size=(64, 64), mode='bilinear', antialias=True)
    with torch.no_grad():
        wanted = teacher.extract_feat(half)
        scores, _ = teacher.bbox_head(wanted)
    assert len(feature.teacher) == len(feature.student) == 4
    for index, (own, theirs) in enumerate(zip(feature.student, feature.teacher)):
        assert own.shape[2:] == theirs.shape[2:] and torch.allclose(theirs, wanted[index], atol=1e-5)
        assert torch.allclose(logits.teacher[index], scores[index], atol=1e-5)
    boxes = [sample.gt_instances.bboxes for sample in data['data_samples']]
    masks = term.region(feature.student, feature.batch)
    wanted = term.region(feature.student, KDBatch(boxes=boxes, input_shape=(128, 128)))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(masks, wanted))
    assert score.batch.given.teacher_logits[0].shape[2:] == score.student[0].shape[2:]
    runner, record = train(det, [hook(teacher_of(det), losses, view=HALF)])
    assert all(step['loss_fit'] > 0 and step['loss_kd'] > 0 for step in record.losses)


def test_an_odd_scale_is_brought_to_the_students_grid(coco_root, tmp_path):
    det = detector(coco_root, tmp_path)
    student = make_runner(det).model
    distiller = Distiller(student, teacher_of(det), dict(loss_fit=dict(type='FitNetLoss', at='neck')),
                          teacher_ckpt='random', view=dict(scale=0.75, multiple_of=32))
    comparison, = compared(distiller, student, batch_of(student, (128, 128)))
    assert distiller.terms['loss_fit'].adapter is None  # nothing of the student's is resized
    half = F.interpolate(batch_of(student, (128, 128))['inputs'], size=(96, 96), mode='bilinear', antialias=True)
    with torch.no_grad():
        wanted = distiller.teacher.model.extract_feat(half)
    for index, (own, theirs) in enumerate(zip(comparison.student, comparison.teacher)):
        expected = F.interpolate(wanted[index], size=own.shape[2:], mode='bilinear')
        assert torch.allclose(theirs, expected, atol=1e-5)


@pytest.mark.parametrize('view', [HALF, dict(scale=2), dict(size=(48, 80))], ids=str)
def test_a_segmentor_with_logits(cityscapes_root, tmp_path, view):
    seg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(seg).model
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits'))
    distiller = Distiller(student, teacher_of(seg), losses, teacher_ckpt='random', view=view)
    data = batch_of(student)
    comparison, = compared(distiller, student, data)
    size = view.get('size') or (int(64 * view['scale']), ) * 2
    seen = F.interpolate(data['inputs'], size=size, mode='bilinear', antialias=min(size) < 64)
    with torch.no_grad():
        wanted = distiller.teacher.model(seen, data['data_samples'], mode='tensor')
    own, theirs = comparison.student[0], comparison.teacher[0]
    assert own.shape == theirs.shape
    assert torch.allclose(theirs, F.interpolate(wanted, size=own.shape[2:], mode='bilinear'), atol=1e-5)
    _, record = train(seg, [hook(teacher_of(seg), losses, view=view)])
    assert all(step['loss_kd'] > 0 for step in record.losses)


@pytest.mark.parametrize('loss', ['LDLoss', 'CrossKDLoss'])
def test_losses_of_heads_are_refused(loss):
    cfg = head_config('gfl')
    student = build_model(cfg, 'mmdet')
    with pytest.raises(ValueError, match=f'{loss} compares what two heads say about the same priors or queries, and '
                                         r'the teacher sees them at another size \(view\)'):
        Distiller(student, teacher_of(cfg), dict(loss_head=dict(type=loss, at='bbox_head')), teacher_ckpt='random',
                  view=HALF)


def test_a_head_that_reads_sizes_gets_its_own():
    """DETR makes its masks from img_shape and batch_input_shape: as with samples of the small pictures."""
    cfg = detr_config('detr')
    student = build_model(cfg, 'mmdet')
    distiller = Distiller(student, teacher_of(cfg), dict(loss_fit=dict(type='FitNetLoss', at='@memory')),
                          teacher_ckpt='random', view=HALF, scope='mmdet')
    data = batch_of(student, (128, 128))
    for index, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(img_shape=(128 - 32 * index, 128), batch_input_shape=(128, 128)))
    comparison, = compared(distiller, student, data)
    samples = copy.deepcopy(data['data_samples'])
    for index, sample in enumerate(samples):
        sample.set_metainfo(dict(img_shape=(64 - 16 * index, 64), batch_input_shape=(64, 64)))
    half = F.interpolate(data['inputs'], size=(64, 64), mode='bilinear', antialias=True)
    teacher = distiller.teacher.model
    with torch.no_grad():
        features = teacher.extract_feat(half)
        inputs, _ = teacher.pre_transformer(features, samples)
        memory = teacher.forward_encoder(**inputs)['memory']
    wanted = memory.transpose(1, 2).reshape(2, -1, *features[-1].shape[2:])
    own, theirs = comparison.student[0], comparison.teacher[0]
    assert torch.allclose(theirs, F.interpolate(wanted, size=own.shape[2:], mode='bilinear'), atol=1e-5)


def test_samples_of_another_size():
    """Everything that has a place is scaled; the host's samples stay as they were."""
    from mmdet.models.detectors import MaskRCNN  # noqa: F401  (registers it)
    cfg = head_config('gfl')
    model = build_model(cfg, 'mmdet')
    data = synthetic_batch(model, 2, (64, 96))
    samples = data['data_samples']
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    samples[1].gt_instances.bboxes = samples[1].gt_instances.bboxes.tensor
    assert isinstance(samples[0].gt_instances.bboxes, HorizontalBoxes)
    masks = torch.zeros(len(samples[0].gt_instances), 64, 96, dtype=torch.uint8)
    masks[:, :32] = 1
    samples[0].gt_instances.masks = BitmapMasks(masks.numpy(), 64, 96)
    before = copy.deepcopy(samples)
    found = samples_seen(samples, Seen((128, 64), (128, 48), (64, 96)))
    for sample, seen, kept in zip(samples, found, before):
        assert seen.img_shape == (128, 48) and sample.img_shape == kept.img_shape == (64, 96)
        assert seen.scale_factor == (0.5, 2.0)
        own, other = (item.gt_instances.bboxes for item in (sample, seen))
        own, other = (boxes.tensor if hasattr(boxes, 'tensor') else boxes for boxes in (own, other))
        assert torch.allclose(other, own * torch.tensor([0.5, 2.0, 0.5, 2.0]))
        assert torch.equal(seen.gt_instances.labels, sample.gt_instances.labels)
    assert (found[0].gt_instances.masks.height, found[0].gt_instances.masks.width) == (128, 48)
    assert found[0].gt_instances.masks.masks[:, :64].all() and not found[0].gt_instances.masks.masks[:, 66:].any()
    assert samples[0].gt_instances.masks.height == 64


def test_padding_is_no_part_of_the_map():
    """A ramp over the picture is the same ramp at the student's grid, whether the rest is stretched or padded."""
    ramp = torch.linspace(0, 1, 100).view(1, 1, 1, 100).expand(1, 1, 100, 100)
    grid = torch.zeros(1, 1, 10, 10)
    found = []
    for fit in ('resize', 'pad'):
        view = View(multiple_of=(16, 16), fit=fit)
        images = view.apply(ramp, pad_value=-9.0)
        assert images.shape == (1, 1, 112, 112)
        maps = F.avg_pool2d(images, 16)
        found.append(at_grid((maps, ), (grid, ), view.of((100, 100)))[0])
    assert float(images[0, 0, -1, -1]) == -9
    middle = [level[..., :8, 1:8] for level in found]  # at the edge a cell has some padding in it
    assert torch.allclose(*middle, atol=0.01)


@pytest.mark.parametrize('view, message', [
    (dict(scal=0.5), "view has no 'scal'; it takes scale, size, multiple_of, fit"),
    (dict(scale=0), 'scale=0 must be above 0'),
    (dict(scale=0.5, size=(64, 64)), 'give either scale or size'),
    (dict(fit='crop'), "fit='crop'"), ('half', "view='half' must be a dict"),
    (dict(multiple_of=16), r'multiple_of=\(16, 16\) is no multiple of the patches of this model, \(14, 14\)')])
def test_wrong_views_are_told(view, message):
    with pytest.raises(ValueError, match=message):
        view_of('teacher', view, View(multiple_of=(14, 14)))
    with pytest.raises(ValueError, match='takes pictures of .* only'):
        view_of('teacher', dict(scale=0.5), View(size=(224, 224)))


def test_no_view_where_pixels_must_be_the_same(coco_root, tmp_path):
    det = detector(coco_root, tmp_path)
    student = make_runner(det).model
    for source, extra, message in (
            (dict(type='PeerTeacher', config=teacher_of(det)), dict(), 'view and input_key are for a teacher'),
            ('self', dict(), "teacher='self' is the student's own pass"),
            (teacher_of(det), dict(loss=dict(type='RMLoss', at='bbox_head')), 'RMLoss compares what two heads say')):
        losses = dict(loss_x=extra.get('loss', dict(type='FitNetLoss', student_at='neck', teacher_at='neck')))
        with pytest.raises(ValueError, match=message):
            Distiller(student, source, losses, teacher_ckpt='random', view=HALF)




def test_sizes_by_hand():
    assert View(scale=0.5).of((63, 65)).size == (32, 32)
    assert not View(multiple_of=(16, 16)).identity and View(multiple_of=(16, 16)).of((20, 33)).size == (32, 48)
    halves, odd, grown = View(scale=0.5), View(scale=0.75), View(scale=0.5, multiple_of=(16, 16))
    assert halves.of((64, 64)).strides and not odd.of((64, 64)).strides  # 48 is no power of two of 64
    assert grown.of((64, 64)).strides and not grown.of((64, 68)).strides  # 34 is stretched to 48
    assert not View(size=(64, 32)).of((64, 64)).strides
    padded = View(multiple_of=(16, 8), fit='pad').apply(torch.zeros(1, 1, 30, 12), pad_value=3.0)
    assert padded.shape == (1, 1, 32, 16) and not padded[..., :30, :12].any()
    assert bool((padded[..., 30:, :] == 3).all()) and bool((padded[..., 12:] == 3).all())
