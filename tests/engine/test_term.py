"""What a term asks of the models beyond the outputs at its taps: modules for the loss, logits for the region."""

import pytest
import torch
from stock import detector, loss_step, make_runner, teacher_of

from kd_mm.engine.distiller import Distiller
from kd_mm.losses import OFDLoss
from kd_mm.losses.base.loss import ReadsModules
from kd_mm.losses.ofd import negative_mean
from kd_mm.ops.problems import ConfigProblems
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Recorded

HEAD = 'bbox_head.retina_cls'


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detector(coco_root, tmp_path_factory.mktemp('det'))


@pytest.fixture(scope='module')
def student(det):
    return make_runner(det).model


def distiller(det, student, **loss):
    return Distiller(student, teacher_of(det), dict(loss_kd=loss), teacher_ckpt='random', scope='mmdet')


def test_bind_gets_the_module_of_each_level(det, student, monkeypatch):
    seen = []
    monkeypatch.setattr(OFDLoss, 'bind', lambda self, *sides: seen.append(sides))
    kd = distiller(det, student, type='OFDLoss', at=['backbone.layer3.*.bn2', 'neck'], levels=[1, -1, 2])
    (ours, theirs), = seen
    assert ours == [student.backbone.layer3[1].bn2, student.neck, student.neck]
    model = kd.teacher.model
    assert theirs == [model.backbone.layer3[1].bn2, model.neck, model.neck]


def test_ofd_takes_the_margin_from_the_teacher(det, student):
    norm = student.backbone.layer3[1].bn1
    kd = distiller(det, student, type='OFDLoss', at=['backbone.layer3.1.bn1', 'backbone.layer4.1.bn1'], margin='norm',
                   levels=[1, 0])
    teacher, loss = kd.teacher.model.backbone, kd.terms['loss_kd'].loss
    assert list(loss.state_dict()) == ['margin_0', 'margin_1']
    for margin, module in ((loss.margin_0, teacher.layer4[1].bn1), (loss.margin_1, teacher.layer3[1].bn1)):
        assert torch.equal(margin, negative_mean(module.weight.detach(), module.bias.detach()))
    assert norm.num_features == loss.margin_1.numel()
    assert loss_step(student, kd)['loss_kd'] > 0


def test_ofd_before_the_last_relu(det, student):
    """The published place: the sum of a residual block, with the margin of its last batch norm."""
    kd = distiller(det, student, type='OFDLoss', at=['backbone.layer3.1:pre_relu', 'backbone.layer4.1:pre_relu'],
                   margin='norm')
    teacher, loss = kd.teacher.model.backbone, kd.terms['loss_kd'].loss
    for margin, block in ((loss.margin_0, teacher.layer3[1]), (loss.margin_1, teacher.layer4[1])):
        assert torch.equal(margin, negative_mean(block.bn2.weight.detach(), block.bn2.bias.detach()))
    assert loss_step(student, kd)['loss_kd'] > 0


def test_ofd_at_another_module_is_a_problem(det, student):
    with pytest.raises(ConfigProblems, match="loss_kd: OFDLoss, level 0: margin='norm' needs .* not FPN"):
        distiller(det, student, type='OFDLoss', at='neck', margin='norm')


@pytest.mark.parametrize('region', [
    dict(type='TeacherScoreRegion', logits_at=HEAD), dict(type='PredictionGapRegion', logits_at=HEAD)])
def test_regions_have_taps_of_their_own(det, student, region, monkeypatch):
    kd = distiller(det, student, type='FRSLoss', at='neck', levels=[0, 3], region=region)
    term, batches = kd.terms['loss_kd'], []
    assert term.teacher_paths == ['neck', HEAD]
    assert term.student_paths == (['neck', HEAD] if 'Gap' in region['type'] else ['neck'])
    forward = type(term.region).forward

    def watched(self, features, batch):
        batches.append((features, batch))
        return forward(self, features, batch)

    monkeypatch.setattr(type(term.region), 'forward', watched)
    assert loss_step(student, kd)['loss_kd'] > 0
    (features, batch), = batches
    assert len(features) == len(batch.given.teacher_logits) == 2
    for feature, logits in zip(features, batch.given.teacher_logits):
        assert logits.shape[1] == 9 * 2 and logits.shape[2:] == feature.shape[2:] and not logits.requires_grad
    assert len(batch.given.student_logits) == (2 if 'Gap' in region['type'] else 0)
    assert not any(logits.requires_grad for logits in batch.given.student_logits)


def test_the_mask_is_made_of_this_steps_logits(det, student):
    """The term's loss is what the loss gives for the same tensors by hand."""
    kd = distiller(det, student, type='FRSLoss', at='neck', region=dict(type='TeacherScoreRegion', logits_at=HEAD),
                   loss_weight=1.0)
    term = kd.terms['loss_kd']
    features, theirs, logits = ([torch.randn(2, width, side, side) for side in (8, 4)] for width in (16, 16, 18))
    records = {'neck': Recorded(theirs), HEAD: Recorded(logits)}
    term.reader.pairs = None
    comparison, = kd.current.read([term], {'student': {'neck': Recorded(features)}, 'teacher': records}, KDBatch())
    found = kd.current.evaluate(comparison).total
    scores = [level.sigmoid().amax(dim=1, keepdim=True) for level in logits]
    expected = sum((score * (s - t).square()).sum() / score.sum() for score, s, t in zip(scores, features, theirs))
    assert torch.isclose(found, expected)


def test_a_wrong_path_of_the_region_is_a_problem(det, student):
    with pytest.raises(ConfigProblems, match="loss_kd: teacher has no module 'bbox_head.retina_clss'"):
        distiller(det, student, type='FRSLoss', at='neck', region=dict(
            type='TeacherScoreRegion', logits_at='bbox_head.retina_clss'))
    with pytest.raises(ConfigProblems, match=r'the teacher logits of the region have 4 levels .* level 4 is needed'):
        distiller(det, student, type='FRSLoss', at='neck', region=dict(
            type='TeacherScoreRegion', logits_at='backbone'))


def test_other_regions_leave_the_batch_alone(det, student):
    kd = distiller(det, student, type='FitNetLoss', at='neck', region=dict(type='GTBoxRegion'))
    batch, maps = KDBatch(), {'neck': Recorded([torch.zeros(1, 16, 4, 4)])}
    kd.terms['loss_kd'].reader.pairs = None
    comparison, = kd.current.read(records={'student': maps, 'teacher': maps}, batch=batch, terms=[kd.terms['loss_kd']])
    assert comparison.batch is batch
    assert not isinstance(build(dict(type='CWDLoss')), ReadsModules) and isinstance(
        build(dict(type='OFDLoss')), ReadsModules)
